"""A written checkpoint is an ordinary one: plain transformers reads the same model back."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers as hf
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from slimvlm.core.errors import ConfigError, ReloadError, SlimError, UnsupportedModelError
from slimvlm.data import chat
from slimvlm.data.samples import Question
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.load import anatomy, load, resolve
from slimvlm.planning.make import make_plan
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import prune_
from slimvlm.pruning.save import CARD_FILE, PLAN_FILE, CardFacts, is_hub_id, save
from tests import tiny
from tests import tiny_folder as folders
from tests.handmade import in_python, logits, plan_by_hand, random_scores
from tests.tiny_folder import KINDS, SEEING, picture

READ_BACK = """
import json, sys
import torch, transformers
from PIL import Image
from safetensors.torch import load_file, save_file
def read_back(work, prompt):
    folder = work + "/out"
    sees = "vision_config" in json.load(open(folder + "/config.json"))
    auto = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder).eval()
    reader = transformers.AutoProcessor if sees else transformers.AutoTokenizer
    processor = reader.from_pretrained(folder)
    if sees:
        pictures = [Image.open(work + "/picture.png").convert("RGB")]
        inputs = dict(processor(text=[prompt], images=pictures, return_tensors="pt"))
    else:
        inputs = dict(processor([prompt], return_tensors="pt", add_special_tokens=False))
    with torch.no_grad():
        logits = model(**inputs).logits
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    save_file({"logits": logits, "ids": ids, **inputs}, work + "/found.safetensors")
    new = ids[:, inputs["input_ids"].shape[1]:]
    return [type(model).__name__, processor.batch_decode(new, skip_special_tokens=True)[0]]

