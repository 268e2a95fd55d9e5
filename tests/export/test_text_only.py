"""The language model of a model that sees, written as a text model that says the same."""

import json

import pytest
import torch
import transformers as hf
from huggingface_hub import ModelCard

from slimvlm.cli import main
from slimvlm.core.errors import ReloadError, UnsupportedModelError
from slimvlm.data import chat
from slimvlm.export import text_only
from slimvlm.export.text_only import STAND_INS, export_text
from slimvlm.models import load as models
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.load import anatomy, load
from slimvlm.models.parts import text_config_of
from slimvlm.planning.make import make_plan
from slimvlm.planning.plan import Plan
from slimvlm.pruning import save as saving
from slimvlm.pruning.cut import prune_
from slimvlm.pruning.save import PLAN_FILE, save
from tests import tiny
from tests import tiny_folder as folders
from tests.handmade import logits, plan_by_hand, random_scores, refused
from tests.tiers import tiered
from tests.tolerances import FORWARD, assert_close

SEEING = [name for name, make in tiny.CONFIGS.items() if tiny.is_multimodal(make())]
INSIDE_ONLY = ("glm4v", "glm_ocr", "mllama", "molmo2", "kosmos2_5")
"""Families whose language model transformers has inside of them only."""
ROUNDED = ("paligemma",)
"""Families that count positions from 1, so that rotary embeddings round otherwise."""
PADDED = torch.tensor([[1] * 24, [0] * 5 + [1] * 19])


def texts():
    ids = torch.randint(32, 100, (2, 24), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": PADDED}


def written(name, tmp_path, **changes):
    """A tiny model, and its folder."""
    model = tiny.made(tiny.CONFIGS[name](**changes))
    model.save_pretrained(tmp_path / "whole")
    return model, tmp_path / "whole"


@pytest.mark.parametrize(
    "name",
    tiered(
        [name for name in SEEING if name not in INSIDE_ONLY],
        lambda name: name in ("llava-llama", "qwen3_vl_moe"),
    ),
)
def test_every_family_says_the_same_about_texts(name, tmp_path):
    model, folder = written(name, tmp_path)
    export_text(folder, tmp_path / "text")
    alone, report = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "text", output_loading_info=True
    )
    assert [key for kind in report.values() for key in kind] == []
    kind = text_config_of(model.config).model_type
    assert alone.config.model_type == STAND_INS.get(kind, (kind,))[0]
    assert not hasattr(alone.config, "vision_config")
    found, expected = (logits(each, texts())[PADDED.bool()] for each in (alone, model))
    if name in ROUNDED:
        assert_close(found, expected, FORWARD)
    else:
        assert torch.equal(found, expected)
    assert anatomy(tmp_path / "text").vision_params == 0


@pytest.mark.parametrize("name", INSIDE_ONLY)
def test_a_language_model_that_is_no_model_of_its_own_is_refused_by_name(name, tmp_path):
    config = tiny.CONFIGS[name]()
    config.save_pretrained(tmp_path / "whole")  # no weights at all
    with pytest.raises(UnsupportedModelError, match=f"'{config.model_type}' cannot be .* alone"):
        export_text(tmp_path / "whole", tmp_path / "text")
    told = refused("export", tmp_path / "whole", "--text-only", "--out", tmp_path / "x.gguf")
    assert repr(text_config_of(config).model_type) in told


@pytest.mark.parametrize(
    "name", tiered(["llava-gemma2", "aya_vision"], lambda name: name == "llava-gemma2")
)
def test_caps_and_factors_that_the_whole_model_leaves_aside_are_gone(name, tmp_path):
    text = {"llava-gemma2": tiny.gemma2, "aya_vision": tiny.cohere2}[name]
    factor = {"final_logit_softcapping": 0.5} if "gemma" in name else {"logit_scale": 0.25}
    model, folder = written(name, tmp_path, text_config=text(**factor))
    export_text(folder, tmp_path / "text")
    alone = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    assert torch.equal(logits(alone, texts()), logits(model, texts()))


