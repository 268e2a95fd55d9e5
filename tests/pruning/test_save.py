"""A written checkpoint is an ordinary one: plain transformers reads the same model back."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from slimvlm.core.errors import ReloadError
from slimvlm.data import chat
from slimvlm.data.samples import Question
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.load import anatomy, load
from slimvlm.planning.make import make_plan
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import prune_
from slimvlm.pruning.save import CARD_FILE, PLAN_FILE, CardFacts, save, write_card
from tests import tiny
from tests import tiny_folder as folders
from tests.handmade import assert_equal, logits, plan_by_hand, random_scores
from tests.tiny_folder import KINDS, SEEING, picture


def pruned(kind):
    model, processor = load(folders.folder(kind))
    shape = read_anatomy(model)
    plan = make_plan(shape, random_scores(shape), 0.4, "both")
    prune_(model, plan)
    return model, processor, plan


def asked(kind, work):
    pictures = (work / "picture.png",) if kind in SEEING else ()
    return Question("q", "Which colour is shown?", ("red",), pictures)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_reads_the_same_model(kind, tmp_path):
    """In processes without slimvlm: `test_layout` and tests/contract/test_uneven.py."""
    (model, processor, plan), out = pruned(kind), tmp_path / "out"
    save(model, processor, out, plan)
    picture().save(tmp_path / "picture.png")
    sees = "vision_config" in json.loads((out / "config.json").read_text())
    auto = hf.AutoModelForImageTextToText if sees else hf.AutoModelForCausalLM
    plain = auto.from_pretrained(out).eval()
    reader = (hf.AutoProcessor if sees else hf.AutoTokenizer).from_pretrained(out)
    inputs, read = (chat.encode_questions(p, [asked(kind, tmp_path)]) for p in (processor, reader))
    assert_equal(read, inputs)
    assert torch.equal(logits(plain, inputs), logits(model, inputs))
    ids, its = (m.generate(**inputs, max_new_tokens=6, do_sample=False) for m in (model, plain))
    assert torch.equal(ids, its)
    assert type(plain) is type(model)
    assert Plan.load(out / PLAN_FILE) == plan
    again, its_processor = load(out)
    assert type(its_processor) is type(processor)
    assert not again.training
    assert read_anatomy(again) == plan.after == anatomy(out)
    assert_equal(again.state_dict(), model.state_dict())
    suffixes = {path.suffix for path in out.iterdir()}
    assert suffixes <= {".json", ".safetensors", ".jinja", ".txt", ".md"}


def test_half_precision_stays_half_also_without_a_processor(tmp_path):
    model, _ = load(folders.folder("llava"), dtype="bfloat16")
    save(model.train(), None, tmp_path / "out")
    assert model.training
    again, processor = load(tmp_path / "out")
    assert processor is None
    assert again.dtype == torch.bfloat16
    assert read_anatomy(again) == read_anatomy(model)
    assert load(tmp_path / "out", dtype="float32")[0].dtype == torch.float32


# The reload check must be able to fail.
def spoil_(monkeypatch, owner, change):
    """Change what `save_pretrained` has written."""
    honest = owner.save_pretrained

    def spoils(self, folder, *args, **kwargs):
        honest(self, folder, *args, **kwargs)
        change(Path(folder))

    monkeypatch.setattr(owner, "save_pretrained", spoils)


MATRIX = "layers.1.mlp.down_proj.weight"
SPOILT = {
    "perturbed": lambda weights, name: weights[name][0].add_(3.0),
    "missing": lambda weights, name: weights.pop(name),
    "extra": lambda weights, name: weights.update({"model.stray.weight": torch.zeros(2)}),
    "reshaped": lambda weights, name: weights.update({name: weights[name][:, :-1].contiguous()}),
    "nan": lambda weights, name: weights[name][0, 0].fill_(float("nan")),
    "projector": lambda weights, name: next(
        value for key, value in weights.items() if key.endswith("linear_1.weight")
    ).add_(1.0),
}


# Layers of different widths: the battery over all families is in tests/contract/test_uneven.py.
def uneven(kind):
    model, processor = load(folders.folder(kind))
    plan = plan_by_hand(read_anatomy(model))
    kept = (tuple(range(40)), *plan.neurons[1:])
    plan = Plan(plan.before, plan.layers, plan.kv_groups, kept, axis="width")
    prune_(model, plan)
    return model, processor, plan


@pytest.mark.usefixtures("code_cache")
@pytest.mark.parametrize("kind", [*SPOILT, "config", "code", "widths", "auto_map"])
def test_the_reload_check_catches_what_is_spoilt(kind, tmp_path, monkeypatch):
    def change(folder):
        code, config = folder / "modeling_pruned.py", folder / "config.json"
        values = json.loads(config.read_text())
        if kind == "config":
            values["text_config"]["num_hidden_layers"] += 1
        elif kind == "code":
            code.write_text(code.read_text() + "\n")
        elif kind == "widths":
            values["text_config"]["per_layer_config"]["0"]["intermediate_size"] -= 1
        elif kind == "auto_map":
            values["auto_map"]["AutoModelForImageTextToText"] = "modeling_pruned.PrunedLlavaModel"
        else:
            file = folder / "model.safetensors"
            weights = {name: value.clone() for name, value in load_file(file).items()}
            SPOILT[kind](weights, next(n for n in weights if n.endswith(MATRIX)))
            save_file(weights, file, {"format": "pt"})
        config.write_text(json.dumps(values))

    make = uneven if kind in ("code", "widths", "auto_map") else pruned
    model, processor, plan = make("llava")
    spoil_(monkeypatch, type(model) if make is uneven else hf.PreTrainedModel, change)
    model.train()
    with pytest.raises(ReloadError):
        save(model, processor, tmp_path / "out", plan)
    assert list(tmp_path.iterdir()) == []
    assert model.training


# Model cards: metadata that the hub reads, and what people read first.


TABLE = yaml.safe_load(Path(__file__).with_name("cards.yaml").read_text())
BASE = "---\nlicense: llama2\nbase_model: some/original\ndatasets: [its/own]\n---\n# Original\n"


def metadata(folder):
    """What the hub's own library reads from a folder's card."""
    data = ModelCard.load(folder / CARD_FILE).data
    assert yaml.safe_load(data.to_yaml()) == data.to_dict()
    return data.to_dict()


def written(folder, family="llava-llama", base=None, plan=None, **facts):
    """Metadata and text of the card for a tiny model, whose original has the card ``base``."""
    original = folder / "original"
    original.mkdir(exist_ok=True)
    if base is not None:
        (original / CARD_FILE).write_text(base, encoding="utf-8")
    known = {"base": str(original), "name": "small", **facts}
    write_card(folder, tiny.build(family), plan, CardFacts(**known))
    return metadata(folder), (folder / CARD_FILE).read_text()


@pytest.fixture(scope="module")
def carded(tmp_path_factory):
    """A pruned checkpoint whose original is a folder with a card of its own."""
    root = tmp_path_factory.mktemp("cards")
    original = root / "original"
    original.mkdir()
    (original / CARD_FILE).write_text(BASE)
    (original / "LICENSE").write_text("All rights.")
    (root / "secret").write_text("a key")
    (original / "NOTICE").symlink_to(root / "secret")
    net = tiny.build("llava-llama")
    net.config._name_or_path = str(original)
    plan = plan_by_hand(anatomy(net), layers=(0, 2, 3))
    prune_(net, plan)
    said = {"command": f"slimvlm compress {original} --data some/set --tasks {root},b --out small"}
    said |= {"training": ("lora", "sft+hidden", 1234), "data": "some/set"}
    found = {"results": "| task | score |", "scores": {"count": ("exact_match", 41.234)}}
    found |= {"held_out": "| 4 samples |", "share": {"percent": 92.34, "low": 90.0, "high": 94.5}}
    kinds = {kind: {"retention": {**found["share"], "floor": 51.23}} for kind in ("chosen", "free")}
    del kinds["free"]["retention"]  # of which the original has none right
    facts = CardFacts(base=str(original), name="small", kinds=kinds, **said, **found)
    save(net, None, root / "small", plan, facts=facts)
    return root / "small"


def test_a_card_has_the_hub_s_metadata_and_what_people_read(carded):
    data = metadata(carded)
    assert (data["base_model"], data["base_model_relation"]) == ("some/original", "finetune")
    assert data["license"] == "llama2"
    assert data["datasets"] == ["some/set"]
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["tags"] == ["slimvlm", "pruned", "compressed", "llava"]
    (entry,) = data["model-index"]
    assert entry["name"] == "small"
    (found,) = entry["results"]
    assert found["dataset"]["name"] == "count"
    assert found["metrics"] == [{"type": "exact_match", "value": 41.23}]
    text = (carded / CARD_FILE).read_text()
    plan = Plan.load(carded / "slimvlm_plan.json")
    for needed in (
        plan.summary(),
        f"{plan.after.total_params:,}",
        f"slimvlm compress original --data some/set --tasks {carded.parent.name},b --out small",
        "| task | score |",
        "| layers | 4 | 3 |",
        "92.3 % [90.0, 94.5] of the original's",
        "On multiple-choice questions it retains 92.3 % [90.0, 94.5]",
        "would retain 51.2 %",
        "trained on 1,234 samples (`lora`, loss `sft+hidden`)",
        "AutoModelForImageTextToText.from_pretrained(folder)",
    ):
        assert needed in text
    assert str(carded.parent) not in text
    assert not re.search(r"\n{3}| \n|\|\n\n\||\{\{|None", text)
    heads = ["What was removed", "Retained quality", "How to load it", "How to serve it"]
    heads += ["Results", "How it was made"]
    assert re.findall("^## (.*)", text, re.MULTILINE) == heads
    kept = text.split("## Retained quality")[1].split("\n## ")[0]
    assert "| 4 samples |" in kept
    assert "92.3 %" in kept
    assert "open-ended" not in kept


def test_a_license_goes_along_and_a_second_pruning_counts_from_the_original(carded, tmp_path):
    first = Plan.load(carded / PLAN_FILE)
    net = load(str(carded))[0]
    again = plan_by_hand(anatomy(net), layers=(0, 2))
    prune_(net, again)
    save(net, None, tmp_path / "again", again)
    facts = CardFacts(base=str(tmp_path / "again"), name="same")
    save(net, None, tmp_path / "same", again, facts=facts)
    for name in ("again", "same"):
        text = (tmp_path / name / CARD_FILE).read_text()
        counts = f"{first.before.total_params:,} | {again.after.total_params:,}"
        assert f"| all parameters | {counts} |" in text
        assert "| layers | 4 | 2 |" in text
        assert "It is the last of several" in text
        assert f"instead of {first.before.total_params / 1e6:,.1f} M" in text
        assert (tmp_path / name / "LICENSE").read_text() == "All rights."
        assert not (tmp_path / name / "NOTICE").exists()  # a link that leads out
    base = BASE.replace("license: llama2\n", "")
    data, text = written(tmp_path, base=base, training=("full", "sft", 16))
    assert "A fine-tuned [some/original]" in text
    assert "license was not stated or could not be read" in text
    assert data["tags"] == ["slimvlm", "llava"]
    data, _ = written(tmp_path, base=f"---\n{yaml.safe_dump(TABLE['license'])}\n---\n")
    assert TABLE["license"].items() <= data.items()


def test_a_card_needs_neither_an_original_nor_facts_and_names_the_first_of_a_chain(
    tmp_path, monkeypatch, carded
):
    """A README in the folder where the command runs is not the original's card."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / CARD_FILE).write_text(BASE)
    net = tiny.build("llama")
    save(net, None, tmp_path / "out", Plan.everything(anatomy(net)))
    data = metadata(tmp_path / "out")
    assert not {"license", "base_model", "base_model_relation", "datasets"} & set(data)
    text = (tmp_path / "out" / CARD_FILE).read_text()
    assert "A smaller model:" in text
    assert "This was not measured." in text
    net = tiny.build("llama")
    net.config._name_or_path = ""
    save(net, None, tmp_path / "plain")
    data = metadata(tmp_path / "plain")
    assert data["pipeline_tag"] == "text-generation"
    assert "base_model" not in data
    assert "model-index" not in data
    assert "pruned" not in data["tags"]
    net = tiny.build("llava-llama")
    net.config._name_or_path = str(carded)
    save(net, None, tmp_path / "again")
    data = metadata(tmp_path / "again")
    assert (data["base_model"], data["license"]) == ("some/original", "llama2")
    assert data["datasets"] == ["some/set"], "what slimvlm learnt from goes on, other data do not"


