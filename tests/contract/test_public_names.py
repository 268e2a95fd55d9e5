"""Tests use what users may use: no test reads or replaces a name with a leading underscore."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("slimvlm", "slimvlm_tools")
TESTS = [path for path in sorted((ROOT / "tests").rglob("*.py")) if path != Path(__file__)]


def is_private(name):
    return name.startswith("_") and not name.endswith("__") and name != "_"


def defined(tree):
    """Private names that a file, or a class in it, gives to something."""
    found = set()
    for scope in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))):
        for node in scope.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [name for target in targets for name in ast.walk(target)]
                found |= {name.id for name in names if isinstance(name, ast.Name)}
    return {name for name in found if is_private(name)}


PRIVATE = frozenset().union(
    *(defined(ast.parse(path.read_text())) for top in ("src", "tools")
      for path in sorted((ROOT / top).rglob("*.py")))
)  # fmt: skip


def used(code):
    """Private names of ours in some code, and in code that stands in its strings."""
    tree, found = ast.parse(code), []
    bound = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [name for name in names if is_private(name)]
            bound |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if isinstance(node.value, ast.Name) and node.value.id in bound:
                found.append(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += in_string(node.value)
    return found


def in_string(text):
    """A name to be replaced, the dotted path of one, or the code of another process."""
    if "\n" in text and "slimvlm" in text:
        try:
            return used(text)
        except SyntaxError:
            return []
    is_path = text.split(".")[0] in OURS and text.replace(".", "").isidentifier()
    names = text.split(".") if is_path else [text]
    return [name for name in names if is_private(name) and (is_path or name in PRIVATE)]


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT / "tests")))
def test_only_public_names_are_used(path):
    assert used(path.read_text()) == []


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("from slimvlm.models.losses import _CHUNK", ["_CHUNK"]),
        ("from slimvlm.runs._secret import thing", ["_secret"]),
        ("from slimvlm.models import losses\nlosses._CHUNK", ["_CHUNK"]),
        ("from slimvlm.models import losses as l\npatch.setattr(l, '_CHUNK', 4)", ["_CHUNK"]),
        ("patch.setattr('slimvlm.models.losses._anything', 4)", ["_anything"]),
        ("KILLED = 'from slimvlm.models.losses import _CHUNK\\nprint()'", ["_CHUNK"]),
        ("from slimvlm.models.losses import CHUNK as _private", []),
        ("import torch\ntorch._C\nmodel.config._name_or_path", []),
        ("from tests.runs.study.study_files import study\nstudy(None)", []),
    ],
)
def test_private_names_of_ours_are_found(code, names, monkeypatch):
    monkeypatch.setitem(globals(), "PRIVATE", PRIVATE | {"_CHUNK"})
    assert used(code) == names
