"""Tests use what users may use: no test reads or replaces a name with a leading underscore."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ALLOWED = {"_HOME", "_replace"}
"""What pages are compared with, and a method of Python's own tuples."""
GIVEN = re.compile(r"^(?: {4})?(?:async def |def |class )?(_[A-Za-z]\w*)\b(?=\(|:| =)", re.M)
USED = re.compile(r"(?:(?<!\bself)\.|import |, |['\"]|^ {4}(?=_\w+,$))(_[A-Za-z]\w*)", re.M)


def found(pattern, *folders):
    """What a pattern finds in the sources below some folders, each with its file."""
    paths = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return [(str(path), name) for path in paths for name in pattern.findall(path.read_text())]


def test_only_public_names_are_used():
    ours = {name for _, name in found(GIVEN, "src", "tools")} - ALLOWED
    assert len(ours) > 100
    assert [use for use in found(USED, "tests") if use[1] in ours] == []


def test_private_names_are_found():
    for code in ("from a import _b", "import a, _b", "c._b", "patch(c, '_b')", "patch('a.c._b')"):
        assert USED.findall(code) == ["_b"]