@pytest.mark.parametrize("hostile", TABLE["hostile"])
def test_words_of_an_original_s_card_are_names_or_nothing(hostile, tmp_path):
    fields = ("license_link", "base_model", "datasets", "tags", "language", "thumbnail")
    values = dict.fromkeys(fields, hostile) | {"license": "mit"}
    values |= {"tags": ["slimvlm", hostile], "datasets": ["good/data", hostile]}
    data, text = written(tmp_path, base=f"---\n{yaml.safe_dump(values)}\n---\n")
    assert data["license"] == "mit"
    assert not set(fields) - {"tags"} & set(data)
    assert "vil" not in text
    assert "alert" not in text


def test_only_hub_ids_are_data_sets_of_a_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "mix").touch()
    local = ("demo", "mix.json", "/secret/mix.json", "secret/mix", "./secret/mix", "~/secret/mix")
    for name in (*local, "a/b/c", "a/b c", None):
        data, text = written(tmp_path, data=name)
        assert "datasets" not in data
        assert "secret" not in text
    assert written(tmp_path, data="owner/mix-1.0")[0]["datasets"] == ["owner/mix-1.0"]


def test_the_table_of_what_was_removed_is_one_table(tmp_path):
    model = tiny.build("qwen3_vl_moe")
    shape = read_anatomy(model)
    plan = plan_by_hand(shape, layers=range(shape.num_layers))
    experts = tuple(tuple(range(shape.experts_per_token)) for _ in plan.layers)
    criteria = {"layer": "obs", "neuron": "[evil](x)"}  # of which one is a known name
    few = tuple(range(shape.vocab_size - 5))
    plan = replace(plan, experts=experts, tokens=few, criteria=criteria)
    _, text = written(tmp_path, "qwen3_vl_moe", plan=plan)
    table = text.split("## What was removed")[1].split("## ")[0].strip().splitlines()
    names = ["", "---", "all parameters", "backbone parameters", "layers", "KV heads of a layer"]
    names += ["neurons of a layer", "experts of a layer", "tokens"]
    assert [line.split("|")[1].strip() for line in table] == names
    assert table[-1] == f"| tokens | {shape.vocab_size} | {shape.vocab_size - 5} |"
    assert "scored by obs." in text
    assert "evil" not in text


