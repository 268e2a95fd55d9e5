"""Which package may import which: each knows those above it in `ROWS`, and none below.

Two stand aside. ``demo`` comes last and is only the model that a word means, and ``slimvlm_tools``
is no part of the product: whoever needs them imports them inside a function.
"""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml

SOURCE = Path(__file__).parents[2] / "src" / "slimvlm"
ROWS = (
    "core",  # errors, options, files; no model, no tensor
    "data",  # conversations
    "models",  # families, anatomy, reading and running models
    "scoring",  # statistics and scores of units
    "planning",  # which units stay
    "pruning",  # smaller weights, repaired and written
    "training",  # recovery
    "evaluation",  # questions, answers, comparisons, times
    "export",  # other forms of a checkpoint
    "runs",  # whole runs
    "cli",  # the command line
    "demo",  # the demo model
)
ASIDE = {"demo": ("data", "models", "evaluation", "cli"), "slimvlm_tools": ("runs", "cli")}
"""Who may import what stands aside, inside a function."""
LAZY = {("slimvlm.runs.report.__init__", "slimvlm.runs.report.charts"): "matplotlib: only to draw"}
"""Imports inside a function that may close a circle of files, each with its reason."""
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets"}


def dotted(source):
    """What a source imports, and whether that happens inside a function."""
    tree = ast.parse(source)
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inner) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from ((f"{node.module}.{alias.name}", id(node) in inner) for alias in node.names)


def complaint(package, source):
    """Why the imports of a package's file break the rule, or None."""
    for name, is_lazy in dotted(source):
        root, _, rest = name.partition(".")
        target = rest.partition(".")[0] if root == "slimvlm" else root
        if target == package or root not in ("slimvlm", "slimvlm_tools"):
            continue
        if target in ASIDE and package != "demo":
            if package not in ASIDE[target] or not is_lazy:
                return f"{package} imports {target}: only {ASIDE[target]} may, inside a function"
        elif target not in ROWS or ROWS.index(target) > ROWS.index(package):
            return f"{package} imports {target or 'the whole package'}, which stands below it"
    return None


def test_the_packages_are_these_and_core_loads_no_heavy_library():
    found = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()}
    files = {path.name for path in SOURCE.glob("*.py")}
    assert found == set(ROWS)
    assert files == {"__init__.py", "__main__.py"}
    assert (SOURCE / "py.typed").exists(), "a type checker reads annotations only beside this file"
    for path in (SOURCE / "core").rglob("*.py"):
        roots = {name.split(".")[0] for name, _ in dotted(path.read_text())}
        assert not roots & HEAVY, path


@pytest.mark.parametrize("package", ROWS)
def test_a_package_imports_only_what_stands_above_it(package):
    paths = sorted((SOURCE / package).rglob("*.py"))
    assert not {path: why for path in paths if (why := complaint(package, path.read_text()))}


def test_no_imports_of_files_form_a_circle():
    texts = {
        ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path.read_text()
        for path in SOURCE.rglob("*.py")
    }
    graph = {name: set() for name in texts}
    for name, text in texts.items():
        for target, is_lazy in dotted(text):
            package = target.rpartition(".")[0]
            places = (target, f"{target}.__init__", package, f"{package}.__init__")
            file = next((place for place in places if place in texts), name)
            graph[name] |= set() if is_lazy and (name, file) in LAZY else {file} - {name}
    TopologicalSorter(graph).prepare()  # otherwise the exception names the files
    graph["slimvlm.models.files"].add("slimvlm.pruning.layout")
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


RULES = yaml.safe_load(Path(__file__).with_name("layers.yaml").read_text())


@pytest.mark.parametrize(("package", "source", "is_good"), RULES)
def test_the_rule_can_fail_and_pass(package, source, is_good):
    assert (complaint(package, source) is None) == is_good


APART = ("contract", "gpu", "journeys", "oracles", "pretended_gpu", "tools", "trust")
"""Folders of tests about more than one file of the package."""


def homeless(test):
    """Whether a test mirrors no file of the package; ``test_x.py`` of a folder ``x`` does."""
    source = SOURCE / test.parent / test.name.removeprefix("test_")
    return not (source.exists() or source.with_suffix("").is_dir() or test.parts[0] in APART) and (
        test.stem != f"test_{test.parent.name}"
    )


def test_every_test_mirrors_a_source():
    tests = SOURCE.parents[1] / "tests"
    assert [t for t in tests.rglob("test_*.py") if homeless(t.relative_to(tests))] == []
    assert homeless(Path("runs/test_everything.py"))


# Tests use what users may use: no test reads or replaces a name with a leading underscore.
ALLOWED = {"_HOME", "_replace"}
"""What pages are compared with, and a method of Python's own tuples."""
GIVEN = re.compile(r"^(?: {4})?(?:async def |def |class )?(_[A-Za-z]\w*)\b(?=\(|:| =)", re.M)
USED = re.compile(r"(?:(?<!\bself)\.|import |, |['\"]|^ {4}(?=_\w+,$))(_[A-Za-z]\w*)", re.M)


def found(pattern, *folders):
    """What a pattern finds in the sources below some folders, each with its file."""
    paths = (
        path for folder in folders for path in sorted((SOURCE.parents[1] / folder).rglob("*.py"))
    )
    return [(str(path), name) for path in paths for name in pattern.findall(path.read_text())]


def test_only_public_names_are_used():
    ours = {name for _, name in found(GIVEN, "src", "tools")} - ALLOWED
    assert len(ours) > 100
    assert [use for use in found(USED, "tests") if use[1] in ours] == []


def test_private_names_are_found():
    for code in ("from a import _b", "import a, _b", "c._b", "patch(c, '_b')", "patch('a.c._b')"):
        assert USED.findall(code) == ["_b"]
