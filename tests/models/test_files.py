"""Models as users have them: adapters, revisions of a hub id, and what the hub refuses."""

import copy
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from huggingface_hub import errors as hub
from huggingface_hub import metadata_load
from safetensors.torch import load_file, save_file

import slimvlm as sv
from slimvlm.core.errors import ConfigError, SlimError
from slimvlm.core.options import LoadConfig
from slimvlm.core.progress import silent
from slimvlm.models.files import split_revision
from slimvlm.models.load import check_models, folder_of, load_config, resolve
from slimvlm.pruning.save import is_hub_id
from slimvlm.scoring.layerwise import open_checkpoint
from tests import tiny_folder as folders
from tests.handmade import logits
from tests.tiers import tiered
from tests.tolerances import FORWARD, assert_close

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TEXT = {"input_ids": torch.tensor([[5, 9, 30, 31, 77]])}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMVLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_adapter(kind, out, **options):
    """A random adapter of a tiny model; returns what PEFT merges."""
    model, _ = sv.load(folders.folder(kind))
    how = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], **options}
    trained = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(init_lora_weights=False, **how)
    )
    for name, parameter in trained.named_parameters():
        if "modules_to_save" in name:
            parameter.data += torch.randn_like(parameter) / 10
    trained.save_pretrained(out, save_embedding_layers=False)
    return trained.merge_and_unload().eval()


@pytest.mark.parametrize(
    ("kind", "options"),
    tiered(
        [
            ("text", {}),
            ("text", {"use_rslora": True, "rank_pattern": {"down_proj": 2}}),
            ("llava", {"modules_to_save": ["linear_1"]}),
            ("qwen2_5_vl", {}),
        ],
        lambda _, options: "r" in "".join(options),
    ),
)
def test_a_merged_adapter_says_what_peft_s_own_merge_says(kind, options, tmp_path, capsys):
    expected = write_adapter(kind, tmp_path / "adapter", **options)
    model, words = sv.load(tmp_path / "adapter")
    assert words is not None
    assert_close(logits(model, TEXT), logits(expected, TEXT), FORWARD)
    plain, _ = sv.load(folders.folder(kind))
    assert float((logits(plain, TEXT) - logits(model, TEXT)).abs().max()) > 1e-3
    said = [line for line in capsys.readouterr().err.splitlines() if "merged" in line]
    assert len(said) == 1  # however often it is used
    assert str(tmp_path / "adapter") in said[0]
    assert str(folders.folder(kind)) in said[0]
    by_layer = open_checkpoint(tmp_path / "adapter")
    for name, value in expected.state_dict().items():
        assert_close(by_layer.read(name), value, FORWARD)


def test_a_changed_adapter_and_its_tokenizer_are_read_anew(tmp_path):
    write_adapter("text", tmp_path / "adapter")
    first = resolve(tmp_path / "adapter")
    assert resolve(tmp_path / "adapter") == first
    words = copy.deepcopy(folders.processor("text"))
    words.chat_template = "{{ 'changed' }}"
    words.save_pretrained(tmp_path / "adapter")
    second = resolve(tmp_path / "adapter")
    assert second != first
    assert sv.load(tmp_path / "adapter")[1].chat_template == "{{ 'changed' }}"
    assert not (Path(second) / ADAPTER).exists()


def of_config(**fields):
    return lambda folder: folders.edit_json(folder / ADAPTER, lambda v: v.update(fields))


def of_weights(edit):
    def change(folder):
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS)

    return change


def renamed(old, new):
    return lambda tensors: tensors.update(
        {k.replace(old, new, 1): tensors.pop(k) for k in list(tensors) if old in k}
    )


def widened(tensors):
    key = next(key for key in tensors if "lora_B" in key)
    tensors[key] = torch.ones(len(tensors[key]) + 1, tensors[key].shape[1])


def not_finite(tensors):
    tensors[next(iter(tensors))].fill_(torch.inf)


def nested(folder):
    shutil.copytree(folder, folder.parent / "other")
    of_config(base_model_name_or_path=str(folder.parent / "other"))(folder)


