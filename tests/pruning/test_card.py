"""Model cards: what the hub reads, what people read, and that pushing needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import validate_hf_hub_args

from slimvlm import cli
from slimvlm.models.load import anatomy
from slimvlm.planning.plan import Plan
from slimvlm.pruning.card import CARD_FILE, CardFacts, is_hub_id
from slimvlm.pruning.cut import prune_
from slimvlm.pruning.save import save
from tests import tiny
from tests.handmade import plan_by_hand

BASE = "---\nlicense: llama2\nbase_model: some/original\ntags: [x]\n---\n# Original\n"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned checkpoint whose original is a folder with a card of its own."""
    root = tmp_path_factory.mktemp("cards")
    original = root / "original"
    original.mkdir()
    (original / CARD_FILE).write_text(BASE)
    net = tiny.build("llava-llama")
    net.config._name_or_path = str(original)
    plan = plan_by_hand(anatomy(net), layers=(0, 2, 3))
    prune_(net, plan)
    facts = CardFacts(
        base=str(original),
        name="small",
        command="slimvlm compress x --out small",
        results="| task | score |",
        scores={"count": ("exact_match", 41.234)},
        training="Then lora was trained.",
    )
    save(net, None, root / "small", plan, facts=facts)
    return root / "small"


def test_the_metadata_is_what_the_hub_reads(pruned: Path) -> None:
    data = ModelCard.load(pruned / CARD_FILE).data.to_dict()
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
    ModelCard.load(pruned / CARD_FILE).data.to_yaml()


def test_a_model_of_no_folder_has_no_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A README in the folder where the command runs is not the original's card."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / CARD_FILE).write_text(BASE)
    net = tiny.build("llama")
    save(net, None, tmp_path / "out", Plan.everything(anatomy(net)))
    data = ModelCard.load(tmp_path / "out" / CARD_FILE).data.to_dict()
    assert not {"license", "base_model"} & set(data)
    assert "A smaller model:" in (tmp_path / "out" / CARD_FILE).read_text()


def test_people_read_what_was_removed_and_how_to_load_it(pruned: Path) -> None:
    text = (pruned / CARD_FILE).read_text()
    plan = Plan.load(pruned / "slimvlm_plan.json")
    for needed in (
        plan.summary(),
        f"{plan.after.total_params:,}",
        "slimvlm compress x --out small",
        "| task | score |",
        "Then lora was trained.",
        "AutoModelForImageTextToText.from_pretrained(folder)",
    ):
        assert needed in text
    assert str(pruned.parent) not in text


def test_a_card_is_written_without_any_facts(tmp_path: Path) -> None:
    net = tiny.build("llama")
    net.config._name_or_path = ""
    save(net, None, tmp_path / "plain")
    data = ModelCard.load(tmp_path / "plain" / CARD_FILE).data.to_dict()
    assert data["pipeline_tag"] == "text-generation"
    assert "base_model" not in data
    assert "model-index" not in data


def test_the_first_original_is_named_through_a_chain(pruned: Path, tmp_path: Path) -> None:
    net = tiny.build("llava-llama")
    net.config._name_or_path = str(pruned)
    save(net, None, tmp_path / "again")
    data = ModelCard.load(tmp_path / "again" / CARD_FILE).data.to_dict()
    assert (data["base_model"], data["license"]) == ("some/original", "llama2")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("owner/name", True), ("gpt2", True), ("", False), ("/no/such/folder", False), (".", False)],
)
def test_only_hub_ids_are_named_in_metadata(name: str, expected: bool) -> None:
    assert is_hub_id(name) is expected


class FakeHub:
    """Notes what would be uploaded; refuses names as the real one does, fails if told so."""

    calls: tuple[Any, ...] = ()
    error: Exception | None = None

    @validate_hf_hub_args
    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> None:
        if self.error is not None:
            raise self.error
        type(self).calls = (repo_id, private, exist_ok)

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        names = {path.name for path in Path(folder_path).iterdir()}
        type(self).calls = (*self.calls, repo_id, names)
        return type("Commit", (), {"commit_url": f"hub/{repo_id}/commit/1"})()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    fake = type("OneHub", (FakeHub,), {})
    monkeypatch.setattr("slimvlm.export.hub.HfApi", fake)
    return fake


@pytest.mark.parametrize("private", [True, False])
def test_push_uploads_the_whole_folder(
    pruned: Path, hub: type[FakeHub], private: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["push", str(pruned), "me/small", *(["--private"] * private)])
    *made, repo, names = hub.calls
    assert made == ["me/small", True if private else None, True]
    assert repo == "me/small"
    assert names == {path.name for path in pruned.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "slimvlm_plan.json"} <= names
    assert capsys.readouterr().out.strip() == "hub/me/small/commit/1"


@pytest.mark.parametrize(
    "error", [LocalTokenNotFoundError("no token"), ConnectionError("unreachable")]
)
def test_what_the_hub_refuses_is_one_line(
    pruned: Path, hub: type[FakeHub], error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.error = error
    with pytest.raises(SystemExit) as stop:
        cli.main(["push", str(pruned), "me/small"])
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert str(error) in said[0]


@pytest.mark.parametrize(("name", "word"), [("a b", "repo_id 'a b'"), ("x/y/z", "repo_id 'x/y/z'")])
def test_wrong_names_are_refused(
    pruned: Path, hub: type[FakeHub], name: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["push", str(pruned), name])
    assert word in capsys.readouterr().err
    assert hub.calls == ()


def test_a_folder_without_a_card_is_refused(
    pruned: Path, tmp_path: Path, hub: type[FakeHub], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((pruned / "config.json").read_text())
    with pytest.raises(SystemExit):
        cli.main(["push", str(tmp_path), "me/small"])
    assert "no README.md" in capsys.readouterr().err