@pytest.mark.parametrize("kind", tiered(folders.SEEING, lambda kind: kind == "internvl"))
def test_a_folder_has_tokenizer_template_and_settings_and_nothing_of_pictures(kind, tmp_path):
    whole = folders.folder(kind)
    main(["export", str(whole), "--text-only", "--out", str(tmp_path / "text")])
    names = {path.name for path in (tmp_path / "text").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        "slimvlm_checkpoint.json",
    }
    assert "processor_class" not in (tmp_path / "text" / "tokenizer_config.json").read_text()
    words, processor = hf.AutoTokenizer.from_pretrained(tmp_path / "text"), folders.processor(kind)
    vocab = processor.tokenizer.get_vocab()
    assert {word: words.get_vocab()[word] for word in vocab} == vocab
    turns = [folders.turn("user", "What is shown?"), folders.turn("assistant", "It is red.")]
    for asked in (turns, turns[:1]):
        plain = [{**turn, "content": turn["content"][0]["text"]} for turn in asked]
        expected = chat.render(processor, asked, generate=len(asked) == 1)
        for given in (plain, asked):
            found = words.apply_chat_template(
                given, tokenize=False, add_generation_prompt=len(asked) == 1
            )
            assert found == expected
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    ids = {"input_ids": words(expected, return_tensors="pt").input_ids}
    again, _ = load(whole)
    assert torch.equal(logits(model, ids), logits(again, ids))
    assert model.generation_config.suppress_tokens == again.generation_config.suppress_tokens
    card = ModelCard.load(tmp_path / "text" / "README.md")
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags[-1] == "text-only"
    assert card.text.strip().splitlines()[0].endswith(", text only")
    assert "AutoModelForCausalLM.from_pretrained(folder)" in card.text
    assert "video tokens have no meaning" in card.text


@pytest.mark.slow
def test_a_run_folder_gives_a_text_model_of_the_original(tmp_path):
    model, processor = load(folders.folder("llava"))
    shape = read_anatomy(model)
    prune_(model, plan := make_plan(shape, random_scores(shape), 0.4, "both"))
    model.config._name_or_path = "some/original"
    save(model, processor, tmp_path / "run" / "checkpoint", plan)
    export_text(tmp_path / "run", tmp_path / "text")
    alone = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    inputs = {**texts(), "attention_mask": torch.ones(2, 24)}
    assert torch.equal(logits(alone, inputs), logits(model, inputs))
    assert Plan.load(tmp_path / "text" / PLAN_FILE) == plan
    card = ModelCard.load(tmp_path / "text" / "README.md")
    assert card.data.base_model == "some/original"
    assert {"pruned", "text-only"} <= set(card.data.tags)
    assert "the language model alone: it cannot see images" in card.text


@pytest.mark.usefixtures("code_cache")
@pytest.mark.parametrize(
    "name", tiered(["llava-phi", "qwen2_5_vl"], lambda name: name == "llava-phi")
)
def test_layers_of_different_widths_keep_them(name, tmp_path):
    model = tiny.build(name)
    shape = read_anatomy(model)
    whole = plan_by_hand(shape)
    groups = tuple(kept[:-1] if index else kept for index, kept in enumerate(whole.kv_groups))
    prune_(model, plan := Plan(shape, whole.layers, groups, whole.neurons, axis="width"))
    assert plan.file_format == "uneven"
    save(model, None, tmp_path / "whole", plan)
    export_text(tmp_path / "whole", tmp_path / "text")
    alone = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "text", trust_remote_code=True)
    assert torch.equal(logits(alone, texts()), logits(model, texts()))
    assert "trust_remote_code=True" in (tmp_path / "text" / "README.md").read_text()


def test_one_copy_of_the_weights_is_in_memory_when_the_folder_is_read_back(tmp_path, monkeypatch):
    loaded = []
    honest_load, honest = models.load, saving.read_back

    def kept(*words, **how):
        loaded.append(honest_load(*words, **how))
        return loaded[0]

    monkeypatch.setattr(models, "load", kept)

    def read_back(folder, text):
        places = {p.device.type for each in (loaded[0][0], text) for p in each.parameters()}
        assert places == {"meta"}
        return honest(folder, text)

    monkeypatch.setattr(saving, "read_back", read_back)
    export_text(folders.folder("llava"), tmp_path / "text")
    assert (tmp_path / "text").is_dir()


def test_other_logits_leave_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(text_only, "STAND_INS", {"qwen3_vl_moe_text": ("qwen3_moe", {})})
    _, folder = written("qwen3_vl_moe", tmp_path)
    with pytest.raises(ReloadError, match="other logits"):
        export_text(folder, tmp_path / "text")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_refusals_take_one_line(tmp_path):
    out = ("--text-only", "--out", tmp_path / "out")
    assert "'llama' is a text model already" in refused("export", folders.folder("text"), *out)
    folder = folders.copied("llava", tmp_path / "quantised")
    folders.edit_json(folder / "config.json", lambda c: c.update(quantization_config={"bits": 4}))
    assert "its weights are quantised" in refused("export", folder, *out)
    folder = folders.copied("llava", tmp_path / "pictures")
    template = "{% for turn in messages %}{{ turn.content[0].no.text }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    assert "chat template" in refused("export", folder, *out)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "exists" in refused("export", folders.folder("llava"), *out)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"mine"}


def test_engines_are_told_about_the_text_model(capsys):
    main(["export", str(folders.folder("qwen2_5_vl")), "--text-only", "--check", "vllm", "--json"])
    assert {row["level"] for row in json.loads(capsys.readouterr().out)} <= {"ok", "warn"}
