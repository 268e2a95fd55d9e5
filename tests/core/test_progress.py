"""What a stage says: few lines in a log, each true when it is written; a bar in a terminal."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimvlm.core.progress import (
    LOG_EVERY,
    LoggedStage,
    current_stage,
    duration,
    progress,
    steps,
    without_bars,
)


class Clock:
    """Time that passes when somebody says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40))
def test_a_log_has_one_line_a_stage_and_one_every_half_minute(seconds: list[float]) -> None:
    clock, told = Clock(), []
    for taken in progress(seconds, "work", lambda line: told.append((clock.now, line)), clock):
        clock.now += taken
    total = len(seconds)
    *between, (end, last) = told
    assert (end, last) == (clock.now, f"work: {total} of {total} in {duration(sum(seconds))}")
    if sum(seconds) < LOG_EVERY:
        assert not between
    times = [1000.0, *(time for time, _ in between)]
    assert all(later - earlier >= LOG_EVERY for earlier, later in pairwise(times))
    silence = max(later - earlier for earlier, later in pairwise([*times, end]))
    assert silence < LOG_EVERY + max(seconds) + 1e-6
    assert all(line.endswith(" left") for _, line in between)


def test_the_time_left_is_what_the_rest_takes_at_the_pace_so_far() -> None:
    clock, told = Clock(), list[str]()
    stage = LoggedStage("train", 10, done=4, say=told.append, clock=clock)
    clock.now += 29
    stage.reached(5, ", loss 2")
    clock.now += 31
    stage.reached(7, ", loss 1")  # three steps of 20 s, three more to do
    stage.reached(10)
    clock.now += 60
    stage.end()
    assert told == [
        "train: 7 of 10, 60 s left, loss 1",
        "train: 10 of 10 in 2 min",
    ]


def test_a_stage_that_is_left_early_does_not_say_that_it_is_done() -> None:
    told: list[str] = []
    for item in progress(range(5), "work", told.append, Clock()):
        if item == 4:
            break
    with pytest.raises(ZeroDivisionError):
        [1 / (4 - item) for item in progress(range(5), "more", told.append, Clock())]
    assert told == []


def test_parts_of_a_stage_share_its_lines() -> None:
    clock, told, names = Clock(), list[str](), list[str]()
    with steps("evaluate", 2, told.append, clock) as reached:
        for number, name in enumerate(("first", "second")):
            for _ in progress("abcd", name, reached=lambda share, n=number: reached(n + share)):
                names.append(current_stage())
                clock.now += 12
        assert current_stage() == "evaluate"
    assert names == ["first"] * 4 + ["second"] * 4
    assert told == [
        "evaluate: 0 of 2, 60 s left",  # three eighths in 36 s
        "evaluate: 1 of 2, 24 s left",
        "evaluate: 2 of 2 in 2 min",
    ]


def test_nothing_to_do_is_nothing_to_say() -> None:
    told: list[str] = []
    assert list(progress([], "work", told.append)) == []
    assert told == []


def test_a_log_goes_to_stderr_as_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as some builders of software do
    assert list(progress("ab", "work")) == ["a", "b"]
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "work: 2 of 2 in 0 s\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_nothing_is_shown_inside_something_larger(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    with without_bars():
        assert list(progress([1, 2], "work")) == [1, 2]
    assert capfd.readouterr() == ("", "")


def test_only_the_first_of_several_processes_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert list(progress([1, 2], "work")) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_a_bar(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress([1, 2], "work")) == [1, 2]
    out, err = capfd.readouterr()
    assert out == ""
    assert "work" in err
    assert "\x1b[" in err
    assert "of 2" not in err


def test_durations_for_people() -> None:
    assert [duration(s) for s in (0.4, 42, 89, 90, 420, 11_100)] == [
        *("0 s", "42 s", "89 s", "2 min", "7 min", "3 h 05 min")
    ]
