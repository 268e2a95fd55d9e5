"""Held-out samples: their choice, and their figures in every output of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slimvlm.cli import main
from slimvlm.core.errors import ConfigError
from slimvlm.core.options import (
    CompressConfig,
    MemoryOptions,
    PruneConfig,
    RecoverConfig,
    ReportOptions,
)
from slimvlm.core.progress import silent
from slimvlm.data.read import load_samples
from slimvlm.data.samples import Sample
from slimvlm.evaluation.on_data import DataResult, OnSample, evaluate_data
from slimvlm.models.load import load
from slimvlm.runs.compress import compress, read_held_out
from slimvlm.runs.report import read_record, report_html
from slimvlm.runs.request import Request
from slimvlm.runs.stages import not_among, read_split, split
from slimvlm.runs.verbs import Pruned, prune
from tests import tiny_folder as folders

pytestmark = pytest.mark.usefixtures("unhurried")

TRAINING = RecoverConfig(train="projector", loss="sft", max_steps=2, batch_size=2, bf16=False)
MODEL = str(folders.folder("llava"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.write_llava_data(tmp_path_factory.mktemp("data"), count=20)


def asked(data: Path, **changes: object) -> Request:
    config = PruneConfig(ratio=0.3, data=str(data), samples=6, seed=0)
    request = Request(model=MODEL, prune=config, recover=TRAINING, report_samples=64)
    return replace(request, **changes)


def names(samples: Sequence[Sample] | Sequence[OnSample]) -> list[str]:
    return [sample.id for sample in samples]


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("training", [None, 5, 100])
@pytest.mark.parametrize("count", [2, 64])
def test_no_sample_of_the_report_is_used(
    seed: int, training: int | None, count: int, data: Path
) -> None:
    request = asked(data, training_samples=training, report_samples=count)
    request = replace(request, prune=replace(request.prune, seed=seed))
    found = read_split(request, silent)
    assert len(found.report) in (2, 4)  # at most a fifth of 20, or of the 13 that are read
    used = {*names(found.calibration), *names(found.training)}
    assert not used & set(names(found.report))
    if seed == 0 and training is None:
        assert names(found.report) == [f"s{i}" for i in range(20)][-len(found.report) :]


def test_repeated_samples_are_not_held_out(data: Path) -> None:
    samples = load_samples(data)
    twice = [*samples[:18], replace(samples[2], id="again"), samples[19]]
    request = asked(data, report_samples=2)
    assert names(split(twice, request).report) == ["s19"]
    others = [Sample("x", samples[0].messages, samples[1].images)]
    assert not_among([samples[0]], others) == [samples[0]]  # the same words on another picture


def test_too_few_samples_are_reported(data: Path, tmp_path: Path) -> None:
    few, lines = folders.write_llava_data(tmp_path, count=9), []
    found = read_split(asked(few), lines.append)
    assert found.report == ()
    assert len(found.calibration) == 6
    assert any("9 samples are too few, 10 would do" in line for line in lines)
    lines.clear()
    read_split(asked(few, report_samples=0), lines.append)
    assert lines == []


def test_data_that_begin_with_pictures_are_mixed_all_the_way(tmp_path: Path) -> None:
    in_order = folders.write_llava_data(tmp_path, count=20)
    rows = json.loads(in_order.read_text())
    for row in rows[10:]:
        del row["image"]
        turn = row["conversations"][0]
        turn["value"] = turn["value"].removeprefix("<image>\n")
    in_order.write_text(json.dumps(rows))
    whole = read_split(asked(in_order), silent)
    for part in (whole.calibration, whole.training, whole.report):
        shown = sum(bool(sample.images) for sample in part)
        assert abs(shown - len(part) / 2) <= 1
    untrained = read_split(asked(in_order, recover=None, report_samples=2), silent)
    assert names(untrained.calibration) == names(whole.calibration)  # though it reads ten rows


@pytest.fixture(scope="module")
def finished(data: Path, unhurried: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a task. Tests must not change it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    shown = {"data": str(data), "samples": 6, "local_steps": 2}
    config = CompressConfig(ratio=0.3, axis="width", recover=TRAINING, **shown)
    compress(MODEL, config, out, say=silent)
    return out


def test_a_run_keeps_the_figures_of_its_stages(finished: Path, data: Path) -> None:
    found = read_held_out(finished)
    assert list(found) == ["original", "pruned", "recovered"]
    unseen = load_samples(data)[-4:]
    assert all(names(result.samples) == names(unseen) for result in found.values())
    original, recovered = load(MODEL), load(finished)
    again: Any = found["recovered"].figures
    expected: Any = evaluate_data(*recovered, unseen, original[0]).figures
    assert again.agreement == expected.agreement
    assert again.divergence.value == pytest.approx(expected.divergence.value, abs=1e-5)
    loss = evaluate_data(*original, unseen).figures.loss.value
    assert found["original"].figures.loss.value == pytest.approx(loss, abs=1e-5)
    assert not (finished / "said.safetensors").exists()


def test_summary_card_and_report_show_them(finished: Path) -> None:
    loss = f"{read_held_out(finished)['recovered'].figures.loss.value:.3f} ["
    page = report_html(read_record(finished))
    assert "Same next token" in page
    files = [finished / "summary.md", finished / "checkpoint" / "README.md"]
    for text in (page, *(file.read_text() for file in files)):
        assert loss in text
        assert "KL divergence from the original" in text


def test_prune_gives_the_same_figures_in_memory_and_from_files(data: Path, tmp_path: Path) -> None:
    config = PruneConfig(ratio=0.3, axis="width", data=str(data), samples=6, local_steps=0)
    done: list[Pruned] = []
    for low_memory in (False, True):
        out, memory = tmp_path / str(low_memory), MemoryOptions(low_memory=low_memory)
        done.append(prune(MODEL, config, out, memory=memory, say=silent))
        assert list(done[-1].held_out) == ["original", "pruned"]
        assert DataResult.load(out / "slimvlm_held_out.json") == done[-1].held_out["pruned"]
        assert "## What was kept" in (out / "README.md").read_text()
    for stage in ("original", "pruned"):
        samples = (each.held_out[stage].samples for each in done)
        for here, there in zip(*samples, strict=True):
            assert here.loss == pytest.approx(there.loss, rel=1e-3)
            assert here.tokens == there.tokens
    again = evaluate_data(*load(tmp_path / "True"), load_samples(data)[-4:])
    expected = done[1].held_out["pruned"].figures.loss.value
    assert again.figures.loss.value == pytest.approx(expected, abs=1e-5)


COMMON = ["--ratio", "0.3", "--axis", "width", "--samples", "6", "--local-steps", "0"]


def test_the_command_line_prints_them(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prune", MODEL, *COMMON, "--data", str(data), "--out"]
    main([*words, str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "4 samples" in shown
    assert "same next token as the original" in shown
    main([*words, str(tmp_path / "none"), "--report-samples", "0"])
    assert "same next token" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="report_samples -1"):
        ReportOptions(report_samples=-1)
    words = ["compress", MODEL, *COMMON, "--data", str(data), "--train", "none", "--json"]
    main([*words, "--out", str(tmp_path / "run")])
    found = json.loads(capsys.readouterr().out)["held_out"]
    assert list(found) == ["original", "pruned"]
    assert found["original"]["agreement"] is None
    assert found["pruned"]["samples"] == 4
    assert 0 <= found["pruned"]["agreement"]["value"] <= 100


def test_a_model_is_evaluated_on_data_without_a_task(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(finished), "--data", str(data), "--limit", "8"]
    main([*words, "--baseline", MODEL, "--json", "--out", str(tmp_path / "r.json")])
    found = json.loads(capsys.readouterr().out)
    samples = load_samples(data)[:8]
    expected: Any = evaluate_data(*load(finished), samples, load(MODEL)[0]).figures
    assert found["model"]["agreement"]["value"] == pytest.approx(expected.agreement.value)
    assert found["model"]["loss"]["value"] == pytest.approx(expected.loss.value, abs=1e-5)
    assert found["baseline"]["samples"] == 8
    assert DataResult.load(tmp_path / "r.json").baseline == MODEL
    main(words)
    shown = capsys.readouterr().out
    assert "perplexity" in shown
    assert "agreement" not in shown


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "presence"], "--tasks is for tasks"),
        (["--floors"], "--floors is for tasks"),
        (["--baseline", "RESULT"], "must be a model"),
        (["--limit", "0"], "limit 0"),
    ],
)
def test_options_that_do_not_go_with_data_are_refused(
    more: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "result.json").write_text("{}")
    more = [str(tmp_path / "result.json") if word == "RESULT" else word for word in more]
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", MODEL, "--data", str(data), *more])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
