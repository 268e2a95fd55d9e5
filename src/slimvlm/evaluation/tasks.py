"""Find tasks by name, or read one from a YAML file: data + prompt + metric."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from slimvlm.core.documents import built, read_yaml
from slimvlm.core.errors import ConfigError, DataError, raised_as, shortened
from slimvlm.core.progress import to_log
from slimvlm.data.read import read_rows
from slimvlm.data.samples import Question, Task, find_image
from slimvlm.evaluation.metrics import LIKELIHOODS, metric_named
from slimvlm.evaluation.results import CHOICE_BENCHMARKS


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """A task of the user's own, as written in a YAML file.

    A question's id is the row's column ``id``, or without one the number of the row from 0.
    Ids must differ: results and logs keep replies by id, and `evaluate` refuses equal ones.
    """

    name: Annotated[str, Field(min_length=1, max_length=100)]  # unique
    # a .json, .jsonl, .parquet, a datasets folder or a hub id; relative to the YAML file
    data: str
    prompt: str  # columns in braces: ``{question} Answer with one word.``; may be empty for a loss
    answer: str  # column with the answer, or a list of accepted ones
    # one of `METRICS` for the reply or of `LIKELIHOODS` for the answer itself
    metric: str = "exact_match"
    # by default test, or validation, or else train
    split: Literal["test", "validation", "train"] | None = None
    # column with the image, its path, or a list of them (``image``, if there is one); else text
    image: str | None = None
    images: str = "."  # folder that image paths start from; relative to the YAML file
    choices: str = ""  # column with the list of choices
    by_likelihood: bool = False  # take the likeliest choice instead of generating
    chance: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.0  # in percent
    max_new_tokens: Annotated[int, Field(ge=1, le=2**15)] = 16  # longest answer
    like: str = ""  # the published benchmark that it stands for

    def __post_init__(self) -> None:
        if self.metric not in LIKELIHOODS:
            with raised_as(ConfigError, ConfigError, f"task {self.name!r}:"):
                metric_named(self.metric)
        elif self.by_likelihood:
            raise ConfigError(f"task {self.name!r}: {self.metric} chooses nothing by_likelihood")
        if self.name in CHOICE_BENCHMARKS:  # some have scores of their own scale
            raise ConfigError(f"task {self.name!r}: a benchmark of the paper has this name")
        if self.by_likelihood and not self.choices:
            raise ConfigError(f"task {self.name!r}: by_likelihood needs choices")
        if "{" in (rest := re.sub(_COLUMN, "", self.prompt)) or "}" in rest:
            told = "has a brace without its other one; {{ and }} stand for braces themselves"
            raise ConfigError(f"task {self.name!r}: prompt {shortened(self.prompt)} {told}")

    def filled_prompt(self, values: Mapping[str, Any]) -> str:
        """Fill in a row's columns; braces hold a name, never an attribute, an index or a format."""
        return _COLUMN.sub(lambda f: f[0][0] if f[1] is None else str(values[f[1]]), self.prompt)


_COLUMN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


def builtin_tasks() -> dict[str, Task]:
    """Return all tasks that work without a network, by name."""
    from slimvlm.demo.questions import TASKS

    return dict(TASKS)


def find_tasks(names: str) -> list[Task]:
    """Find tasks from a comma-separated list of names and YAML files; ``demo``: all built-in ones.

    Raises:
        ConfigError: If a name is not known, or a file is not a task.
    """
    known = builtin_tasks()
    chosen: dict[str, Task] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name.endswith((".yaml", ".yml")):
            task = read_task(name)
            if task.name in {**known, **chosen}:
                raise ConfigError(f"task {task.name!r}: two tasks have this name")
            chosen[task.name] = task
        elif name == "demo" or name in known:
            chosen.update(known if name == "demo" else {name: known[name]})
        else:
            raise ConfigError(f"task {name!r} is not known. Choose from: demo, {', '.join(known)}")
    if not chosen:
        raise ConfigError(f"tasks {names!r} names no task")
    return list(chosen.values())


def read_task(path: str | Path) -> Task:
    """Read a task from a YAML file; see `TaskRow` for the fields."""
    row = built(TaskRow, read_yaml(path, "task"), f"task {str(path)!r}")
    alike = ("name", "metric", "chance", "max_new_tokens", "like", "by_likelihood")
    given = {name: getattr(row, name) for name in alike}
    load = partial(_load, row, Path(path).absolute().parent)
    return Task(**given, load=load, in_average=row.metric not in LIKELIHOODS)


_to_log_once = cache(to_log)


def _load(row: TaskRow, folder: Path, limit: int | None) -> Sequence[Question]:
    near, task = folder / row.data, f"task {row.name!r}"
    splits = (row.split,) if row.split else ("test", "validation", "train")
    say = lambda split: _to_log_once(f"{task}: questions are those of the {split} split")  # noqa: E731
    rows = read_rows(near if near.exists() else row.data, splits=splits, say=say)
    if row.split and near.is_file():
        raise ConfigError(f"{task}: split {row.split!r}: a single file has no splits")
    where = "" if near.exists() else f" nothing of this name in {str(folder)!r}:"
    with raised_as(ConfigError, ConfigError, f"{task}:{where}"):
        given = list(islice(rows, limit))
    column = "image" if row.image is None else row.image
    questions = []
    for index, values in enumerate(given):
        if isinstance(values, DataError):
            raise DataError(f"{task}: {values}")
        if not isinstance(values, dict):
            raise DataError(f"{task}: row {index} is not an object")
        known = {column: value for column, value in values.items() if value is not None}
        name = str(known.get("id", index))
        where = f"{task}: row {shortened(name)}"
        try:
            prompt, answer = row.filled_prompt(known), values[row.answer]
            choices = values[row.choices] if row.choices else ()
        except KeyError as error:
            told = f"has no column {shortened(error.args[0])}, or null in it"
            raise DataError(f"{where} {told}") from error
        if row.choices and not (isinstance(choices, list) and choices and None not in choices):
            raise DataError(f"{where}: {shortened(row.choices)} must be a list of choices")
        accepted = answer if isinstance(answer, list) else [answer]
        if not accepted or any(one in (None, "") for one in accepted):
            raise DataError(f"{where} has no answer")
        shown = values.get(column)
        pictures = [] if shown is None else shown if isinstance(shown, list) else [shown]
        question = Question(
            id=name,
            prompt=prompt,
            answers=tuple(map(str, accepted)),
            images=tuple(find_image(p, name, folder / row.images) for p in pictures),
            choices=tuple(map(str, choices)),
        )
        questions.append(question)
        if row.by_likelihood:
            score = metric_named(row.metric)
            if not any(score(choice, question) for choice in question.choices):
                told = f"{row.metric} finds no choice right by answer"
                raise DataError(f"{where}: {told} {shortened(question.answers[0])}")
    if column and (row.image or row.images != TaskRow.images):  # else it may be a task of texts
        found = [v for v in chain(given, rows) if isinstance(v, dict)]
        if all(v.get(column) is None for v in found):
            names = shortened(", ".join(dict.fromkeys(chain(*found))))
            raise DataError(f"{task}: no row has an image in column {column!r}; columns: {names}")
    return questions
