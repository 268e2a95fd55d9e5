"""What errors of other libraries become in ours."""

import pytest

from slimvlm.core.errors import one_line, printable


@pytest.mark.parametrize(
    ("said", "told"),
    [("one\ntwo", "one two"), (" one\n\n  two ", "one two"), ("", "OSError"), ("\n", "OSError")],
)
def test_an_error_is_told_in_one_line_even_if_it_says_nothing(said, told):
    assert one_line(OSError(said)) == told
    assert printable(f"12\xa0€ {told}\x1b") == f"12\xa0€ {told}\\x1b"