found = [read_back(*request) for request in json.loads(sys.argv[1])]
assert not any(name.split(".")[0] == "slimvlm" for name in sys.modules)
print(json.dumps(found))
"""


def pruned(kind):
    model, processor = load(folders.folder(kind))
    shape = read_anatomy(model)
    plan = make_plan(shape, random_scores(shape), 0.4, "both")
    prune_(model, plan)
    return model, processor, plan


def asked(kind, work):
    pictures = (work / "picture.png",) if kind in SEEING else ()
    return Question("q", "Which colour is shown?", ("red",), pictures)


@pytest.fixture(scope="module")
def read_back(tmp_path_factory):
    """Every kind, pruned and saved, and what another process found in the folder."""
    works = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    requests = []
    for kind, work in works.items():
        model, processor, plan = pruned(kind)
        save(model, processor, work / "out", plan)
        picture().save(work / "picture.png")
        messages = chat.question_messages(asked(kind, work))
        requests.append((str(work), chat.render(processor, messages, generate=True)))
    found = json.loads(in_python(READ_BACK, json.dumps(requests), cwd=works["text"]))
    return {k: (works[k], values) for k, values in zip(works, found, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_reads_the_same_model(kind, read_back):
    work, (class_name, text) = read_back[kind]
    model, processor, plan = pruned(kind)
    found = load_file(work / "found.safetensors")
    inputs = chat.encode_questions(processor, [asked(kind, work)])
    assert torch.equal(found["input_ids"], inputs["input_ids"])
    with torch.no_grad():
        assert torch.equal(found["logits"], logits(model, inputs))
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(found["ids"], ids)
    new = ids[:, inputs["input_ids"].shape[1] :]
    assert text == chat.tokenizer_of(processor).batch_decode(new, skip_special_tokens=True)[0]
    assert class_name == type(model).__name__
    assert Plan.load(work / "out" / PLAN_FILE) == plan


@pytest.mark.usefixtures("code_cache")
@pytest.mark.parametrize("is_uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_written_and_read(kind, is_uneven, tmp_path):
    model, processor, plan = uneven(kind) if is_uneven else pruned(kind)
    save(model, processor, tmp_path / "out", plan)
    again, its_processor = load(tmp_path / "out")
    assert type(its_processor) is type(processor)
    assert read_anatomy(again) == plan.after == anatomy(tmp_path / "out")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert not again.training
    files = list((tmp_path / "out").iterdir())
    code = [path.name for path in files if path.suffix == ".py"]
    assert code == ["modeling_pruned.py"] * is_uneven
    others = {path.suffix for path in files} - {".py"}
    assert others <= {".json", ".safetensors", ".jinja", ".txt", ".md"}


def test_half_precision_stays_half_also_without_a_processor(tmp_path):
    model, _ = load(folders.folder("llava"), dtype="bfloat16")
    save(model, None, tmp_path / "out")
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


@pytest.mark.parametrize("kind", [*SPOILT, "config"])
def test_the_reload_check_catches_what_is_spoilt(kind, tmp_path, monkeypatch):
    def change(folder):
        if kind == "config":
            values = json.loads((folder / "config.json").read_text())
            values["text_config"]["num_hidden_layers"] += 1
            (folder / "config.json").write_text(json.dumps(values))
            return
        file = folder / "model.safetensors"
        weights = {name: value.clone() for name, value in load_file(file).items()}
        SPOILT[kind](weights, next(n for n in weights if n.endswith(MATRIX)))
        save_file(weights, file, {"format": "pt"})

    model, processor, plan = pruned("llava")
    spoil_(monkeypatch, hf.PreTrainedModel, change)
    model.train()
    with pytest.raises(ReloadError):
        save(model, processor, tmp_path / "out", plan)
    assert list(tmp_path.iterdir()) == []
    assert model.training


def test_an_existing_checkpoint_stays_and_the_model_is_as_it_was(tmp_path):
    model, processor, plan = pruned("text")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("")
    with pytest.raises(ConfigError, match="--force"):
        save(model, processor, out, plan)
    with pytest.raises(ConfigError, match="did not write"):
        save(model, processor, out, plan, force=True)
    assert [path.name for path in out.iterdir()] == ["mine"]
    (out / "mine").unlink()
    save(model.train(), processor, out, plan, force=True)
    assert model.training
    (out / "mine").write_text("")  # beside what slimvlm wrote it goes, too
    save(model, processor, out, plan, force=True)
    assert not (out / "mine").exists()
    assert (out / "config.json").exists()


# Layers of different widths: the battery over all families is in tests/contract/test_uneven.py.
def uneven(kind):
    model, processor = load(folders.folder(kind))
    plan = plan_by_hand(read_anatomy(model))
    kept = (tuple(range(40)), *plan.neurons[1:])
    plan = Plan(plan.before, plan.layers, plan.kv_groups, kept, axis="width")
    prune_(model, plan)
    return model, processor, plan


@pytest.mark.usefixtures("code_cache")
@pytest.mark.parametrize("change", ["code", "widths", "auto_map"])
def test_the_reload_check_catches_spoilt_uneven_folders(change, tmp_path, monkeypatch):
    def spoils(folder):
        code, config = folder / "modeling_pruned.py", folder / "config.json"
        values = json.loads(config.read_text())
        if change == "code":
            code.write_text(code.read_text() + "\n")
        elif change == "widths":
            values["text_config"]["pruned_layers"][1]["intermediate_size"] -= 1
        else:
            values["auto_map"]["AutoModelForImageTextToText"] = "modeling_pruned.PrunedLlavaModel"
        config.write_text(json.dumps(values))

    model, processor, plan = uneven("llava")
    spoil_(monkeypatch, type(model), spoils)
    with pytest.raises(ReloadError):
        save(model, processor, tmp_path / "out", plan)
    assert not (tmp_path / "out").exists()


# Loading: what cannot be loaded is named in one line.
def test_a_missing_folder_and_an_unknown_dtype_are_named(tmp_path, monkeypatch):
    for name in ("nowhere", "./nowhere/at/all", "/nowhere"):
        for read in (load, anatomy):
            with pytest.raises(ConfigError, match=rf"model '{name}': no such folder"):
                read(name)
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        resolve("runs/first")  # no hub id beside the folder
    assert resolve("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"
    with pytest.raises(ConfigError, match="dtype 'int3' must be one of: auto, float32"):
        load(folders.folder("text"), dtype="int3")


@pytest.mark.parametrize("read", [load, anatomy])
@pytest.mark.parametrize("text", [None, "bert", "{", "[]", "{}", '{"model_type": 3}', '"llava"'])
def test_a_config_that_cannot_be_read_is_named(text, read, tmp_path):
    error = SlimError
    message = "model"
    if text is None:
        error, message = ConfigError, r"has no config\.json"
    elif text == "bert":
        error, message = UnsupportedModelError, r"'bert' is not known.*llava"
        hf.BertConfig(hidden_size=16, num_attention_heads=2).save_pretrained(tmp_path)
    else:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(error, match=message):
        read(tmp_path)


def cut_off(file):
    file.write_bytes(file.read_bytes()[:1000])


def without_a_tensor(file):
    """transformers would fill it with random numbers and go on."""
    weights = load_file(file)
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, file, {"format": "pt"})


PICKLES = ("pytorch_model.bin", "consolidated.00.pth", "model.pt")
BROKEN = {
    "no weights": (Path.unlink, "weights cannot be read"),
    "cut off": (cut_off, "weights cannot be read"),
    "a tensor is missing": (without_a_tensor, r"layers\.1\.mlp\.down_proj"),
}


@pytest.mark.parametrize("case", [*BROKEN, *PICKLES])
def test_weights_that_cannot_be_loaded_are_named(case, tmp_path):
    pickled = rf"{re.escape(case)}' is a pickle.*slimvlm convert"
    spoil, message = BROKEN.get(case, (lambda file: file.rename(file.with_name(case)), pickled))
    out = folders.copied("text", tmp_path / "model")
    (out / case).write_bytes(b"would fail to load")  # beside safetensors it is not read
    load(out)
    spoil(out / "model.safetensors")
    with pytest.raises(SlimError if "tensor" in case else ConfigError, match=message):
        load(out)
    if case not in PICKLES:
        assert anatomy(out) == anatomy(folders.folder("text"))


@pytest.mark.parametrize("name", ["plan.json", "config.json"])
def test_a_run_folder_stands_for_its_checkpoint(name, tmp_path):
    """`compress` writes a config.json of its own beside the checkpoint."""
    folders.copied("text", tmp_path / "run" / "checkpoint")
    (tmp_path / "run" / name).write_text(json.dumps({"model": "x", "ratio": 0.3}))
    assert resolve(tmp_path / "run") == str(tmp_path / "run" / "checkpoint")


def test_an_anatomy_needs_no_weights(tmp_path):
    config = hf.AutoConfig.from_pretrained(folders.folder("llava"))
    config.save_pretrained(tmp_path)
    model, _ = load(folders.folder("llava"))
    assert anatomy(tmp_path) == anatomy(config) == anatomy(model) == read_anatomy(model)


# Model cards: what the hub reads, and what people read.


BASE = "---\nlicense: llama2\nbase_model: some/original\ntags: [x]\n---\n# Original\n"


@pytest.fixture(scope="module")
def carded(tmp_path_factory):
    """A pruned checkpoint whose original is a folder with a card of its own."""
    root = tmp_path_factory.mktemp("cards")
    original = root / "original"
    original.mkdir()
    (original / CARD_FILE).write_text(BASE)
    net = tiny.build("llava-llama")
    net.config._name_or_path = str(original)
    plan = plan_by_hand(anatomy(net), layers=(0, 2, 3))
    prune_(net, plan)
    said = {"command": "slimvlm compress x --out small", "training": "Then lora was trained."}
    found = {"results": "| task | score |", "scores": {"count": ("exact_match", 41.234)}}
    facts = CardFacts(base=str(original), name="small", **said, **found)
    save(net, None, root / "small", plan, facts=facts)
    return root / "small"


def test_a_card_has_the_hub_s_metadata_and_what_people_read(carded):
    data = ModelCard.load(carded / CARD_FILE).data.to_dict()
    assert data["base_model"] == "some/original"
    assert data["license"] == "llama2"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-text-to-text"
    assert {"slimvlm", "pruned"} <= set(data["tags"])
    (entry,) = data["model-index"]
    assert entry["name"] == "small"
    (found,) = entry["results"]
    assert found["dataset"]["name"] == "count"
    assert found["metrics"] == [{"type": "exact_match", "value": 41.23}]
    ModelCard.load(carded / CARD_FILE).data.to_yaml()
    text = (carded / CARD_FILE).read_text()
    plan = Plan.load(carded / "slimvlm_plan.json")
    for needed in (
        plan.summary(),
        f"{plan.after.total_params:,}",
        "slimvlm compress x --out small",
        "| task | score |",
        "Then lora was trained.",
        "AutoModelForImageTextToText.from_pretrained(folder)",
    ):
        assert needed in text
    assert str(carded.parent) not in text


def test_a_card_needs_neither_an_original_nor_facts_and_names_the_first_of_a_chain(
    tmp_path, monkeypatch, carded
):
    """A README in the folder where the command runs is not the original's card."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / CARD_FILE).write_text(BASE)
    net = tiny.build("llama")
    save(net, None, tmp_path / "out", Plan.everything(anatomy(net)))
    data = ModelCard.load(tmp_path / "out" / CARD_FILE).data.to_dict()
    assert not {"license", "base_model"} & set(data)
    assert "A smaller model:" in (tmp_path / "out" / CARD_FILE).read_text()
    net = tiny.build("llama")
    net.config._name_or_path = ""
    save(net, None, tmp_path / "plain")
    data = ModelCard.load(tmp_path / "plain" / CARD_FILE).data.to_dict()
    assert data["pipeline_tag"] == "text-generation"
    assert "base_model" not in data
    assert "model-index" not in data
    net = tiny.build("llava-llama")
    net.config._name_or_path = str(carded)
    save(net, None, tmp_path / "again")
    data = ModelCard.load(tmp_path / "again" / CARD_FILE).data.to_dict()
    assert (data["base_model"], data["license"]) == ("some/original", "llama2")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("owner/name", True), ("gpt2", True), ("", False), ("/no/such/folder", False), (".", False)],
)
def test_only_hub_ids_are_named_in_metadata(name, expected):
    assert is_hub_id(name) is expected
