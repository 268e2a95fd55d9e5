"""Converted originals compute what the original code computed, and nothing is lost on the way.

Expected outputs in ``tests/fixtures/convert`` were recorded with the original classes
(transformers 4.37.2, float32, eager attention) on tiny random models in the published layouts.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor

import slimvlm as sv
from slimvlm import cli
from slimvlm.core.errors import ConfigError, ReloadError, SlimError, UnsupportedModelError
from slimvlm.data import chat
from slimvlm.data.samples import Question
from slimvlm.models.load import load
from slimvlm_tools.convert import convert, write
from slimvlm_tools.convert import source as source_files
from slimvlm_tools.convert.tokens import TokenizerFiles, llama_tokenizer
from tests import tiny_folder as folders
from tests.handmade import refused
from tests.tiers import tiered
from tests.tiny_folder import edit_json
from tests.tolerances import FORWARD, assert_close
from tests.trust.spoiled import Mark

FIXTURES = Path(__file__).parent.parent / "fixtures" / "convert"
IMAGE, TAIL = -200, 48


class Case(NamedTuple):
    family: str
    source: str
    tower: str | None
    prefix: str = ""

    @property
    def folder(self):
        return FIXTURES / self.family

    def convert(self, out, source=None, **options):
        tower = self.folder / self.tower if self.tower else None
        return convert(source or self.folder / self.source, out, tower, **options)

    def copied(self, target, **changes):
        """A copy of the original with changes in its ``config.json``."""
        shutil.copytree(self.folder / self.source, target)
        edit_json(target / "config.json", lambda config: config.update(changes))
        return target


CASES = {
    "llava": Case("llava", "original", "vision_tower"),
    "bunny": Case("bunny", "original", "siglip-tower", "published."),
    "bunny-no-tower": Case("bunny", "original_no_tower", "siglip-tower", "no_tower."),
    "internvl": Case("internvl", "original", None),
}
TABLES = yaml.safe_load(Path(__file__).with_name("convert.yaml").read_text())
QUESTIONS, TILES, PICTURES = (TABLES[name] for name in ("questions", "tiles", "pictures"))


class Converted(NamedTuple):
    case: Case
    folder: Path
    model: Any
    processor: Any
    golden: dict[str, Any]
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]

    @property
    def pictures(self):
        return [Image.fromarray(self.inputs[f"image{i}"].numpy()) for i in range(3)]


@pytest.fixture(scope="module", params=tiered(CASES, lambda name: "bunny" not in name))
def converted(request, tmp_path_factory):
    case = CASES[request.param]
    folder = case.convert(tmp_path_factory.mktemp("convert") / "out")
    model = hf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = hf.AutoProcessor.from_pretrained(
        folder, image_processor=hf.AutoImageProcessor.from_pretrained(folder, backend="pil")
    )
    golden = json.loads((case.folder / "golden.json").read_text())
    recorded = (load_file(case.folder / f"{name}.safetensors") for name in ("inputs", "logits"))
    return Converted(case, folder, model, processor, golden, *recorded)


def weights_in(folder):
    return load_file(folder / "model.safetensors")


def assert_same(found, expected):
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in expected.items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def messages(turns):
    roles = (("user", "assistant")[number % 2] for number in range(len(turns)))
    said = zip(roles, turns, strict=True)
    return [folders.turn(role, *[None] * count, text) for role, (count, text) in said]


def expanded(ids, mask, image_id, count):
    """Original inputs with ``count`` placeholders a picture, padded to the right."""
    rows = [
        [pair for t, m in zip(r.tolist(), k.tolist(), strict=True)
         for pair in ([(image_id, m)] * count if t == IMAGE else [(t, m)])]
        for r, k in zip(ids, mask, strict=True)
    ]  # fmt: skip
    longest = max(map(len, rows))
    filled = torch.tensor([row + [(0, 0)] * (longest - len(row)) for row in rows])
    return filled[..., 0], filled[..., 1]


def model_inputs(found, name):
    ids = found.inputs[f"{name}.input_ids"]
    mask = found.inputs.get(f"{name}.attention_mask", torch.ones_like(ids))
    inputs = {}
    if found.case.family == "internvl":
        pixels = found.inputs.get(f"{name}.pixel_values")
        if name == "batch":
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    else:
        count = found.golden["tokens_per_image"]
        ids, mask = expanded(ids, mask, found.model.config.image_token_id, count)
        pixels = found.inputs["pixel_values"][PICTURES[name]] if PICTURES[name] else None
    if pixels is not None:
        inputs["pixel_values"] = pixels
    return {"input_ids": ids, "attention_mask": mask, **inputs}


@torch.no_grad()
def test_outputs_are_the_original_ones_also_through_our_own_loader(converted):
    names = [n.split(".")[0] for n in converted.inputs if n.endswith("input_ids")]
    assert set(names) >= set(PICTURES)
    for name in names:
        inputs = model_inputs(converted, name)
        expected = converted.expected[f"{converted.case.prefix}{name}.logits_tail"]
        found = converted.model(**inputs).logits[:, -TAIL:, : expected.shape[-1]]
        seen = inputs["attention_mask"][:, -TAIL:].bool()
        assert_close(found[seen], expected[seen], FORWARD)
    inputs = model_inputs(converted, "one")
    said = converted.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    expected = converted.golden["cases"][f"{converted.case.prefix}one"]["greedy_8"][-8:]
    assert said[0, inputs["input_ids"].shape[1] :].tolist() == expected
    model, processor = load(converted.folder, device="cpu")
    question = Question("q", "How many?", ("2",), tuple(converted.pictures[:2]))
    inputs = chat.encode_questions(processor, [question])
    said = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    new = set(range(converted.expected[next(iter(converted.expected))].shape[-1], 10**6))
    assert not new & set(said[0, inputs["input_ids"].shape[1] :].tolist())


def test_conversations_and_pictures_become_the_original_inputs(converted):
    golden, tokenizer = converted.golden, converted.processor.tokenizer
    for name, turns in QUESTIONS[converted.case.family].items():
        text = converted.processor.apply_chat_template(messages(turns), add_generation_prompt=True)
        expected = golden["original_token_ids"][name]
        if converted.case.family == "internvl":
            for tiles in TILES[name]:
                context = "<img>" + "\0" * golden["num_image_token"] * tiles + "</img>"
                text = text.replace("<IMG_CONTEXT>", context, 1)
            text = text.replace("\0", "<IMG_CONTEXT>")
        else:
            image_id = converted.model.config.image_token_id
            expected = [image_id if i == IMAGE else i for i in expected]
        assert tokenizer(text).input_ids == expected, name
    if converted.case.family == "internvl":
        found = converted.processor.image_processor(converted.pictures[:1], return_tensors="pt")
        assert torch.equal(found["pixel_values"], converted.inputs["tiled.pixel_values"])
        for grid, (width, height) in converted.golden["tile_grids_wh_at_maxnum"].items():
            size, limit = grid.split("@")
            columns, rows = map(int, size.split("x"))
            count = converted.processor.image_processor.get_number_of_image_patches(
                rows, columns, {"max_patches": int(limit)}
            )
            assert count == width * height + (width * height > 1), grid
        return
    found = converted.processor.image_processor(converted.pictures, return_tensors="pt")
    assert torch.equal(found["pixel_values"], converted.inputs["pixel_values"])


def test_files_are_those_of_transformers_also_where_reading_goes_on(
    converted, tmp_path, monkeypatch
):
    model = hf.AutoModelForImageTextToText.from_pretrained(converted.folder)
    model.save_pretrained(tmp_path)
    assert_same(weights_in(converted.folder), weights_in(tmp_path))
    for name in ("config.json", "generation_config.json"):
        ours, theirs = (json.loads((f / name).read_text()) for f in (converted.folder, tmp_path))
        assert ours == theirs
    modes = {file.stat().st_mode for file in converted.folder.iterdir()}
    assert len(modes) == 1, "whoever may read the configuration may read the weights"
    monkeypatch.setattr(source_files, "MAPPED_BYTES", 5_000)
    found = converted.case.convert(tmp_path / "out")
    assert_same(weights_in(found), weights_in(converted.folder))


# Variations of the originals
def edit_weights(folder, change):
    """Change the tensors of a safetensors folder, and make it one file."""
    files = sorted(folder.glob("*.safetensors"))
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for file in [*files, *folder.glob("*.index.json")]:
        file.unlink()
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("legacy", [True, None])
def test_legacy_tokenizers_keep_their_spaces(tmp_path, legacy):
    source = CASES["llava"].copied(tmp_path / "source")
    edit_json(source / "tokenizer_config.json", lambda c: c.update(legacy=legacy))
    out = CASES["llava"].convert(tmp_path / "out", source)
    processor = hf.AutoProcessor.from_pretrained(out)
    golden = json.loads((FIXTURES / "llava" / "golden.json").read_text())
    for name, turns in QUESTIONS["llava"].items():
        text = processor.apply_chat_template(messages(turns), add_generation_prompt=True)
        expected = golden["original_token_ids_if_legacy_true"][name]
        found = processor.tokenizer(text).input_ids
        assert [IMAGE if i == processor.image_token_id else i for i in found] == expected, name


SPELLED = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def sentencepiece_model(folder, **options):
    """A small ``tokenizer.model``, trained on this file."""
    source = CASES["llava"].copied(folder)
    SentencePieceTrainer.train(
        input=__file__,
        model_prefix=str(folder / "tokenizer"),
        minloglevel=2,
        **{"vocab_size": 384, "model_type": "bpe", "byte_fallback": True, **SPELLED, **options},
    )
    return source


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no prefix"])
def splitters(request, tmp_path_factory):
    """The tokenizer of an original that was made for this, and SentencePiece's own."""
    folder = tmp_path_factory.mktemp("pieces") / "source"
    source = sentencepiece_model(folder, add_dummy_prefix=request.param)
    edit_json(source / "tokenizer_config.json", lambda c: c.update(legacy=True))
    model = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    return llama_tokenizer(TokenizerFiles(source)), model


