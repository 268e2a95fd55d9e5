"""Models on the hub: their revisions, and what the hub refuses."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
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
from tests import tiny_folder as folders
from tests.handmade import logits

TEXT = {"input_ids": torch.tensor([[5, 9, 30, 31, 77]])}
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
    assert sv.inspect(name) == sv.inspect(folder)
    for other in ("own/tiny", "own/tiny@main", "own/tiny@v2"):
        with pytest.raises(ConfigError, match=f"model '{other}': .*the hub cannot be reached"):
            load_config(other)


def test_a_run_is_of_one_revision_and_its_card_names_the_model(reached, tmp_path, monkeypatch):
    out, how = tmp_path / "run", {"axis": "width", "criterion": "magnitude", "repair": "none"}
    monkeypatch.setattr("slimvlm.runs.compress.finish", lambda run, plan: None)  # as if stopped
    sv.compress("own/tiny@v1.0", ratio=0.3, out=out, say=silent, **how)
    assert metadata_load(out / "checkpoint" / "README.md")["base_model"] == "own/tiny"
    assert json.loads((out / "config.json").read_text())["model"] == "own/tiny@v1.0"
    with pytest.raises(ConfigError, match="with other model"):
        sv.compress("own/tiny@refs/pr/3", ratio=0.3, out=out, say=silent, **how)


def test_a_folder_with_an_at_sign_stays_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders.copied("text", tmp_path / "own" / "tiny@v1")
    assert split_revision("own/tiny@v1") == ("own/tiny@v1", {})
    assert resolve("own/tiny@v1") == "own/tiny@v1"
    assert not is_hub_id("own/tiny@v1")
    assert is_hub_id("other/tiny@v1")
    for name in ("./here@v1", "/there/x@v1", "word@v1", "own/else@v1"):
        with pytest.raises(ConfigError, match="no such folder"):
            resolve(name)
    for name in ("a/b@", "a/b@../c", "a/b@x y", "a/b@-x"):
        with pytest.raises(ConfigError, match="model 'a/b': revision"):
            load_config(name)


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
        for read in (sv.load, sv.inspect, folder_of, lambda n: check_models(LoadConfig(), n)):
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
