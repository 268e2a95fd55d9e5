"""What a stage says: few lines in a log, each true when it is written; a bar in a terminal."""

import sys
import time
from contextlib import nullcontext
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimvlm.core import progress as module
from slimvlm.core.progress import (
    LOG_EVERY,
    current_stage,
    duration,
    progress,
    steps,
    without_bars,
)


class Clock:
    """Time that passes when somebody says so, and the lines that are logged meanwhile."""

    def __init__(self, patch):
        self.now, self.told = 1000.0, list[tuple[float, str]]()
        patch.setattr(time, "monotonic", lambda: self.now)
        patch.setattr(module, "to_log", lambda line: self.told.append((self.now, line)))

    @property
    def lines(self):
        return [line for _, line in self.told]


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40))
def test_a_log_has_one_line_a_stage_and_one_every_half_minute(seconds):
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        for taken in progress(seconds, "work"):
            clock.now += taken
    total = len(seconds)
    *between, (end, last) = clock.told
    assert (end, last) == (clock.now, f"work: {total} of {total} in {duration(sum(seconds))}")
    if sum(seconds) < LOG_EVERY:
        assert not between
    times = [1000.0, *(time for time, _ in between)]
    assert all(later - earlier >= LOG_EVERY for earlier, later in pairwise(times))
    silence = max(later - earlier for earlier, later in pairwise([*times, end]))
    assert silence < LOG_EVERY + max(seconds) + 1e-6
    assert all(line.endswith(" left") for _, line in between)


def test_the_time_left_is_what_the_rest_takes_at_the_pace_so_far(clock):
    with steps("train", 10, done=4) as reached:
        clock.now += 29
        reached(5, ", loss 2")
        clock.now += 31
        reached(7, ", loss 1")  # three steps of 20 s, three more to do
        reached(10)
        clock.now += 60
    assert clock.lines == ["train: 7 of 10, 60 s left, loss 1", "train: 10 of 10 in 2 min"]
    assert [duration(s) for s in (0.4, 42, 89, 90, 420, 11_100)] == [
        *("0 s", "42 s", "89 s", "2 min", "7 min", "3 h 05 min")
    ]


def test_a_stage_that_is_left_early_or_empty_says_nothing(clock):
    with pytest.raises(ZeroDivisionError):
        [1 / (4 - item) for item in progress(range(5), "more")]
    assert list(progress([], "work")) == []
    assert clock.told == []


def test_parts_of_a_stage_share_its_lines(clock):
    names = []
    with steps("evaluate", 2) as reached:
        for number, name in enumerate(("first", "second")):
            for _ in progress("abcd", name, reached=lambda share, n=number: reached(n + share)):
                names.append(current_stage())
                clock.now += 12
        assert current_stage() == "evaluate"
    assert names == ["first"] * 4 + ["second"] * 4
    assert clock.lines == [
        "evaluate: 0 of 2, 60 s left",  # three eighths in 36 s
        "evaluate: 1 of 2, 24 s left",
        "evaluate: 2 of 2 in 2 min",
    ]


def test_a_log_goes_to_stderr_as_plain_lines(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as some builders of software do
    assert list(progress("ab", "work")) == ["a", "b"]
    with without_bars():
        assert list(progress("ab", "work")) == ["a", "b"]
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1")):  # another of several processes
        monkeypatch.setenv(name, value)
    assert list(progress("ab", "work")) == ["a", "b"]
    assert capsys.readouterr() == ("", "work: 2 of 2 in 0 s\n")


@pytest.mark.parametrize("is_hidden", [True, False])
def test_a_terminal_shows_a_bar_but_not_inside_something_larger(is_hidden, monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with without_bars() if is_hidden else nullcontext():
        assert list(progress([1, 2], "work")) == [1, 2]
    out, err = capfd.readouterr()
    assert out == ""
    assert ("work" in err) != is_hidden
    assert ("\x1b[" in err) != is_hidden
    assert "of 2" not in err