@given(text=st.text(min_size=1) | st.text("ab \n▁tesl.'", min_size=1))
@settings(max_examples=50, deadline=None)
def test_any_text_is_split_as_sentencepiece_splits_it(splitters, text):
    assume(not any(token in text for token in ("<s>", "</s>", "<unk>")))  # are one token natively
    native, own = splitters
    assert native(text, add_special_tokens=False).input_ids == own.encode(text)


@pytest.mark.parametrize(("options", "message"), TABLES["sentencepiece"])
def test_other_kinds_of_sentencepiece_are_refused(tmp_path, options, message):
    source = sentencepiece_model(tmp_path / "source", **options or {})
    if options is None:
        (source / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(SlimError, match=message) as caught:
        CASES["llava"].convert(tmp_path / "out", source)
    assert isinstance(caught.value, ConfigError if options is None else UnsupportedModelError)
    assert "\n" not in str(caught.value)


def test_bunny_leaves_out_what_is_behind_the_layer_it_reads(tmp_path):
    """A checkpoint with the whole tower inside, as Bunny's trainer writes an unfrozen one."""
    source = CASES["bunny"].copied(tmp_path / "source")
    whole = load_file(FIXTURES / "bunny" / "siglip-tower" / "model.safetensors")
    prefix = "model.vision_tower.vision_tower."

    def put_inside(weights):
        for name in [n for n in weights if n.startswith(prefix)]:
            del weights[name]
        weights |= {prefix + n: t for n, t in whole.items() if n.startswith("vision_model.")}

    edit_weights(source, put_inside)
    inside = CASES["bunny"].convert(tmp_path / "inside", source)
    outside = CASES["bunny-no-tower"].convert(tmp_path / "outside")
    found, expected = (
        {n: t for n, t in weights_in(folder).items() if n.startswith("vision_tower.")}
        for folder in (inside, outside)
    )
    assert_same(found, expected)


def test_pictures_that_are_not_padded_are_squeezed(tmp_path):
    source = CASES["llava"].copied(tmp_path / "source", image_aspect_ratio="square")
    _, processor = load(CASES["llava"].convert(tmp_path / "out", source), device="cpu")
    wide = Image.new("RGB", (90, 30), (200, 10, 10))
    assert processor.image_processor(wide)["pixel_values"][0].std(axis=(1, 2)).max() < 1e-5
    assert processor.tokenizer.pad_token_id == 385


def test_pictures_that_are_not_tiled_are_one_square(tmp_path):
    changes = {"dynamic_image_size": False, "force_image_size": 112}
    source = CASES["internvl"].copied(tmp_path / "source", **changes)
    model, processor = load(CASES["internvl"].convert(tmp_path / "out", source), device="cpu")
    picture = Image.linear_gradient("L").resize((300, 100)).convert("RGB")
    text = processor.apply_chat_template(messages([(1, "What?")]), add_generation_prompt=True)
    inputs = processor(text=[text], images=[[picture]], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 112, 112)
    count = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert count == model.config.image_seq_length == (112 // 14 // 2) ** 2


# Faces, files, memory and refusals
def test_the_command_and_the_python_name_write_the_same(tmp_path, capsys):
    source, tower = (str(FIXTURES / "llava" / n) for n in ("original", "vision_tower"))
    cli.main(["convert", source, str(tmp_path / "cli"), "--vision-tower", tower])
    assert f"checkpoint: {tmp_path / 'cli'}" in capsys.readouterr().out
    assert "The weights of original: " in (tmp_path / "cli" / "README.md").read_text()
    for _ in range(2):  # the second time its module has been imported
        sv.convert(source, tmp_path / "python", vision_tower=tower, force=True)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "cli" / name).read_bytes() == (tmp_path / "python" / name).read_bytes()
    told = refused("convert", source, tmp_path / "other")
    assert told.startswith("slimvlm: vision_tower: the checkpoint does not hold")


def test_shards_hold_what_one_file_holds(tmp_path, monkeypatch):
    whole = weights_in(CASES["internvl"].convert(tmp_path / "one"))
    monkeypatch.setattr(write, "SHARD_BYTES", 60_000)
    monkeypatch.setattr(write, "FORWARD_BYTES", 0)  # the check of a model too large to run
    out = CASES["internvl"].convert(tmp_path / "many")
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 4
    assert all(file.stat().st_size < 80_000 for file in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(whole)
    for file in files:
        for name, tensor in load_file(file).items():
            assert index["weight_map"][name] == file.name
            assert torch.equal(tensor, whole[name])
    _, report = hf.AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())


@pytest.mark.parametrize("limit", [0, 2**40])
def test_a_lost_tensor_is_noticed_after_writing(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(write, "FORWARD_BYTES", limit)
    real = write.write_weights

    def lossy(model, read, folder, shard_bytes):
        real(model, read, folder, shard_bytes)
        edit_weights(folder, lambda weights: weights.pop("language_model.model.norm.weight"))

    monkeypatch.setattr(write, "write_weights", lossy)
    with pytest.raises(ReloadError, match=r"norm\.weight"):
        CASES["internvl"].convert(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_dtype_casts_tensors_and_nothing_else(tmp_path):
    kept = weights_in(CASES["llava"].convert(tmp_path / "kept"))
    cast = CASES["llava"].convert(tmp_path / "cast", dtype="float32")
    assert json.loads((cast / "config.json").read_text())["dtype"] == "float32"
    for name, tensor in weights_in(cast).items():
        assert torch.equal(tensor, kept[name].float())
    with pytest.raises(ConfigError, match="dtype 'int8' must be one of"):
        CASES["llava"].convert(tmp_path / "bad", dtype="int8")


def test_an_existing_folder_stays_if_nothing_takes_its_place(tmp_path):
    out = CASES["llava"].convert(tmp_path / "out")
    (out / "mine").write_text("kept")
    with pytest.raises(ConfigError, match="exists"):
        CASES["llava"].convert(out)
    with pytest.raises(ConfigError, match="vision_tower"):
        convert(FIXTURES / "llava" / "original", out, force=True)
    assert (out / "mine").read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_code_of_the_original_is_never_run(tmp_path):
    source, ran = CASES["internvl"].copied(tmp_path / "source"), tmp_path / "ran"
    for name in ("configuration_internvl_chat", "modeling_internvl_chat"):
        (source / f"{name}.py").write_text(f"open({str(ran)!r}, 'w')\n")
    out = CASES["internvl"].convert(tmp_path / "out", source)
    assert not list(out.glob("*.py"))
    assert "auto_map" not in (out / "config.json").read_text()
    source = CASES["llava"].copied(tmp_path / "pickled")
    torch.save({"model.norm.weight": Mark(ran)}, source / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(ConfigError, match="cannot be read"):
        CASES["llava"].convert(tmp_path / "other", source)
    assert not ran.exists()


def test_sampling_settings_that_are_off_do_not_stop_saving(tmp_path):
    source = CASES["llava"].copied(tmp_path / "source")
    off = {"temperature": 0.9, "top_p": 0.6, "max_length": 4096}
    edit_json(source / "generation_config.json", lambda values: values.update(off))
    out = CASES["llava"].convert(tmp_path / "out", source)
    settings = hf.GenerationConfig.from_pretrained(out)
    assert (settings.max_length, settings.eos_token_id, settings.pad_token_id) == (4096, 2, 385)
    assert settings.suppress_tokens == [384, 385]  # rows that the original does not have


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [(name, *row) for names, *row in TABLES["fields"] for name in names.split()],
)
def test_what_has_no_counterpart_is_refused_before_weights_are_opened(tmp_path, name, field, value):
    source = CASES[name].copied(tmp_path / "source")
    for file in [*source.glob("*.bin*"), *source.glob("*.safetensors*")]:
        file.unlink()
    *parents, last = field.split(".")

    def change(config):
        for parent in parents:
            config = config[parent]
        config[last] = value

    edit_json(source / "config.json", change)
    shown = value[0] if isinstance(value, list) else value
    shown = shown["type"] if isinstance(shown, dict) else shown
    named = "type" if isinstance(value, dict) and parents else last
    with pytest.raises(UnsupportedModelError, match=re.escape(named)) as caught:
        CASES[name].convert(tmp_path / "out", source)
    assert str(shown) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_native_checkpoints_are_not_originals(tmp_path):
    out = CASES["llava"].convert(tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match="native class already"):
        convert(out, tmp_path / "again")
    other = hf.LlamaConfig(architectures=["LlamaForCausalLM"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UnsupportedModelError, match=r"'LlamaForCausalLM' .* Can be: Llava"):
        convert(tmp_path / "other", tmp_path / "again")


@pytest.mark.parametrize(("name", "tensor", "shape", "message"), TABLES["tensors"])
def test_every_tensor_has_a_place_and_every_place_a_tensor(tmp_path, name, tensor, shape, message):
    source = CASES[name].copied(tmp_path / "source")

    def change(weights):
        weights.pop(tensor, None)
        if shape is not None:
            weights[tensor] = torch.ones(shape, dtype=torch.float16)

    edit_weights(source, change)
    with pytest.raises(SlimError, match=re.escape(message)):
        CASES[name].convert(tmp_path / "out", source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "tower", "message"), TABLES["towers"])
def test_a_tower_that_is_missing_or_of_another_kind_is_refused(name, tower, message, tmp_path):
    case = CASES[name]
    with pytest.raises(UnsupportedModelError if tower else ConfigError, match=message):
        convert(case.folder / case.source, tmp_path / "out", tower and FIXTURES / tower)
