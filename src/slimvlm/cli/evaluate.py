"""Ask a benchmark's questions, and set two models side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from slimvlm.cli.options import INLINE, Model, check_model, load_model
from slimvlm.cli.printing import console, note, print_json
from slimvlm.core.errors import ConfigError
from slimvlm.core.options import LoadConfig

if TYPE_CHECKING:
    from slimvlm.data.samples import Task
    from slimvlm.evaluation.compare import Comparison
    from slimvlm.evaluation.results import Result


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What models are asked."""

    tasks: str = "demo"
    """Comma-separated names: built-in tasks (demo for all), YAML files of your own, or the study's
    benchmarks mme, pope, gqa, scienceqa_img, mmmu_val, ai2d, mathvista, docvqa (needs
    slimvlm[eval])."""
    task_folder: Path | None = None
    """Folder with local copies of the benchmarks' task files."""
    limit: int | None = None
    """Only the first so many questions of each task."""
    batch_size: int = 16
    """Questions answered at once."""
    blind: bool = False
    """Show the pictures of other questions: the floor of a model that cannot see."""
    floors: bool = False
    """Ask the original model (without --baseline, this one) a second time, blind, so that tables
    show each task's blind floor and retention above the floors."""
    log: Path | None = None
    """Folder that keeps replies as they come; a stopped evaluation goes on there."""

    def find(self) -> tuple[list[Task], list[str]]:
        """Our own tasks, and the names of lmms-eval's.

        Raises:
            ConfigError: If something is unknown, or not possible together.
        """
        from slimvlm.evaluation.lmms import check_names, split_names
        from slimvlm.evaluation.tasks import find_tasks

        own, theirs = split_names(self.tasks)
        chosen = find_tasks(own) if own or not theirs else []
        if theirs:
            check_names(theirs, self.limit, self.task_folder)
            if self.blind or self.floors or self.log is not None:
                raise ConfigError(f"--blind, --floors and --log do not work with {theirs[0]!r}")
        if self.blind and self.floors:
            raise ConfigError("--floors: a --blind result is the floor; leave out one of them")
        return chosen, theirs

    def ask(self, model: str, loading: LoadConfig, floors: bool = False) -> Result:
        """Load a model and ask it everything."""
        from slimvlm.evaluation.lmms import evaluate_all

        self.find()
        return evaluate_all(
            *load_model(model, loading),
            self.tasks,
            self.limit,
            self.batch_size,
            f"{model} (blind)" if self.blind else model,
            self.log,
            floors,
            self.task_folder,
            self.blind,
        )


def evaluate(
    model: Model,
    questions: Annotated[Questions, INLINE] = Questions(),
    baseline: str | None = None,
    out: Path | None = None,
    loading: Annotated[LoadConfig, INLINE] = LoadConfig(),
    force: bool = False,
    json: bool = False,
) -> None:
    """Ask a benchmark's questions and score the answers.

    Args:
        model: Folder, hub id, or demo.
        questions: What models are asked.
        baseline: The original model, or a result file of it: adds retention with an interval.
        out: Result file (JSON), answers included.
        loading: How models are read.
        force: Replace an existing result file.
        json: Print JSON.
    """
    from slimvlm.core.files import require_free
    from slimvlm.evaluation.results import read_baseline
    from slimvlm.runs import tables as summary

    questions.find()
    if out is not None:
        require_free(out, force)
    check_model(model, loading)
    results: dict[str, Result] = {}
    if baseline is not None and Path(baseline).is_file():
        results["baseline"] = read_baseline(baseline, questions.blind, questions.floors)
    elif baseline is not None:
        check_model(baseline, loading)
        results["baseline"] = questions.ask(baseline, loading, questions.floors)
    results["model"] = questions.ask(model, loading, questions.floors and baseline is None)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        results["model"].save(out)
    if json:
        print_json(summary.result_json(results))
    else:
        console().print(summary.as_table(*summary.result_rows(results)))


def compare(
    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")],
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")],
    tasks: str = "demo",
    limit: int | None = None,
    out: Path | None = None,
    loading: Annotated[LoadConfig, INLINE] = LoadConfig(),
    force: bool = False,
    json: bool = False,
) -> None:
    """Set two models side by side, answer by answer: both right, lost, gained, both wrong.

    Args:
        a: The original: a result file of evaluate --out, or a model.
        b: The other one, likewise.
        tasks: Tasks that models are asked; those of result files are in the files.
        limit: Only the first so many questions of each task, for models.
        out: One HTML file with every lost answer and its picture.
        loading: How models are read.
        force: Replace an existing file.
        json: Print JSON.
    """
    from slimvlm.core.files import require_free, write_text
    from slimvlm.evaluation.ask import evaluate as ask
    from slimvlm.evaluation.compare import compare as set_side_by_side
    from slimvlm.evaluation.compare import comparison_json
    from slimvlm.evaluation.results import Result
    from slimvlm.evaluation.tasks import builtin_tasks, find_tasks
    from slimvlm.runs.report.gallery import comparison_html

    chosen = find_tasks(tasks)
    if out is not None:
        require_free(out, force)
    results = {name: Result.load(name) for name in (a, b) if name.endswith(".json")}
    for name in {a, b} - set(results):
        check_model(name, loading)
    for name in (a, b):
        if name not in results:
            results[name] = ask(*load_model(name, loading), chosen, limit, name=name)
    known = {**builtin_tasks(), **{task.name: task for task in chosen}}
    found = set_side_by_side(results[a], results[b], known)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, comparison_html(found, f"What {found.name_b} lost and gained"))
    if json:
        print_json(comparison_json(found))
    else:
        _print_comparison(found)


def _print_comparison(found: Comparison) -> None:
    from slimvlm.evaluation.compare import comparison_rows
    from slimvlm.runs.tables import as_table

    title = f"A: {found.name_a}   B: {found.name_b}"
    console().print(as_table(*comparison_rows(found), title=title))
    if found.note:
        note(found.note)
    for name, why in found.left_out.items():
        note(f"{name} is not compared: {why}")


def chat(
    model: Model,
    question: Annotated[str, tyro.conf.Positional],
    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = (),
    other: str | None = None,
    max_new_tokens: int = 64,
    loading: Annotated[LoadConfig, INLINE] = LoadConfig(),
    json: bool = False,
) -> None:
    """Ask one model, or two side by side.

    Args:
        model: Folder, hub id, or demo.
        question: What to ask.
        image: A picture to show; give it again for more.
        other: A second model to ask the same.
        max_new_tokens: Longest answer.
        loading: How models are read.
        json: Print JSON.
    """
    from slimvlm.data.samples import Question
    from slimvlm.evaluation.ask import answer

    missing = [str(path) for path in image if not path.is_file()]
    if missing:
        raise ConfigError(f"image {missing[0]!r}: no such file")
    names = [model, *([other] if other is not None else [])]
    for name in names:
        check_model(name, loading)
    asked = Question("chat", question, ("",), tuple(image))
    replies = {n: answer(*load_model(n, loading), [asked], max_new_tokens)[0] for n in names}
    if json:
        print_json(replies)
    else:
        for name, reply in replies.items():
            print(f"{name}: {reply}" if other is not None else reply)
