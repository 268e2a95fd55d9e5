"""What errors of other libraries become in ours."""

from __future__ import annotations

import pytest

from slimvlm.core.errors import first_line, one_line

SAID = [("one\ntwo", "one"), ("\n  one \n", "one"), ("", "OSError"), (" ", "OSError")]


@pytest.mark.parametrize(("said", "told"), SAID)
def test_an_error_is_told_in_one_line_even_if_it_says_nothing(said: str, told: str) -> None:
    assert first_line(OSError(said)) == told


def test_all_that_an_error_says_fits_in_one_line() -> None:
    assert one_line(OSError(" one\n\n  two ")) == "one two"
    assert one_line(OSError("\n")) == "OSError"
