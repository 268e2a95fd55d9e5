"""What fewer tokens for each picture cost and give, and folders that keep them."""

import json
import shutil
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

import slimvlm as sv
from slimvlm import cli
from slimvlm.core.errors import ConfigError, UnsupportedModelError
from slimvlm.core.options import TrainingData
from slimvlm.core.progress import silent
from slimvlm.data.read import load_samples
from slimvlm.data.samples import open_image
from slimvlm.evaluation import on_data
from slimvlm.evaluation.on_data import evaluate_data
from slimvlm.models.load import load
from slimvlm.models.pictures import picture_tokens
from slimvlm.pruning.save import CARD_FILE
from slimvlm.runs import compress as compress_module
from slimvlm.runs import stages
from slimvlm.runs.advise import dry_run, dry_run_rows
from slimvlm.runs.compress import compress
from slimvlm.runs.images import image_tokens
from slimvlm.runs.tables import image_rows
from tests import tiny, tiny_folder, tiny_pictures
from tests.handmade import Stopped, stops
from tests.tables import tables
from tests.tiers import tiered

TABLES = tables(__file__)

SIZE = (48, 32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return TrainingData(data=str(tiny_folder.write_llava_data(tmp_path_factory.mktemp("d"), 4)))


def by_default(name, _):
    return name == "qwen2_5_vl"


def measured(name, data, shares=(0.5,), keep=None, out=None, tasks=None, force=False):
    folder, said = str(tiny_pictures.folder(name)), []
    found = image_tokens(folder, data, shares, tasks, 2, keep, out, force, said.append)
    return found, said


@pytest.mark.parametrize(
    ("name", "share"), tiered([("qwen2_5_vl", 0.5), ("llava_onevision", 0.75)], by_default)
)
def test_budgets_are_measured_against_the_whole_picture_and_an_impossible_one_is_told(
    name, share, data
):
    (full, small), said = measured(name, data, (share, 2.0), tasks="text_odd")
    assert any("not measured: image-token budget 2.0 must be" in line for line in said)
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
    ("name", "share"),
    tiered([("qwen2_5_vl", 0.5), ("llava_onevision", 0.75), ("internvl", 0.5)], by_default),
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
    image_tokens(str(source), data, (), None, None, 0.5, out, False, print)
    values = json.loads((out / "preprocessor_config.json").read_text())
    assert values["size"] == load(out)[1].image_processor.to_dict()["size"]


@pytest.mark.parametrize(("how", "told"), TABLES["mistakes"])
def test_mistakes_are_told_before_weights_are_read(data, how, told, monkeypatch, tmp_path):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    if "out" in how:
        how = {**how, "out": tmp_path / how["out"]}
    with pytest.raises(ConfigError, match=told):
        measured("internvl", data, **how)
    assert not list(tmp_path.iterdir())


def card_of(folder):
    return (folder / CARD_FILE).read_text()


def test_a_kept_budget_has_a_card_that_goes_on_from_the_originals(data, tmp_path):
    model, processor = load(tiny_pictures.folder("qwen2_5_vl"))
    source, out = tmp_path / "source", tmp_path / "out"
    model.save_pretrained(source)
    processor.save_pretrained(source)
    (source / CARD_FILE).write_text("---\nlicense: mit\nbase_model: some/original\n---\n# Theirs\n")
    image_tokens(str(source), data, (), None, None, 0.5, out, False, print)
    values, text = ModelCard.load(out / CARD_FILE).data.to_dict(), card_of(out)
    assert (values["base_model"], values["license"]) == ("some/original", "mit")
    whole, fewer = (picture_tokens(load(folder)[1], SIZE) for folder in (source, out))
    size = load(out)[1].image_processor.size["longest_edge"]
    told = ["The weights of [some/original]", f"| tokens per image | {whole} | {fewer} |"]
    told += [f"`size.longest_edge` {size}", "This was not measured."]
    told += [f"`--image-max-tokens {size // 16**2}`"]
    told += ["--data data.json --no-measure --keep 0.5 --out out"]
    assert [each for each in told if each not in text] == []
    assert "Theirs" not in text
    assert str(tmp_path) not in text


OWN = (
    "from transformers import Qwen2_5_VLProcessor\n\n\nclass Own(Qwen2_5_VLProcessor):\n    pass\n"
)


def test_a_processor_with_code_of_its_own_is_read_back_as_the_user_trusts_it(data, tmp_path):
    source, out = tiny_folder.root() / "own-code", tmp_path / "out"
    shutil.copytree(tiny_pictures.folder("qwen2_5_vl"), source)
    (source / "own.py").write_text(OWN)
    named = {"processor_class": "Own", "auto_map": {"AutoProcessor": "own.Own"}}
    tiny_folder.edit_json(source / "processor_config.json", lambda values: values.update(named))
    with pytest.raises(ConfigError, match="processor_class 'Own' names what is not run here"):
        image_tokens(str(source), data, (), None, None, 0.5, out, False, print)
    trusting = replace(data, trust_remote_code=True)
    image_tokens(str(source), trusting, (), None, None, 0.5, out, False, print)
    whole, fewer = (
        picture_tokens(AutoProcessor.from_pretrained(folder, trust_remote_code=True), SIZE)
        for folder in (source, out)
    )
    assert fewer <= 0.5 * whole


# compress with a budget: the smaller model has it from calibration on, the original does not.

KNOBS = {"qwen2_5_vl": 0.5, "internvl": 0.5, "gemma4": 0.3, "llava_onevision": 0.75}
"""Pixels, tiles, soft tokens, and grids in processor and configuration; with a share."""
RECOVER = {
    **{"train": "lora", "loss": "sft+hidden", "max_steps": 2, "batch_size": 2, "lora_rank": 4},
    "bf16": False,
}
TRAINED = ("qwen2_5_vl", "llava_onevision")


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    """Enough conversations that some stay unseen."""
    return tiny_folder.write_llava_data(tmp_path_factory.mktemp("more"), 12)


def compression(name, more, **changes):
    values = {
        **{"ratio": 0.15, "axis": "depth", "criterion": "block_influence", "data": str(more)},
        **{"samples": 4, "repair": "none", "local_steps": 0, "recover": "none"},
        **{"image_tokens": KNOBS[name]},
    }
    model = str(tiny_pictures.folder(name))
    return model, sv.CompressConfig(**{**values, **changes})


@pytest.mark.usefixtures("unhurried")
@pytest.mark.slow
@pytest.mark.parametrize("name", KNOBS)
def test_a_run_chooses_the_budget_first_and_writes_it(name, more, tmp_path, monkeypatch):
    learning = {"recover": RECOVER} if name in TRAINED else {}
    asked, said, taught = compression(name, more, **learning), list[str](), []
    honest = stages.train
    monkeypatch.setattr(stages, "train", lambda *given: taught.append(given) or honest(*given))
    run = compress(*asked, tmp_path / "run", say=said.append)
    whole = AutoProcessor.from_pretrained(asked[0])
    plain = AutoProcessor.from_pretrained(run.folder / "checkpoint")
    size = open_image(load_samples(more)[0].images[0]).size
    before, after = picture_tokens(whole, size), picture_tokens(plain, size)
    assert 0 < after <= KNOBS[name] * before
    configs = [AutoConfig.from_pretrained(run.folder / "checkpoint")]
    for student, teacher, _, _, processor, *_ in taught:  # both are shown fewer
        assert processor.image_processor.to_dict() == plain.image_processor.to_dict()
        configs += [student.config, teacher.config]
    assert len(configs) == (3 if learning else 1)
    if name == "llava_onevision":
        for config in configs:
            assert config.image_grid_pinpoints == plain.image_processor.image_grid_pinpoints
    texts = [card_of(run.folder / "checkpoint"), (run.folder / "summary.md").read_text()]
    assert f"| tokens per image | {before} | {after} |" in texts[0]
    assert f"{after} tokens in place of {before}" in texts[1]
    assert any(f"{after} tokens in place of {before}" in line for line in said)
    unseen, model = load_samples(more)[-2:], load(asked[0])
    loss = evaluate_data(*model, unseen).figures.loss.value
    assert run.held_out["original"].figures.loss.value == pytest.approx(loss, abs=1e-5)
    predicted = on_data.predictions_of(*model, unseen)
    figures = evaluate_data(*run.load(), unseen, predicted).figures
    found = [*run.held_out.values()][-1].figures.loss.value
    assert found == pytest.approx(figures.loss.value, rel=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("unhurried")
def test_a_stopped_run_goes_on_with_its_budget_alone(more, tmp_path, monkeypatch):
    out, asked = tmp_path / "run", compression("internvl", more)
    with monkeypatch.context() as patch:
        patch.setattr(compress_module, "finish", stops)
        with pytest.raises(Stopped):
            compress(*asked, out, say=silent)
    with pytest.raises(ConfigError, match="with another image_tokens"):
        compress(*compression("internvl", more, image_tokens=0.6), out, say=silent)
    monkeypatch.setattr(stages, "prune_", stops)  # done already
    assert compress(*asked, out, say=silent).config.image_tokens == 0.5
    assert "tokens in place of" in (out / "summary.md").read_text()


@pytest.mark.parametrize("is_dry", [False, True])
@pytest.mark.parametrize(("changes", "told"), TABLES["budgets"], ids=lambda each: str(each)[:20])
def test_a_budget_that_cannot_be_is_refused_before_weights_are_read(
    is_dry, changes, told, more, tmp_path, monkeypatch
):
    monkeypatch.setattr(stages, "load_original", None)
    model, config = compression("qwen2_5_vl", more)
    config = replace(config, **{k: v for k, v in changes.items() if k != "model"})
    if changes.get("model") == "paligemma":  # no weights at all
        model = str(tiny_folder.root() / "paligemma")
        tiny.CONFIGS["paligemma"]().save_pretrained(model)
    elif "model" in changes:
        model = str(tiny_folder.folder(changes["model"]))
    where = {} if is_dry else {"out": tmp_path / "run"}
    with pytest.raises((ConfigError, UnsupportedModelError), match=told):
        (dry_run if is_dry else compress)(model, config, say=silent, **where)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("unhurried")
def test_a_dry_run_says_the_tokens_of_a_picture_and_counts_them(more, tmp_path, capsys):
    model, config = compression("qwen2_5_vl", more)
    found, whole = (dry_run(model, c, silent) for c in (config, replace(config, image_tokens=None)))
    assert found.pictures.tokens <= 0.5 * found.pictures.tokens_before
    fewer = found.pictures.tokens_before - found.pictures.tokens
    assert whole.tokens - found.tokens == pytest.approx(fewer, abs=1)
    assert ["images", f"take {found.pictures}"] in dry_run_rows(found)
    assert whole.pictures is None
    given = ["--data", str(more), "--ratio", "0.15", "--samples", "4", "--train", "none"]
    given += ["--image-tokens", "0.5", "--dry-run", "--json", "--out", str(tmp_path / "run")]
    cli.main(["compress", model, *given])
    assert json.loads(capsys.readouterr().out)["pictures"]["tokens"] == found.pictures.tokens


def test_a_time_and_a_budget_do_not_go_together(more):
    with pytest.raises(ConfigError, match=r"target_latency 0\.5 .* image_tokens 0\.5"):
        compression("qwen2_5_vl", more, ratio=None, target_latency=0.5)
