"""Fewer tokens from the verbs: prune, plan and compress, in memory and layer by layer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

import slimvlm as sv
from slimvlm.core.options import MemoryOptions, PlanConfig, PruneConfig
from slimvlm.models.load import anatomy
from slimvlm.runs import stages
from slimvlm.runs.advise import dry_run, dry_run_rows
from slimvlm.runs.request import Request, resolved, with_tokens
from slimvlm.runs.verbs import plan as write_plan
from slimvlm.runs.verbs import prune
from tests import tiny_words
from tests.handmade import assert_untouched, snapshot

pytestmark = pytest.mark.usefixtures("unhurried")
FEW = 420


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [
        [
            {"role": "user", "content": f"How wide are {n} stones?"},
            {"role": "assistant", "content": f"They are {n * n} wide."},
        ]
        for n in range(60)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text("\n".join(tiny_words.CORPUS))
    return str(path)


def model() -> str:
    return str(tiny_words.folder("text"))


def pruned(out: Path, heard: list[str] | None = None, **options: Any) -> sv.Plan:
    low = options.pop("low_memory", False)
    say = (heard if heard is not None else []).append
    config = PruneConfig(**options)
    prune(model(), config, out, memory=MemoryOptions(low_memory=low), say=say)
    return sv.Plan.load(out / "slimvlm_plan.json")


def test_tokens_alone_need_neither_a_ratio_nor_data(tmp_path: Path, text: str) -> None:
    heard: list[str] = []
    plan = pruned(tmp_path / "out", heard, vocab_size=FEW, vocab_text=text)
    assert plan.tokens is not None
    assert len(plan.tokens) == FEW
    assert not plan.cuts_layers
    assert f"{FEW} of 533 tokens stay" in "\n".join(heard)
    smaller, words = sv.load(tmp_path / "out", device="cpu")
    assert smaller.config.vocab_size == len(words) == FEW


def test_the_axis_gives_what_tokens_leave_of_the_ratio(
    tmp_path: Path, data: str, text: str
) -> None:
    shape = anatomy(model())
    options = {"data": data, "vocab_size": FEW, "vocab_text": text, "local_steps": 0, "samples": 8}
    plan = pruned(tmp_path / "out", ratio=0.4, axis="width", **options)
    assert plan.tokens is not None
    assert plan.cuts_layers
    smaller = anatomy(tmp_path / "out")
    assert smaller == plan.after
    assert 1 - smaller.backbone_params / shape.backbone_params == pytest.approx(0.4, abs=0.02)
    held_out = json.loads((tmp_path / "out" / "slimvlm_held_out.json").read_text())
    assert held_out
    little = pruned(tmp_path / "little", ratio=0.05, axis="auto", **options)
    assert little.tokens == plan.tokens
    assert not little.cuts_layers


def test_layer_by_layer_the_same_is_written(tmp_path: Path, data: str, text: str) -> None:
    options = {"data": data, "vocab_size": FEW, "vocab_text": text, "local_steps": 0, "samples": 8}
    options |= {"ratio": 0.4, "axis": "width"}
    plan = pruned(tmp_path / "at once", **options)
    assert pruned(tmp_path / "by layer", low_memory=True, **options) == plan
    whole, pieces = (sv.load(tmp_path / n, device="cpu")[0] for n in ("at once", "by layer"))
    ours, theirs = whole.state_dict(), pieces.state_dict()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, atol=1e-5, rtol=1e-4)
    for name in ("tokenizer.json", "generation_config.json"):
        one, other = ((tmp_path / n / name).read_text() for n in ("at once", "by layer"))
        assert one == other


def test_a_written_plan_has_its_tokens_and_is_applied(tmp_path: Path, text: str) -> None:
    config = PlanConfig(vocab_size="auto", vocab_text=text)
    made = write_plan(model(), config, tmp_path / "plan.json", say=[].append)
    assert made.tokens is not None
    assert not made.cuts_layers
    prune(model(), PruneConfig(), tmp_path / "out", plan_file=tmp_path / "plan.json", say=[].append)
    assert anatomy(tmp_path / "out") == made.after


def test_a_run_trains_and_asks_with_fewer_tokens(tmp_path: Path, data: str, text: str) -> None:
    how = {"max_steps": 2, "batch_size": 2, "lora_rank": 2, "bf16": False}
    recover = sv.RecoverConfig(train="lora", loss="sft+hidden+kl", **how)
    shown = {"data": data, "samples": 8, "local_steps": 0, "report_samples": 3}
    asked = {"ratio": 0.35, "axis": "width", "vocab_size": FEW, "vocab_text": text}
    config = sv.CompressConfig(recover=recover, **shown, **asked)
    heard: list[str] = []
    sv.compress(model(), config, tmp_path / "run", say=heard.append)
    assert f"{FEW} of 533 tokens stay" in "".join(heard)
    smaller, words = sv.load(tmp_path / "run", device="cpu")
    assert smaller.config.vocab_size == len(words) == FEW
    recovered = json.loads((tmp_path / "run" / "results" / "data-recovered.json").read_text())
    assert recovered["baseline"] == "original"
    assert f"{FEW} of" in (tmp_path / "run" / "summary.md").read_text()


def test_a_stage_of_a_study_chooses_from_its_own_samples(data: str) -> None:
    config = PruneConfig(ratio=0.3, axis="depth", vocab_size=FEW, data=data, repair="none")
    request = resolved(Request(model=model(), prune=config))
    loaded, processor = stages.load_original(request, "cpu")
    samples = sv.load_samples(data, limit=12)
    calibration = stages.Calibration(processor, samples, hold_out=False)
    scores = list(stages.calibrate(request, loaded, calibration).values())
    plan = stages.prune_(request, loaded, calibration, scores).plan
    assert plan.tokens is not None
    assert len(plan.tokens) == loaded.config.vocab_size == FEW
    assert plan.cuts_layers
    assert all(
        set(processor(m["content"][0]["text"])["input_ids"]) <= set(plan.tokens)
        for sample in samples
        for m in sample.messages
    )


def opened(data: str, where: str = "", **options: Any) -> tuple[Request, list[str]]:
    """A request whose axis is open, with what is said of its tokens."""
    heard: list[str] = []
    asked = {"ratio": 0.4, "axis": "auto", "samples": 16, "local_steps": 0, **options}
    request = resolved(Request(model=where or model(), prune=PruneConfig(data=data, **asked)))
    samples = stages.read_split(request, heard.append)
    return with_tokens(request, samples.counted(request), heard.append), heard


def test_where_the_axis_is_open_fewer_tokens_are_tried_on_the_same_answers(
    data: str, tmp_path: Path
) -> None:
    rows = Path(data).read_text().splitlines()
    for place in range(stages.HELD_OUT_EVERY - 1, len(rows), stages.HELD_OUT_EVERY):
        rows[place] = rows[place].replace("wide.", "jumps over the lazy dog.")
    rare = tmp_path / "rare.jsonl"
    rare.write_text("\n".join(rows))
    request, heard = opened(str(rare))
    assert request.tokens is None
    assert f"{len(request.fewer_tokens or ())} of 533 tokens stay" in heard[-1]
    loaded, processor = stages.load_original(request, "cpu")
    before = snapshot(loaded)
    samples = stages.read_split(request, heard.append).calibration
    calibration = stages.Calibration(processor, samples, request.hold_out)
    scores = list(stages.calibrate(request, loaded, calibration).values())
    losses = stages.try_axes(request, loaded, calibration, scores)
    assert_untouched(loaded, before)
    *_, last = losses
    best = last.removesuffix(stages.BEHIND)
    assert best != last
    student, _ = stages.load_original(request, "cpu")
    held_out = {"held_out": calibration.held_out, "tokens": request.fewer_tokens}
    walked = sv.walk_(student, calibration.fitted, 0.4, best, scores=scores, **held_out)
    sv.trim_tokenizer_(processor, walked.plan)
    judges = samples[stages.HELD_OUT_EVERY - 1 :: stages.HELD_OUT_EVERY]
    said = sv.evaluate_data(student, processor, judges).samples
    whole, words = stages.load_original(request, "cpu")
    read = sum(sample.tokens for sample in sv.evaluate_data(whole, words, judges).samples)
    assert sum(s.tokens for s in said) > read  # some answers are in shorter pieces now
    nats = sum(sample.loss * sample.tokens for sample in said)
    assert losses[last] == pytest.approx(nats / read, rel=1e-4)


@pytest.mark.parametrize("lost", [0.5, 2.0])
def test_a_run_takes_fewer_tokens_where_answers_lose_less_by_it(
    tmp_path: Path, data: str, lost: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = {"depth": 1.5, "width": 1.0, "width" + stages.BEHIND: lost}
    monkeypatch.setattr(stages, "try_axes", lambda *_, **__: tried)
    asked = {"ratio": 0.4, "axis": "auto", "samples": 16, "local_steps": 0, "report_samples": 3}
    sv.compress(model(), sv.CompressConfig(data=data, **asked), tmp_path / "run", say=[].append)
    plan = sv.Plan.load(tmp_path / "run" / "plan.json")
    assert (plan.axis, plan.tokens is not None) == ("width", lost < 1)
    assert plan.ratio == pytest.approx(0.4, abs=0.02)
    assert anatomy(tmp_path / "run") == plan.after


def test_a_dry_run_says_how_many_tokens_a_run_would_try(data: str) -> None:
    asked = {"ratio": 0.4, "axis": "auto", "samples": 16, "report_samples": 0}
    found = dry_run(model(), sv.CompressConfig(data=data, **asked), [].append)
    assert found.fewer_tokens == len(opened(data)[0].fewer_tokens or ())
    told = dict(row for row in dry_run_rows(found) if row[0])["axes"]
    assert f"again after trimming to {found.fewer_tokens:,} tokens" in told
    all_stay = sv.CompressConfig(data=data, vocab_size="all", **asked)
    assert dry_run(model(), all_stay, [].append).fewer_tokens == 0


def test_fewer_tokens_never_remove_more_than_the_ratio(data: str) -> None:
    shape = anatomy(model())
    request, _ = opened(data, ratio=0.05)
    gone = shape.vocab_size - len(request.fewer_tokens or ())
    assert 0 <= gone * shape.token_params - 0.05 * shape.backbone_params < shape.token_params


def test_all_tokens_stay_where_that_is_asked_or_nothing_else_is_possible(
    data: str, tmp_path: Path
) -> None:
    for asked in ({"vocab_size": "all"}, {"axis": "width"}):
        request, heard = opened(data, **asked)
        assert (request.fewer_tokens, heard) == (None, [])
    place = tmp_path / "model"
    shutil.copytree(model(), place)
    words = json.loads((place / "tokenizer.json").read_text())
    words["model"]["dropout"] = 0.1
    (place / "tokenizer.json").write_text(json.dumps(words))
    request, heard = opened(data, str(place))
    assert request.fewer_tokens == ()
    assert "all tokens stay: tokens: " in heard[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 3}, r"vocab_size 3 must be at least \d+"),
        ({"vocab_size": 0}, "vocab_size 0 must be at least 1"),
        ({"vocab_size": "few"}, "vocab_size 'few' must be one of: auto"),
        ({"vocab_size": "auto"}, "vocab_size 'auto' needs --data or --vocab-text"),
        ({"vocab_text": "a.txt", "ratio": 0.1}, "vocab_text 'a.txt' needs vocab_size"),
        ({"vocab_size": 400, "vocab_text": "nowhere.txt"}, "'nowhere.txt'.*no such file"),
        ({}, "either --ratio or --plan, or --vocab-size or --experts alone"),
    ],
)
def test_what_cannot_be_is_said_before_weights_are_read(
    tmp_path: Path, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for a user
    with pytest.raises(sv.SlimError, match=message):
        pruned(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
