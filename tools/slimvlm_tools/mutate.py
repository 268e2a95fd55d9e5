"""Measure how many seeded faults of the source the default tests notice (mutation testing).

``map`` runs the default tests once and notes which test executes which line. ``run`` draws mutants
of five packages: one operator, constant, condition or statement of one file is changed. Each mutant
runs only the tests that execute its line, likeliest and quickest first, in a fork of a process that
has imported the libraries. One that none of them notices within the time limit counts as a
survivor, so the share killed is a lower bound.

    python -m slimvlm_tools.mutate map --out runs/mutants
    python -m slimvlm_tools.mutate run --out runs/mutants
"""

import ast
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).parents[2]
PACKAGES = ("scoring", "pruning", "training", "data", "evaluation")
# tyro imports typeguard before pytest can rewrite its assertions
PYTEST = ["-q", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
ONCE = ["-x", "-p", "no:cacheprovider", "--no-header", "--tb=no"]
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult},
}


@dataclass(frozen=True)
class Mutant:
    """A replaced piece of one file: first and last line, byte columns, and the new text."""

    file: str
    line: int
    column: int
    end_line: int
    end_column: int
    text: str

    def source(self) -> str:
        """Return the file with the piece replaced."""
        lines = (ROOT / self.file).read_bytes().splitlines(keepends=True)
        head, tail = (
            lines[self.line - 1][: self.column],
            lines[self.end_line - 1][self.end_column :],
        )
        lines[self.line - 1 : self.end_line] = [head + self.text.encode() + tail]
        return b"".join(lines).decode()


def changed(node: ast.AST) -> ast.AST | None:
    """Return another node in place of this one, or None where there is nothing to change."""
    match node:
        case ast.Compare(left, [op], rest) if type(op) in SWAPS:
            return ast.Compare(left, [SWAPS[type(op)]()], rest)  # type: ignore[list-item]
        case ast.BinOp(left, op, right) if type(op) in SWAPS:
            return ast.BinOp(left, SWAPS[type(op)](), right)  # type: ignore[arg-type]
        case ast.BoolOp(op, values):
            return ast.BoolOp(SWAPS[type(op)](), values)  # type: ignore[arg-type]
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            return operand
        case ast.Constant(bool(value)):
            return ast.Constant(not value)
        case ast.Constant(int(value)):
            return ast.Constant(value + 1)
        case ast.Constant(float(value)):
            return ast.Constant(2 * value or 1.0)
        case ast.Expr(ast.Call()) | ast.AugAssign() | ast.Continue() | ast.Break():
            return ast.Pass()
        case ast.Assign([ast.Attribute() | ast.Subscript()]):
            return ast.Pass()
    return None


def inside(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what a node holds, without annotations, decorators and messages of errors."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list") or isinstance(node, ast.Raise):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child
                yield from inside(child)


def mutants() -> Iterator[Mutant]:
    """Yield every mutant of the five packages: bodies of functions alone."""
    for path in (
        p for name in PACKAGES for p in sorted((ROOT / "src/slimvlm" / name).rglob("*.py"))
    ):
        functions = [
            n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)
        ]
        found = {}
        for node in (inner for function in functions for inner in inside(function)):
            if isinstance(node, ast.expr | ast.stmt) and (new := changed(node)) is not None:
                text = ast.unparse(ast.fix_missing_locations(new))
                text = f"({text})" if isinstance(node, ast.expr) else text
                assert node.end_lineno is not None
                assert node.end_col_offset is not None
                place = (node.lineno, node.col_offset, node.end_lineno, node.end_col_offset)
                found[place, text] = Mutant(str(path.relative_to(ROOT)), *place, text)
        yield from found.values()


def tested(source: Path, tests: list[str], seconds: float) -> tuple[str, float]:
    """Run tests on a source in a fork: ``killed``, ``timeout`` or ``survived``, and the time."""
    began = time.monotonic()
    if (child := os.fork()) == 0:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(null, stream)
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
        os.chdir(ROOT)
        sys.path[:0] = [str(source), str(ROOT / "tools"), str(ROOT)]
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:3])
        os._exit(int(import_module("pytest").main([*PYTEST, *ONCE, *tests])))
    while time.monotonic() - began < seconds:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return "survived" if code == 0 else "killed", time.monotonic() - began
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout", time.monotonic() - began


def map_(out: Path) -> None:
    """Run the default tests once and note per line which tests execute it, and their times."""
    coverage, pytest = import_module("coverage"), import_module("pytest")
    recorder = coverage.Coverage(source_pkgs=["slimvlm"], data_file=None, config_file=False)
    spent: Counter[str] = Counter()

    class Plugin:
        def pytest_runtest_protocol(self, item: Any) -> None:
            recorder.switch_context(item.nodeid)

        def pytest_runtest_logreport(self, report: Any) -> None:
            spent[report.nodeid] += report.duration

    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tools"), str(ROOT)]
    recorder.start()
    chosen = ["-m", "not slow and not gpu", str(ROOT / "tests")]
    pytest.main([*PYTEST, *chosen], plugins=[Plugin()])
    recorder.stop()
    lines: dict[str, dict[int, list[str]]] = defaultdict(dict)
    for file in recorder.get_data().measured_files():
        by_line = recorder.get_data().contexts_by_lineno(file)
        lines[str(Path(file).relative_to(ROOT))] = {
            n: [c for c in v if c] for n, v in by_line.items()
        }
    heavy = (
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "datasets",
        "tokenizers",
        "PIL",
        "pandas",
    )
    modules = [name for name in list(sys.modules) if name.startswith(heavy)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "map.json").write_text(json.dumps({"lines": lines, "spent": spent, "modules": modules}))


def run(out: Path, count: int = 300, seed: int = 0, seconds: float = 120) -> None:
    """Draw mutants, test each, append to ``mutants.jsonl`` (resumed), print the share killed."""
    known = json.loads((out / "map.json").read_text())
    drawn = random.Random(seed).sample(list(mutants()), count)
    results, spent = out / "mutants.jsonl", known["spent"]
    lines = results.read_text().splitlines() if results.exists() else []
    done = {tuple(row["place"]): row for row in map(json.loads, lines)}
    for name in known["modules"]:
        try:
            import_module(name)
        except Exception:  # a module that another one makes while it runs
            continue
    for mutant in drawn:
        if (place := (mutant.file, mutant.line, mutant.column, mutant.text)) in done:
            continue
        package, stem = Path(mutant.file).parts[2], Path(mutant.file).stem
        tests = sorted(  # those of the module, then of its package, then others
            known["lines"].get(mutant.file, {}).get(str(mutant.line), ()),
            key=lambda test: (f"test_{stem}" not in test, package not in test, spent.get(test, 0)),
        )
        outcome, took = "untested", 0.0
        if tests:
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder) / "src"
                shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
                if not done and tested(source, tests, seconds)[0] == "killed":
                    raise SystemExit("the tests of the first mutant fail without it")
                (source.parent / mutant.file).write_text(mutant.source())
                outcome, took = tested(source, tests, seconds)
        done[place] = row = {"place": place, "outcome": outcome, "tests": len(tests), "s": took}
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{outcome:8} {took:5.0f} s  {mutant.file}:{mutant.line}  {mutant.text}", flush=True)
    counts = Counter(row["outcome"] for row in done.values())
    print(dict(counts), f"killed: {counts['killed'] / len(done):.1%}")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"map": map_, "run": run})
