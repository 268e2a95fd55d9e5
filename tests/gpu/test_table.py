"""The table in docs/gpu.md: every verb on every kind of device; ``--update-golden`` rewrites it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from slimvlm import cli
from slimvlm.evaluation.results import Result
from slimvlm.models.cost import release_memory
from slimvlm.runs import cost
from slimvlm.runs.tables import as_markdown
from tests import pretended_gpu
from tests import tiny_folder as folders
from tests.gpu.alike import ROUNDING, assert_close
from tests.gpu.test_verbs import (
    TRAINING,
    assert_same_checkpoint,
    assert_same_on_data,
    assert_same_run,
    weights_in,
)
from tests.runs.study.study_files import RECOVER as STUDY_RECOVER
from tests.runs.study.study_files import RECOVERIES, stable

pytestmark = pytest.mark.usefixtures("unhurried")

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
BEGIN, END = "<!-- devices: begin -->\n", "<!-- devices: end -->\n"
Same = Callable[[Path, Path], None]
SAME, REFUSED = "same", "refused in one line"
ROOM = 30_000
"""Bytes of a card without room."""


def same_scores(found: Path, expected: Path) -> None:
    ours, theirs = (load_file(out.with_suffix(".safetensors")) for out in (found, expected))
    assert_close(ours, theirs)


def same_answers(found: Path, expected: Path) -> None:
    ours, theirs = Result.load(found).tasks, Result.load(expected).tasks
    assert [ours[name].replies for name in theirs] == [theirs[name].replies for name in theirs]


def same_text(found: Path, expected: Path) -> None:
    assert found.read_text() == expected.read_text()


def same_keys(found: Path, expected: Path) -> None:
    """Times differ; what is counted does not."""
    ours, theirs = (json.loads(out.read_text())["model"] for out in (found, expected))
    for name in ("total_params", "weight_bytes", "decode_flops"):
        assert ours[name] == theirs[name]


def same_study(found: Path, expected: Path) -> None:
    ours, theirs = (stable(pd.read_parquet(out / "results.parquet")) for out in (found, expected))
    assert set(theirs["status"]) == {"done"}
    pd.testing.assert_frame_equal(ours, theirs, rtol=ROUNDING)


def same_weights(found: Path, expected: Path) -> None:
    assert_close(weights_in(found), weights_in(expected))


def verbs(folder: Path) -> Mapping[str, tuple[Sequence[str], Same]]:
    """Each verb that runs a model: its arguments without ``--out``, and when outcomes agree."""
    model, data = str(folders.folder("llava")), str(folders.write_llava_data(folder / "data"))
    smaller, study = str(folder / "smaller"), folder / "study.yaml"
    shown = ("--data", data, "--samples", "4")
    axis = ("--ratio", "0.3", "--axis", "width")
    cli.main(["prune", model, "--out", smaller, *axis, *shown, "--device", "cpu"])
    folders.picture().save(folder / "picture.png")
    words = folders.write_llava_data(folder / "words", pictures=False)
    values = {
        "grids": [{"model": str(folders.folder("text")), "ratio": 0.4, "axis": ["depth", "width"]}],
        "recoveries": {"sft+hidden": RECOVERIES["sft+hidden"]},
        "recover": {**STUDY_RECOVER, "lora": {"lora_dropout": 0.0}},
        **{"data": str(words), "prune": {"samples": 4}},
        **{"tasks": "text_odd", "limit": 2, "floors": False},
    }
    study.write_text(json.dumps(values))
    learning = ("--train", "lora", "--loss", "sft+hidden", *TRAINING)
    asked = ("--tasks", "presence", "--limit", "2")
    question = ("Which colour?", "--image", str(folder / "picture.png"), "--max-new-tokens", "4")
    timed = ("--prompt-tokens", "8", "--new-tokens", "3", "--repeats", "1", "--json")
    return {
        "compress": (("compress", model, *axis, *shown, *learning), assert_same_run),
        "prune": (("prune", model, *axis, *shown), assert_same_checkpoint),
        "prune --low-memory": (
            ("prune", model, *axis, *shown, "--low-memory"),
            assert_same_checkpoint,
        ),
        "score": (("score", model, *shown, "--criterion", "taylor"), same_scores),
        "recover": (
            ("recover", smaller, "--teacher", model, "--data", data, *learning),
            assert_same_checkpoint,
        ),
        "evaluate --tasks": (("evaluate", model, *asked), same_answers),
        "evaluate --data --baseline": (
            ("evaluate", smaller, "--data", data, "--baseline", model),
            assert_same_on_data,
        ),
        "compare": (("compare", model, smaller, *asked), same_text),
        "chat": (("chat", model, *question, "--json"), same_text),
        "bench": (("bench", smaller, *timed), same_keys),
        "quantize": (("quantize", smaller, "--backend", "torchao"), same_weights),
        "study": (("study", str(study)), same_study),
    }


PRINTS = ("compare", "chat", "bench")
"""Verbs whose outcome is what they print."""


def run(words: Sequence[str], out: Path, device: str) -> None:
    """Run a verb; ``out`` holds what it writes or prints."""
    out.parent.mkdir(parents=True, exist_ok=True)
    box = StringIO()
    given = [*words, "--device", device]
    if words[0] not in PRINTS:
        given += ["--out", str(out)]
    with redirect_stdout(box):
        cli.main(given)
    if words[0] in PRINTS:
        out.write_text(box.getvalue())


def failed_cells(words: Sequence[str], out: Path) -> str:
    """What becomes of a study on a card without room: every cell says why it failed."""
    release_memory()
    with pretended_gpu.limit(ROOM, 0), suppress(SystemExit):
        run(words, out, "cuda:0")
    table = pd.read_parquet(out / "results.parquet")
    assert set(table["status"]) == {"failed"}
    assert table["failed"].str.contains("out of memory").all()
    return "each cell says so, the others go on"


def refusal(words: Sequence[str], out: Path) -> str:
    """What a verb says on a card without room; it must be one line."""
    told = StringIO()
    release_memory()
    with pretended_gpu.limit(ROOM, 0), redirect_stderr(told), pytest.raises(SystemExit) as stop:
        run(words, out, "cuda:0")
    assert stop.value.code == 2
    lines = [line for line in told.getvalue().splitlines() if line.startswith("slimvlm: ")]
    assert len(lines) == 1
    assert "Traceback" not in told.getvalue()
    return lines[0]


@pytest.mark.slow
def test_the_table_in_the_docs_is_what_verbs_do(
    tmp_path: Path, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pretended_gpu.REASON is not None or torch.cuda.device_count() < 2:
        pytest.skip("needs two pretended cards (PRETENDED_GPUS=2)")
    pytest.importorskip("torchao")
    monkeypatch.setattr(cost, "device_flops", lambda *_: 1e9)
    rows = []
    for name, (words, same) in verbs(tmp_path).items():
        stem = re.sub(r"\W+", "-", name)
        expected = tmp_path / "cpu" / stem
        run(words, expected, "cpu")
        row = [f"`{name}`", "runs"]
        for device in ("cuda:0", "cuda:1"):
            other = 1 - int(device[-1])
            torch.cuda.reset_peak_memory_stats(other)
            held = torch.cuda.max_memory_allocated(other)
            found = tmp_path / device.replace(":", "-") / stem
            run(words, found, device)
            same(found, expected)
            assert torch.cuda.max_memory_allocated(other) == held, f"{name} used the other card"
            row.append(SAME)
        full = tmp_path / "full" / stem
        if name == "study":
            row.append(failed_cells(words, full))
        else:
            told = refusal(words, full)
            expected = "do not fit into" if name == "quantize" else "out of memory on cuda:0 during"
            assert expected in told
            row.append(REFUSED)
        rows.append(row)
    header = ["verb", "CPU", "a card", "the second of two cards", "a card without room"]
    found = as_markdown(header, rows)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    written, _, after = rest.partition(END)
    if pytestconfig.getoption("--update-golden"):
        PAGE.write_text(f"{before}{BEGIN}{found}{END}{after}")
    else:
        assert written == found, "run pytest with --update-golden and look at the difference"