FIELDS = yaml.safe_load(Path(__file__).with_name("adapters.yaml").read_text())
SPOILED = {
    **{name: (of_config(**fields), told) for name, (fields, told) in FIELDS.items()},
    "the base is an adapter": (nested, "base_model_name_or_path .*other"),
    "the base is above": (of_config(base_model_name_or_path=".."), r"no config\.json"),
    "a pickle": (
        lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
        "'adapter_model.bin'",
    ),
    "other weights": (
        lambda folder: save_file({"a": torch.ones(1)}, folder / "model.safetensors"),
        "'model.safetensors'",
    ),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    "half a pair": (of_weights(renamed("lora_B", "lora_C")), "lora_B"),
    "an unknown layer": (of_weights(renamed("layers.0", "layers.99")), r"layers\.99.*no weight"),
    "another shape": (of_weights(widened), "becomes"),
    "not a number": (of_weights(not_finite), "NaN or infinity"),
    "a link": (lambda folder: (folder / "x").symlink_to("/etc/passwd"), "leads out"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_strange_adapter_is_refused_in_one_line(name, tmp_path, cache):
    spoil, named = SPOILED[name]
    write_adapter("text", tmp_path / "adapter")
    spoil(tmp_path / "adapter")
    with pytest.raises(SlimError, match=named) as caught:
        sv.load(tmp_path / "adapter")
    assert "\n" not in str(caught.value)
    assert not list(cache.glob("merged/*"))


def test_a_tied_or_quantised_base_is_refused(tmp_path):
    base = folders.copied("text", tmp_path / "base")
    write_adapter("text", tmp_path / "adapter", target_modules=["lm_head"])
    of_config(base_model_name_or_path=str(base))(tmp_path / "adapter")
    folders.edit_json(base / "config.json", lambda v: v.update(tie_word_embeddings=True))
    tensors = load_file(base / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"ties or stacks 'lm_head\.weight'"):
        sv.load(tmp_path / "adapter")
    bits = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folders.edit_json(base / "config.json", lambda v: v.update(quantization_config=bits))
    with pytest.raises(ConfigError, match="quantised, so it cannot be merged with an adapter"):
        sv.load(tmp_path / "adapter")


# The hub.


REVISIONS = {"v1.0": "1" * 40, "refs/pr/3": "2" * 40}
"""The branches, tags and requests of a model on the hub, with their commits."""
RESPONSE = SimpleNamespace(headers={}, request=None)


@pytest.fixture
def reached(tmp_path, monkeypatch):
    """The hub's cache with two commits of one model, of which the second says other things."""
    repository = tmp_path / "hub" / "models--own--tiny"
    for number, (revision, commit) in enumerate(REVISIONS.items()):
        folder = folders.copied("text", repository / "snapshots" / commit)
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] *= 1 + number
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (repository / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)

    def snapshot(name, revision="main"):
        assert name == "own/tiny"
        return str(repository / "snapshots" / REVISIONS.get(revision, revision))

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("slimvlm.models.load.snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    return repository / "snapshots"


@pytest.mark.parametrize("revision", [*REVISIONS, *REVISIONS.values()])
def test_every_file_of_a_hub_id_is_read_at_its_revision(revision, reached):
    name, folder = f"own/tiny@{revision}", reached / REVISIONS.get(revision, revision)
    model, words = sv.load(name)
    expected, _ = sv.load(folder)
    assert torch.equal(logits(model, TEXT), logits(expected, TEXT))
    assert words.chat_template == folders.processor("text").chat_template
    assert model.config._name_or_path == load_config(name)._name_or_path == name
    assert folder_of(name) == folder
    assert sv.anatomy(name) == sv.anatomy(folder)
    for other in ("own/tiny", "own/tiny@main", "own/tiny@v2"):
        with pytest.raises(ConfigError, match=f"model '{other}': .*the hub cannot be reached"):
            load_config(other)


def test_a_run_is_of_one_revision_and_its_card_names_the_model(reached, tmp_path, monkeypatch):
    out, how = tmp_path / "run", {"axis": "width", "criterion": "magnitude", "repair": "none"}
    monkeypatch.setattr("slimvlm.runs.compress.finish", lambda run, plan: None)  # as if stopped
    sv.compress("own/tiny@v1.0", ratio=0.3, out=out, say=silent, **how)
    assert metadata_load(out / "checkpoint" / "README.md")["base_model"] == "own/tiny"
    assert yaml.safe_load((out / "run.yaml").read_text())["model"] == "own/tiny@v1.0"
    with pytest.raises(ConfigError, match="with another model"):
        sv.compress("own/tiny@refs/pr/3", ratio=0.3, out=out, say=silent, **how)


def test_a_folder_with_an_at_sign_stays_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders.copied("text", tmp_path / "own" / "tiny@v1")
    assert split_revision("own/tiny@v1") == ("own/tiny@v1", {})
    assert resolve("own/tiny@v1") == "own/tiny@v1"
    assert not is_hub_id("own/tiny@v1")
    assert is_hub_id("other/tiny@v1")
    assert is_hub_id("gpt2")
    assert not any(map(is_hub_id, ("", ".", "/no/such/folder")))
    for name in ("./here@v1", "/there/x@v1", "word@v1", "own/else@v1"):
        with pytest.raises(ConfigError, match="no such folder"):
            resolve(name)
    for name in ("a/b@", "a/b@../c", "a/b@x y", "a/b@-x"):
        with pytest.raises(ConfigError, match="model 'a/b': revision"):
            load_config(name)


def test_the_base_of_an_adapter_may_be_a_revision_on_the_hub(reached, tmp_path):
    expected = write_adapter("text", tmp_path / "adapter")
    of_config(base_model_name_or_path="own/tiny", revision="v1.0")(tmp_path / "adapter")
    model, _ = sv.load(tmp_path / "adapter")
    assert_close(logits(model, TEXT), logits(expected, TEXT), FORWARD)
    folder = resolve(tmp_path / "adapter")
    assert metadata_load(Path(folder) / "README.md")["base_model"] == "own/tiny"
    write_adapter("text", tmp_path / "more")
    shutil.copytree(tmp_path / "more", reached / REVISIONS["refs/pr/3"], dirs_exist_ok=True)
    with pytest.raises(ConfigError, match="makes it an adapter; give the folder of hf download"):
        load_config("own/tiny@refs/pr/3")


REFUSED = {
    hub.GatedRepoError: "gated: accept its licence .*hf auth login, or HF_TOKEN",
    hub.RepositoryNotFoundError: "not on the hub; if private, give your token",
    hub.RevisionNotFoundError: "no such branch, tag or commit",
    hub.LocalEntryNotFoundError: "the hub cannot be reached",
    hub.OfflineModeIsEnabled: "the hub cannot be reached",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_hub_refuses_is_told_in_one_line_with_what_to_do(kind, reached, monkeypatch):
    def refuse(*_, **__):
        needs = issubclass(kind, hub.HfHubHTTPError)
        raise kind("401 Client Error\nand\nmore", **({"response": RESPONSE} if needs else {}))

    monkeypatch.setattr(transformers.utils.hub, "hf_hub_download", refuse)
    monkeypatch.setattr("slimvlm.models.load.snapshot_download", refuse)
    for name in ("own/tiny", "own/tiny@v1"):
        for read in (sv.load, sv.anatomy, folder_of, lambda n: check_models(LoadConfig(), n)):
            with pytest.raises(ConfigError, match=REFUSED[kind]) as caught:
                read(name)
            assert str(caught.value).startswith(f"model {name!r}: ")
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 200


@pytest.mark.parametrize("trusts", [False, True])
def test_a_family_with_code_of_its_own_is_refused_with_what_to_do(trusts, tmp_path):
    folder = folders.copied("text", tmp_path / "model")
    code = {"AutoConfig": "its.Config", "AutoModel": "its.Model"}
    folders.edit_json(
        folder / "config.json", lambda v: v.update(model_type="its_own", auto_map=code)
    )
    (folder / "its.py").write_text("raise SystemExit('code was run')\n")
    told = r"model_type 'its_own' needs trust_remote_code.*-hf.*slimvlm convert"
    with pytest.raises(SlimError, match=told) as caught:
        sv.load(folder, trust_remote_code=trusts)
    assert re.fullmatch(r"[^\n]{,300}", str(caught.value))
