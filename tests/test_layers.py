"""Which file may import which: every file has a row, and looks only sideways or up.

Words know nothing, maths knows words, hands touch models and files, stages use hands, runs chain
stages, faces talk to people. The demo stands aside: nobody needs it to prune a model.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "slimvlm"
ROWS: dict[str, tuple[str, ...]] = {
    "words": (
        *(
            "errors",
            "config",
            "backbones",
            "families",
            "samples",
            "recipes",
            "progress",
            "ranks",
            "html",
        ),
        "commands",
        "outputs",
    ),
    "maths": (
        "layers",
        "geometry",
        "units",
        "cost",
        "values",
        "losses",
        "roles",
        "scores",
        "plan",
        "planning",
        "metrics",
        "serving",
        "least_squares",
    ),
    "hands": (
        *("compat", "configs", "capture", "surgery", "uneven", "modeling_pruned", "checkpoint"),
        *("trainable", "hidden", "teacher", "modes", "sharding"),
        *("data", "chat", "tasks", "images", "answers", "identity", "manifest", "cards", "hub"),
        *("timing", "memory", "results"),
    ),
    "stages": (
        *("calibrate", "iterative", "search", "repair", "pruning", "narrowing"),
        "streaming",
        *("offline_teacher", "distillation", "resumption", "recovery"),
        *(
            "evaluation",
            "lmms",
            "lmms_adapter",
            "conversion",
            "speed",
            "quantization",
            "gguf_export",
        ),
    ),
    "runs": (
        *("compression", "study", "summary", "showcase"),
        *("comparison", "gallery", "report", "advice", "estimate"),
    ),
    "faces": ("cli", "verbs", "__init__", "__main__"),
}
DEPTH = {name: depth for depth, names in enumerate(ROWS.values()) for name in names}
DEMO_DEPTH = list(ROWS).index("hands")
DEMO_USERS = ("checkpoint", "data", "tasks", *ROWS["faces"])
"""Where the word ``demo`` may be given as a model, as data or as tasks, and the faces."""
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The first name below the package: ``scores`` for scores/width.py, ``plan`` for plan.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def _targets(node: ast.AST, package: list[str]) -> Iterator[list[str]]:
    """Dotted names below ``slimvlm`` that a statement imports, as lists of names."""
    if isinstance(node, ast.Import):
        dotted = [alias.name.split(".") for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        start = package[: len(package) - node.level + 1] if node.level else []
        base = start + (node.module.split(".") if node.module else [])
        dotted = [[*base, alias.name] for alias in node.names]
    else:
        return
    for names in dotted:
        if names[0] == "slimvlm":
            yield names[1:]


def imports(source: str, package: list[str]) -> Iterator[tuple[str, bool]]:
    """Parts of slimvlm that a source imports, and whether that happens inside a function."""
    tree = ast.parse(source)
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        for names in _targets(node, package):
            known = names and names[0] in {*DEPTH, "demo"}
            yield (names[0] if known else "__init__"), id(node) in lazy


def complaint(part: str, source: str, package: list[str]) -> str | None:
    """Why a file's imports break the rule, or None."""
    for target, lazy in imports(source, package):
        if target == "demo" and part != "demo":
            if part not in DEMO_USERS or not lazy:
                users = ", ".join(DEMO_USERS)
                return f"{part} imports demo: only {users} may, inside a function"
        elif target != "demo" and DEPTH[target] > DEPTH.get(part, DEMO_DEPTH):
            return f"{part} imports {target}, which stands below it"
    return None


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_has_a_row(path: Path) -> None:
    part = part_of(path)
    assert part == "demo" or part in DEPTH, (
        f"{name_of(path)} is in no row of {Path(__file__).name}: say whether it is "
        f"{', '.join(ROWS)} and add it there"
    )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_sideways_or_up(path: Path) -> None:
    package = ["slimvlm", *path.relative_to(PACKAGE).parent.parts]
    assert complaint(part_of(path), path.read_text(), package) is None


@pytest.mark.parametrize("path", [p for p in FILES if DEPTH.get(part_of(p), 9) < DEMO_DEPTH],
                         ids=name_of)  # fmt: skip
def test_words_and_maths_do_not_know_transformers(path: Path) -> None:
    tree = ast.parse(path.read_text())
    roots = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert not roots & {"transformers", "peft", "accelerate", "datasets"}


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("plan", "from slimvlm.surgery import prune_"),
        ("plan", "from slimvlm import surgery"),
        ("plan", "def f():\n    import slimvlm.cli"),
        ("losses", "from .capture import capture_gates"),
        ("geometry", "import slimvlm as sv"),
        ("checkpoint", "from slimvlm.demo.model import load"),
        ("recovery", "def f():\n    from slimvlm.demo import model"),
        ("demo", "from slimvlm.calibrate import score"),
    ],
)
def test_the_rule_can_fail(part: str, source: str) -> None:
    assert complaint(part, source, ["slimvlm"]) is not None


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("capture", "from slimvlm.scores.width import taylor"),
        ("plan", "from .values import Scores"),
        ("cli", "def f():\n    from slimvlm.demo.model import load"),
        ("demo", "from slimvlm.demo.tower import Tower\nfrom slimvlm.samples import Task"),
    ],
)
def test_the_rule_lets_good_imports_pass(part: str, source: str) -> None:
    assert complaint(part, source, ["slimvlm"]) is None
