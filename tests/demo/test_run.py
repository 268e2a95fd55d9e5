"""The table that the demo ends with: what is kept of each kind of answers, in 80 columns."""

import re
from dataclasses import replace
from io import StringIO

from rich.console import Console

from slimvlm.demo.questions import TASKS
from slimvlm.demo.run import ASKED, run_demo
from slimvlm.evaluation.on_data import DataResult, OnSample
from slimvlm.evaluation.results import Result
from slimvlm.runs import compress
from slimvlm.runs.tables import as_table
from tests.evaluation.test_compare import answered as replied

COUNT = 4


def answered(name, right):
    """The result of a demo task with so many right answers, the others empty."""
    task, asked = TASKS[name], TASKS[name].load(COUNT)
    replies = [q.answers[0] if i < right else "" for i, q in enumerate(asked)]
    return replace(replied(asked, replies, task.metric), chance=task.chance)


def test_the_last_table_keeps_chosen_and_free_answers_apart(tmp_path, monkeypatch):
    results = {
        stage: Result(
            *(stage, 136_900_000 - small, 134_500_000 - small),
            {name: answered(name, 4 - (small > 0) * (1 + (name == "name"))) for name in ASKED},
            **{"prefill_ms": 85.75, "decode_ms": 67.25, "weight_bytes": 261 * 2**20},
        )
        for stage, small in (("original", 0), ("recovered", 40_000_000))
    }
    compared = DataResult("small", (OnSample("a", 9, 0.5, 0.5, 9, 0.0),), "demo")
    monkeypatch.setattr(compress, "results_of", lambda *_: results)
    monkeypatch.setattr(compress, "read_held_out", lambda _: {"recovered": compared})
    header, rows, lines = run_demo(tmp_path, True, False, print)
    cells = {row[0]: row[1:] for row in rows}
    assert header == ["", "original", "compressed"]
    # the highest of chance: 25 and 50 of two tasks; of free answers next to nothing
    for label, percent in (("multiple-choice (floor 37.5)", 75), ("open-ended (floor 0.7)", 68.8)):
        whole, small = cells[f"  {label}"]
        assert whole == "100"
        assert re.fullmatch(rf"{percent:.1f} \[\d+\.\d, \d+\.\d\]", small)
    page = StringIO()
    Console(file=page, width=80).print(as_table(header, rows, title="the demo model"))
    printed = page.getvalue()
    assert all(any(f"{label} " in line for line in printed.splitlines()) for label in cells)
    assert "multiple-choice (floor 37.5)" in (tmp_path / "summary.md").read_text()
    assert any("locate" in line for line in lines)
