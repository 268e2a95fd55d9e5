"""What the end says of samples that stay unseen: which they are, and where it stands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

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
from slimvlm.evaluation.on_data import DataResult, evaluate_data
from slimvlm.models.load import load
from slimvlm.runs.compress import STAGES, compress
from slimvlm.runs.held_out import read_held_out
from slimvlm.runs.prune import Pruned, prune
from slimvlm.runs.report import read_record, report_html
from slimvlm.runs.request import Request
from slimvlm.runs.stages import not_among, read_split, split
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


def names(samples: object) -> list[str]:
    assert isinstance(samples, (list, tuple))
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


def test_what_is_said_twice_is_not_unseen(data: Path) -> None:
    samples = load_samples(data)
    twice = [*samples[:18], replace(samples[2], id="again"), samples[19]]
    request = asked(data, report_samples=2)
    assert names(split(twice, request).report) == ["s19"]
    others = [Sample("x", samples[0].messages, samples[1].images)]
    assert not_among([samples[0]], others) == [samples[0]]  # the same words on another picture


def test_too_few_samples_are_said(data: Path, tmp_path: Path) -> None:
    few = folders.write_llava_data(tmp_path, count=9)
    said: list[str] = []
    found = read_split(asked(few), said.append)
    assert found.report == ()
    assert len(found.calibration) == 6
    assert any("9 samples are too few, 10 would do" in line for line in said)
    said.clear()
    read_split(asked(few, report_samples=0), said.append)
    assert said == []


def test_data_that_begin_with_pictures_are_mixed_all_the_way(tmp_path: Path) -> None:
    in_order = folders.write_llava_data(tmp_path, count=20)
    rows = json.loads(in_order.read_text())
    for row in rows[10:]:
        del row["image"]
        row["conversations"][0]["value"] = row["conversations"][0]["value"].removeprefix(
            "<image>\n"
        )
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
    config = CompressConfig(
        ratio=0.3, axis="width", data=str(data), samples=6, local_steps=2, recover=TRAINING
    )
    compress(MODEL, config, out, say=silent)
    return out


def test_a_run_ends_with_what_was_kept(finished: Path, data: Path) -> None:
    found = read_held_out(finished, STAGES)
    assert list(found) == ["original", "pruned", "recovered"]
    unseen = load_samples(data)[-4:]
    for result in found.values():
        assert [each.id for each in result.samples] == names(unseen)
    original, recovered = load(MODEL), load(finished)
    expected = evaluate_data(*recovered, unseen, original[0])
    again = found["recovered"].figures
    assert again.agreement == expected.figures.agreement
    assert again.divergence is not None
    assert expected.figures.divergence is not None
    assert again.divergence.value == pytest.approx(expected.figures.divergence.value, abs=1e-5)
    assert found["original"].figures.loss.value == pytest.approx(
        evaluate_data(*original, unseen).figures.loss.value, abs=1e-5
    )
    assert not (finished / "said.safetensors").exists()


def test_it_stands_in_summary_card_and_report(finished: Path) -> None:
    loss = f"{read_held_out(finished, STAGES)['recovered'].figures.loss.value:.3f} ["
    page = report_html(read_record(finished))
    for text in (
        (finished / "summary.md").read_text(),
        (finished / "checkpoint" / "README.md").read_text(),
        page,
    ):
        assert loss in text
        assert "KL divergence from the original" in text
    assert "Same next token" in page


def pruned(data: Path, out: Path, low_memory: bool) -> Pruned:
    config = PruneConfig(ratio=0.3, axis="width", data=str(data), samples=6, local_steps=0)
    return prune(
        MODEL, config, out, memory=MemoryOptions(low_memory=low_memory), say=lambda line: None
    )


def test_prune_ends_with_it_too_in_memory_and_from_files(data: Path, tmp_path: Path) -> None:
    live = pruned(data, tmp_path / "live", low_memory=False)
    from_files = pruned(data, tmp_path / "files", low_memory=True)
    for done, folder in ((live, "live"), (from_files, "files")):
        assert list(done.held_out) == ["original", "pruned"]
        stored = DataResult.load(tmp_path / folder / "slimvlm_held_out.json")
        assert stored == done.held_out["pruned"]
        assert "## What was kept" in (tmp_path / folder / "README.md").read_text()
    for stage in ("original", "pruned"):
        for here, there in zip(
            live.held_out[stage].samples, from_files.held_out[stage].samples, strict=True
        ):
            assert here.loss == pytest.approx(there.loss, rel=1e-3)
            assert here.tokens == there.tokens
    unseen = load_samples(data)[-4:]
    model, processor = load(tmp_path / "files")
    again = evaluate_data(model, processor, unseen)
    expected = from_files.held_out["pruned"].figures.loss.value
    assert again.figures.loss.value == pytest.approx(expected, abs=1e-5)


def test_the_command_line_ends_with_it(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prune", MODEL, "--ratio", "0.3", "--axis", "width", "--data", str(data)]
    words += ["--samples", "6", "--local-steps", "0", "--out", str(tmp_path / "out")]
    main(words)
    shown = capsys.readouterr().out
    assert "4 samples" in shown
    assert "same next token as the original" in shown
    main([*words[:-1], str(tmp_path / "none"), "--report-samples", "0"])
    assert "same next token" not in capsys.readouterr().out


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="report_samples -1"):
        ReportOptions(report_samples=-1)


def test_json_has_the_figures(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compress", MODEL, "--ratio", "0.3", "--axis", "width", "--data", str(data)]
    words += ["--samples", "6", "--local-steps", "0", "--train", "none", "--json"]
    main([*words, "--out", str(tmp_path / "run")])
    found = json.loads(capsys.readouterr().out)["held_out"]
    assert list(found) == ["original", "pruned"]
    assert found["original"]["agreement"] is None
    assert found["pruned"]["samples"] == 4
    assert 0 <= found["pruned"]["agreement"]["value"] <= 100


def shown_by(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    main(words)
    return capsys.readouterr().out


def test_a_model_is_evaluated_on_data_without_a_task(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(finished), "--data", str(data), "--limit", "8"]
    beside = [*words, "--baseline", MODEL]
    found = json.loads(shown_by([*beside, "--json", "--out", str(tmp_path / "r.json")], capsys))
    samples = load_samples(data)[:8]
    expected = evaluate_data(*load(finished), samples, load(MODEL)[0]).figures
    assert expected.agreement is not None
    assert found["model"]["agreement"]["value"] == pytest.approx(expected.agreement.value)
    assert found["model"]["loss"]["value"] == pytest.approx(expected.loss.value, abs=1e-5)
    assert found["baseline"]["samples"] == 8
    assert DataResult.load(tmp_path / "r.json").baseline == MODEL
    assert "perplexity" in shown_by(words, capsys)
    assert "agreement" not in shown_by(words, capsys)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--tasks", "presence"], "--tasks is for tasks"),
        (["--floors"], "--floors is for tasks"),
        (["--baseline", "RESULT"], "must be a model"),
        (["--limit", "0"], "limit 0"),
    ],
)
def test_what_data_cannot_be_asked_is_refused(
    more: list[str], told: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "result.json").write_text("{}")
    more = [str(tmp_path / "result.json") if word == "RESULT" else word for word in more]
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", MODEL, "--data", str(data), *more])
    assert stop.value.code == 2
    assert told in capsys.readouterr().err
