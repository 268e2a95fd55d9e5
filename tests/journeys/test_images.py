"""What fewer tokens for each picture cost and give, and folders that keep them."""

import json

import pytest
from transformers import AutoConfig, AutoProcessor

from slimvlm.core.errors import ConfigError
from slimvlm.core.options import TrainingData
from slimvlm.models.load import load, load_processor
from slimvlm.models.pictures import picture_tokens
from slimvlm.runs.tables import image_rows
from slimvlm.runs.verbs import images
from tests import tiny_folder, tiny_pictures

SIZE = (48, 32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return TrainingData(data=str(tiny_folder.write_llava_data(tmp_path_factory.mktemp("d"), 4)))


def measured(name, data, shares=(0.5,), keep=None, out=None, tasks=None, force=False):
    folder, said = str(tiny_pictures.folder(name)), []
    found = images(folder, data, shares, tasks, 2, keep, out, force, said.append)
    return found, said


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision"])
def test_budgets_are_measured_against_the_whole_picture(name, data):
    share = {"qwen2_5_vl": 0.5, "llava_onevision": 0.75}[name]
    full, small = measured(name, data, (share,), tasks="text_odd")[0]
    assert full.share == 1
    assert small.tokens <= share * full.tokens
    ratio = small.kv_cache_bytes / full.kv_cache_bytes
    assert ratio == pytest.approx(small.tokens / full.tokens, rel=1e-3)
    assert full.times is None
    assert small.times.prefill.value > 0
    for group, is_seeing in (("data", True), ("text_odd", False)):
        figures = small.held_out[group].figures
        assert full.held_out[group].figures.loss.value > 0
        # texts without pictures stay the same
        assert (figures.divergence.value > 1e-6) == is_seeing
    header, rows = image_rows([full, small])
    assert header[1:] == ["1.0", str(share)]
    assert {len(row) for row in rows} == {3}


@pytest.mark.parametrize(
    ("name", "share"), [("qwen2_5_vl", 0.5), ("llava_onevision", 0.75), ("internvl", 0.5)]
)
def test_a_kept_budget_is_read_back_by_plain_transformers(name, share, data, tmp_path):
    out = tmp_path / name
    found, said = measured(name, data, (), share, out)
    assert found == []
    assert any("--image-max-tokens" in line for line in said) == (name == "qwen2_5_vl")
    source = tiny_pictures.folder(name)
    weights, same = (folder / "model.safetensors" for folder in (source, out))
    assert weights.read_bytes() == same.read_bytes()
    assert AutoConfig.from_pretrained(out).model_type == load(source)[0].config.model_type
    fewer = picture_tokens(AutoProcessor.from_pretrained(out), SIZE)
    assert fewer <= share * picture_tokens(AutoProcessor.from_pretrained(source), SIZE)
    model, processor = load(out)
    assert picture_tokens(processor, SIZE) == fewer
    if name == "llava_onevision":
        grids = model.config.image_grid_pinpoints
        assert grids == processor.image_processor.image_grid_pinpoints
        assert len(grids) < len(load(source)[0].config.image_grid_pinpoints)
    with pytest.raises(ConfigError, match="exists"):
        measured(name, data, (), share, out)


def test_the_older_file_of_a_processor_follows(data, tmp_path):
    source, out = tiny_folder.root() / "with-old-file", tmp_path / "out"
    name = "qwen2_5_vl"
    model, processor = load(tiny_pictures.folder(name))
    model.save_pretrained(source)
    processor.save_pretrained(source)
    processor.image_processor.save_pretrained(source)
    images(str(source), data, (), None, None, 0.5, out, False, print)
    values = json.loads((out / "preprocessor_config.json").read_text())
    assert (
        values["size"] == load_processor(str(out), model.config).image_processor.to_dict()["size"]
    )


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"keep": 0.5}, "keep 0.5: it needs --out"),
        ({"tasks": "nothing"}, "task 'nothing' is not known"),
        ({"keep": 0.01, "out": "out"}, "must be from"),
    ],
)
def test_mistakes_are_told_before_weights_are_read(data, how, told, monkeypatch, tmp_path):
    monkeypatch.setattr("slimvlm.runs.verbs.load_as", None)
    if "out" in how:
        how = {**how, "out": tmp_path / how["out"]}
    with pytest.raises(ConfigError, match=told):
        measured("internvl", data, **how)
    assert not list(tmp_path.iterdir())


def test_an_impossible_budget_is_left_out_and_told(data):
    found, (line,) = measured("internvl", data, (0.5, 2.0))
    assert [each.share for each in found] == [1.0, 0.5]
    assert "not measured: image-token budget 2.0 must be" in line
