"""The verbs of one stage: figures on held-out samples, in memory and from files; refusals."""

import json

import pytest

from slimvlm.cli import main
from slimvlm.cli.steps import prune
from slimvlm.core.errors import ConfigError
from slimvlm.core.options import FinalEvaluation, MemoryOptions, PruneConfig
from slimvlm.data.read import load_samples
from slimvlm.evaluation.on_data import DataResult, evaluate_data
from slimvlm.models.load import anatomy, load
from slimvlm.runs import prune as pruning
from tests import tiny_folder as folders
from tests.handmade import Stopped, plan_by_hand, stops

pytestmark = pytest.mark.usefixtures("unhurried")

MODEL = str(folders.folder("llava"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folders.write_llava_data(tmp_path_factory.mktemp("data"), count=20)


@pytest.fixture(scope="module")
def pruned(data, tmp_path_factory):
    """A smaller model by its folder: made in memory, and from files."""
    home, done = tmp_path_factory.mktemp("pruned"), {}
    config = PruneConfig(ratio=0.3, axis="width", data=str(data), samples=6, local_steps=0)
    for name in ("memory", "files"):
        memory = MemoryOptions(low_memory=name == "files")
        done[home / name] = prune(MODEL, home / name, None, config, memory)
    return done


def test_prune_gives_the_same_figures_in_memory_and_from_files(data, pruned):
    for out, (_, held_out) in pruned.items():
        assert list(held_out) == ["original", "pruned"]
        assert DataResult.load(out / "slimvlm_held_out.json") == held_out["pruned"]
        assert "## Retained quality" in (out / "README.md").read_text()
    for stage in ("original", "pruned"):
        samples = (held_out[stage].samples for _, held_out in pruned.values())
        for here, there in zip(*samples, strict=True):
            assert here.loss == pytest.approx(there.loss, rel=1e-3)
            assert here.tokens == there.tokens
    again = evaluate_data(*load(out), load_samples(data)[-4:])
    expected = held_out["pruned"].figures.loss.value
    assert again.figures.loss.value == pytest.approx(expected, abs=1e-5)


COMMON = ["--ratio", "0.3", "--axis", "width", "--samples", "6", "--local-steps", "0"]


@pytest.mark.slow
def test_the_command_line_prints_them(data, tmp_path, capsys):
    words = ["prune", MODEL, *COMMON, "--data", str(data), "--out"]
    main([*words, str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "4 samples" in shown
    assert "same next token as the original" in shown
    main([*words, str(tmp_path / "none"), "--test-samples", "0"])
    assert "same next token" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="test_samples -1"):
        FinalEvaluation(test_samples=-1)


def test_a_model_is_evaluated_on_data_without_a_task(data, pruned, tmp_path, capsys):
    *_, smaller = pruned
    words = ["evaluate", str(smaller), "--data", str(data), "--limit", "8"]
    main([*words, "--baseline", MODEL, "--json", "--out", str(tmp_path / "r.json")])
    found = json.loads(capsys.readouterr().out)
    samples = load_samples(data)[:8]
    expected = evaluate_data(*load(smaller), samples, load(MODEL)[0]).figures
    assert found["model"]["agreement"]["value"] == pytest.approx(expected.agreement.value)
    assert found["model"]["loss"]["value"] == pytest.approx(expected.loss.value, abs=1e-5)
    assert found["baseline"]["samples"] == 8
    assert DataResult.load(tmp_path / "r.json").baseline == MODEL
    main(words)
    shown = capsys.readouterr().out
    assert "perplexity" in shown
    assert "agreement" not in shown


def test_a_stopped_prune_from_files_goes_on_with_its_own_plan_and_samples_alone(
    data, tmp_path, monkeypatch
):
    """Another plan starts anew, and so do other samples that stay unseen."""
    shape, memory = anatomy(MODEL), MemoryOptions(low_memory=True)
    plans = [plan_by_hand(shape, neurons=range(count)) for count in (48, 32)]
    for number, plan in enumerate(plans):
        plan.save(tmp_path / f"{number}.json")
    out = tmp_path / "out"
    config = PruneConfig(data=str(data), samples=4, local_steps=0)
    with monkeypatch.context() as patch:
        patch.setattr(pruning, "prune_checkpoint", stops)
        report = FinalEvaluation(test_samples=4)
        with pytest.raises(Stopped):
            prune(MODEL, out, tmp_path / "0.json", config, memory, report)
    report = FinalEvaluation(test_samples=2)
    walked, held_out = prune(MODEL, out, tmp_path / "1.json", config, memory, report)
    assert walked.plan.neurons == plans[1].neurons
    assert len(held_out["original"].samples) == 2
