"""Model cards: what the hub reads, and what people read."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

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


def test_the_metadata_is_what_the_hub_reads(pruned):
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


def test_a_model_of_no_folder_has_no_original(tmp_path, monkeypatch):
    """A README in the folder where the command runs is not the original's card."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / CARD_FILE).write_text(BASE)
    net = tiny.build("llama")
    save(net, None, tmp_path / "out", Plan.everything(anatomy(net)))
    data = ModelCard.load(tmp_path / "out" / CARD_FILE).data.to_dict()
    assert not {"license", "base_model"} & set(data)
    assert "A smaller model:" in (tmp_path / "out" / CARD_FILE).read_text()


def test_people_read_what_was_removed_and_how_to_load_it(pruned):
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


def test_a_card_is_written_without_any_facts(tmp_path):
    net = tiny.build("llama")
    net.config._name_or_path = ""
    save(net, None, tmp_path / "plain")
    data = ModelCard.load(tmp_path / "plain" / CARD_FILE).data.to_dict()
    assert data["pipeline_tag"] == "text-generation"
    assert "base_model" not in data
    assert "model-index" not in data


def test_the_first_original_is_named_through_a_chain(pruned, tmp_path):
    net = tiny.build("llava-llama")
    net.config._name_or_path = str(pruned)
    save(net, None, tmp_path / "again")
    data = ModelCard.load(tmp_path / "again" / CARD_FILE).data.to_dict()
    assert (data["base_model"], data["license"]) == ("some/original", "llama2")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("owner/name", True), ("gpt2", True), ("", False), ("/no/such/folder", False), (".", False)],
)
def test_only_hub_ids_are_named_in_metadata(name, expected):
    assert is_hub_id(name) is expected