@pytest.mark.parametrize(("family", "facts", "levels"), TABLE["engines"])
def test_a_command_to_serve_is_given_only_where_such_a_model_ran(family, facts, levels, tmp_path):
    _, text = written(tmp_path, family, **{name: tuple(value) for name, value in facts.items()})
    part = text.split("## How to serve it")[1].split("\n## ")[0]
    found = dict(re.findall(r"^- \*\*([\w.]+): (\w+)", part, re.MULTILINE))
    assert found.items() >= levels.items()
    assert ("vllm serve" in part) == (found.get("vLLM") == "yes")
    assert ("llama-server" in part) == (found["llama.cpp"] == "yes")
    assert "sglang.launch" not in part


@pytest.mark.parametrize("files", [("a.gguf",), ("a.gguf", "mmproj-a.gguf")])
def test_a_card_of_gguf_files_says_what_they_hold(files, tmp_path):
    data, text = written(tmp_path, base=BASE, format=("q4_k_m",), files=files)
    sees = len(files) == 2
    assert data["pipeline_tag"] == ("image-text-to-text" if sees else "text-generation")
    assert (data["library_name"], data["base_model_relation"]) == ("gguf", "quantized")
    assert {"gguf", "q4_k_m"} <= set(data["tags"])
    assert ("--mmproj mmproj-a.gguf" in text) == sees
    assert ("it cannot see images" in text) != sees
    assert "from_pretrained" not in text
