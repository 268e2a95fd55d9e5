"""Run the paper's nine benchmarks through lmms-eval: model + names → the same `TaskResult`s."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image, ImageFile
from transformers import PreTrainedModel

from slimvlm.core.errors import ConfigError, one_line
from slimvlm.core.options import Questions
from slimvlm.core.tables import read_table
from slimvlm.data.chat import plain_question
from slimvlm.data.samples import Question
from slimvlm.evaluation.ask import (
    answer,
    batches_by_length,
    evaluate,
    with_costs,
)
from slimvlm.evaluation.metrics import MME_FULL_SCORES, answer_of
from slimvlm.evaluation.results import Result, TaskResult
from slimvlm.models.hidden import evaluating

LONGEST_REPLY = 1024  # longest reply in tokens, MathVista would allow 16384; cut ones are counted


def _scores(read: str, values: Sequence[Any]) -> list[float]:
    """Read one score for each question from what a task stores for its metric."""
    if read == "mmmu":
        from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

        return [float(evaluate_mmmu([value])[1]["acc"]) for value in values]
    if read == "mme":  # 100 x the mean of these is the MME score, which adds up, over categories,
        # the percentages of right answers and of images with both answers right
        table = pd.DataFrame(list(values))[["category", "question_id", "score"]]
        pairs = table.groupby(["category", "question_id"])["score"].transform("sum") == 2
        images = table.groupby("category")["question_id"].transform("nunique")
        return [*(len(table) / 2 * (table["score"] + pairs) / images).astype(float)]
    found = []  # numbers, or mappings with a usual name
    for value in values:
        if isinstance(value, Mapping):
            value = value.get("score", value.get("true_false"))
        if value is None or isinstance(value, (str, Sequence)):
            raise ConfigError("the task's metric keeps no number for each question")
        found.append(float(value))
    return found


@dataclass(frozen=True)
class LmmsRow:
    """One benchmark of lmms-eval."""

    task: str  # lmms-eval's name
    metric: str = ""  # key of the score in its results; the task's first metric if empty
    full: float = 1.0  # score of a perfect model
    chance: float = 0.0  # score of guessing, in percent of the full score
    read: str = "numbers"  # how `_scores` reads them: numbers, mmmu or mme
    details: Mapping[str, str] = field(default_factory=dict)  # further metrics on the same scale
    together: int = 1  # questions that are scored as one; a limit must be a multiple
    needs_judge: bool = False  # whether another language model reads the replies


LMMS_TASKS = {key: LmmsRow(**row) for key, row in read_table(__file__, "lmms.yaml").items()}
"""The paper's benchmarks; ``mme`` names both of its halves."""


def split_names(names: str) -> tuple[str, list[str]]:
    """Separate a comma-separated list into our own tasks and those of lmms-eval."""
    parts = [part.strip() for part in names.split(",") if part.strip()]
    known = {*LMMS_TASKS, *(row.task for row in LMMS_TASKS.values())}
    theirs = [part for part in parts if part in known]
    return ",".join(part for part in parts if part not in known), theirs


def check_names(
    names: Sequence[str], limit: int | None = None, task_folder: str | Path | None = None
) -> dict[str, LmmsRow]:
    """Find the rows of these benchmarks; refuse here what would fail after hours of answering."""
    if find_spec("lmms_eval") is None:
        raise ConfigError("lmms-eval is not installed: pip install 'slimvlm[eval]'")
    subtasks = [] if task_folder is None else list(_index(str(task_folder)).all_subtasks)
    rows: dict[str, LmmsRow] = {}
    for name in names:
        # by key, or by task: two for mme
        found = {key: row for key, row in LMMS_TASKS.items() if name in (key, row.task)}
        if not found and name in subtasks:
            found = {name: LmmsRow(name)}
        if not found:
            known = ", ".join([*LMMS_TASKS, *subtasks])
            raise ConfigError(f"task {name!r} is not known. Choose from: mme, {known}")
        rows |= found
    for name, row in rows.items():
        if limit is not None and limit % row.together:
            raise ConfigError(
                f"limit {limit}: task {name!r} scores {row.together} questions as one; "
                f"give a multiple of {row.together}"
            )
        needs_key = row.needs_judge and os.environ.get("API_TYPE", "openai") == "openai"
        if needs_key and not os.environ.get("OPENAI_API_KEY"):
            raise ConfigError(
                f"task {name!r}: lmms-eval has a judge model read the replies; set OPENAI_API_KEY "
                "(and OPENAI_API_URL and MODEL_VERSION for a server of your own)"
            )
    return rows


def evaluate_with_lmms(
    model: PreTrainedModel,
    processor: Any,
    names: Sequence[str],
    limit: int | None = None,
    batch_size: int = 1,
    task_folder: str | Path | None = None,
) -> dict[str, TaskResult]:
    """Run benchmarks in lmms-eval's own runner; greedy replies through our chat code.

    ``names`` are keys of `LMMS_TASKS`, lmms-eval's names of them, or tasks in ``task_folder``
    (files in its format), which replace those of the same name that it ships. A half of MME that
    is not among the first ``limit`` questions is left out.
    """
    rows = check_names(names, limit, task_folder)
    from tenacity import RetryError  # comes with lmms-eval

    folder, tasks = None if task_folder is None else str(task_folder), {}
    for name in dict.fromkeys(row.task for row in rows.values()):
        is_own = folder is not None and name in _index(folder).all_subtasks
        manager = _index(folder if is_own else None)
        with contained():
            try:
                tasks[name] = manager.load_task_or_group(name)[name]
            except (RetryError, ImportError, OSError, ValueError) as error:
                inner = error.last_attempt.exception() if isinstance(error, RetryError) else error
                assert inner is not None
                raise ConfigError(
                    f"task {name!r}: its data cannot be loaded. lmms-eval takes it from the "
                    f"Hugging Face hub or its cache; offline, download it first ({one_line(inner)})"
                ) from error
        if tasks[name].OUTPUT_TYPE != "generate_until":
            raise ConfigError(f"task {name!r}: only tasks with one generated reply are supported")
    results: dict[str, TaskResult] = {}
    with evaluating(model):
        for name, task in tasks.items():
            replies: dict[int, tuple[str, bool]] = {}
            with contained():
                from lmms_eval.evaluator import simple_evaluate
                from lmms_eval.tasks import TaskManager

                seeds = ("random_seed", "numpy_random_seed", "torch_random_seed")
                output: dict[str, Any] = simple_evaluate(
                    model=adapter(model, processor, batch_size, replies),
                    tasks=[task],
                    task_manager=TaskManager(include_defaults=False),
                    limit=limit,
                    bootstrap_iters=0,
                    process_docs_parallel=1,
                    **dict.fromkeys(seeds),
                )
            of_task = {key: row for key, row in rows.items() if row.task == name}
            results |= _results(of_task, task, output, replies)
    return {key: results[key] for key in rows if key in results}


def _results(
    rows: Mapping[str, LmmsRow],
    task: Any,
    output: Mapping[str, Any],
    replies: Mapping[int, tuple[str, bool]],
) -> dict[str, TaskResult]:
    name = next(iter(rows.values())).task
    samples: dict[int, Mapping[str, Any]] = {}
    for sample in output["samples"][name]:  # once for each filter; the first one counts
        samples.setdefault(int(sample["doc_id"]), sample)
    totals: dict[str, Any] = {}
    for key, value in output["results"][name].items():  # keys are "metric,filter"
        totals.setdefault(key.split(",")[0], value)
    results = {}
    for key, row in rows.items():
        metric = row.metric or next(iter(task.aggregation()))
        if metric not in totals:
            continue
        scored = [index for index in sorted(samples) if metric in samples[index]]
        scale = MME_FULL_SCORES.get(key, 100.0) / row.full
        results[key] = TaskResult(
            metric=metric,
            score=scale * float(totals[metric] or 0.0),  # MathVista says None for zero
            chance=row.chance,
            in_average=True,
            ids=tuple(map(str, scored)),
            replies=tuple(replies[index][0] for index in scored),
            cut=sum(replies[index][1] for index in scored),
            scores=tuple(_scores(row.read, [samples[index][metric] for index in scored])),
            details={k: scale * float(totals[other]) for k, other in row.details.items()},
        )
    if not results:
        wanted = ", ".join(row.metric for row in rows.values())
        raise ConfigError(f"task {name!r}: lmms-eval gave no {wanted} on these questions")
    return results


def evaluate_all(
    model: PreTrainedModel,
    processor: Any,
    asked: Questions,
    name: str = "",
    log_folder: str | Path | None = None,
) -> Result:
    """Evaluate on our own tasks and on lmms-eval's; a log and floors are for ours."""
    own, theirs = split_names(asked.tasks)
    how: dict[str, Any] = {"limit": asked.limit, "batch_size": asked.batch_size}
    found: dict[str, TaskResult] = {}
    if own or not theirs:
        ours = (asked.limit, asked.batch_size, name, log_folder, asked.floors)
        result = evaluate(model, processor, own, *ours)
    if theirs:
        found = evaluate_with_lmms(model, processor, theirs, **how, task_folder=asked.task_folder)
    if not own and theirs:  # without a question of our own, times are measured on a grey image
        return with_costs(model, processor, found, plain_question(processor), name, **how)
    return replace(result, tasks={**result.tasks, **found})


@cache
def _index(task_folder: str | None = None) -> Any:
    """Read the tasks in a folder, or the two thousand that lmms-eval ships, which takes seconds."""
    if task_folder is not None and not Path(task_folder).is_dir():
        raise ConfigError(f"task_folder {task_folder!r} is not a folder")
    with contained():
        from lmms_eval.tasks import TaskManager

        return TaskManager(include_path=task_folder, include_defaults=task_folder is None)


def adapter(
    model: PreTrainedModel, processor: Any, batch_size: int, replies: dict[int, tuple[str, bool]]
) -> Any:
    """Wrap a model for a run of one task; ``replies`` receives them, and whether they are cut off.

    The keys are indices of questions. The runner gets replies without thoughts.
    """
    from lmms_eval.api.model import lmms

    class Adapter(lmms):  # type: ignore[misc]
        accelerator = None  # else the runner makes one, and with it global state

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            options = requests[0].args[1]
            longest = min(int(options.get("max_new_tokens", LONGEST_REPLY)), LONGEST_REPLY)
            stops = options.get("until") or ()
            stops = [stops] if isinstance(stops, str) else stops
            found = [("", False)] * len(requests)
            prompts, task = [request.args[0] for request in requests], str(requests[0].args[4])
            for batch in batches_by_length(prompts, batch_size, task):
                asked = [_question(requests[place], self.task_dict) for place in batch]
                answers = answer(model, processor, asked, longest)
                for place, (whole, is_cut) in zip(batch, answers, strict=True):
                    text = answer_of(whole)
                    for stop in filter(None, stops):
                        is_cut &= stop not in text
                        text = text.split(stop)[0]
                    found[place] = text.strip(), is_cut
            replies.update((r.args[3], reply) for r, reply in zip(requests, found, strict=True))
            return [text for text, _ in found]

        def loglikelihood(self, requests: Sequence[Any]) -> Any:
            raise NotImplementedError

        generate_until_multi_round = loglikelihood

    return Adapter()


def _question(request: Any, documents: Mapping[str, Any]) -> Question:
    prompt, _, images_of, index, task, split = request.args
    shown = images_of(documents[task][split][index]) or ()
    if not all(isinstance(image, Image.Image) for image in shown):
        raise ConfigError(f"task {task!r} shows something other than images")
    return Question(str(index), prompt, (), tuple(shown))


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Let lmms-eval log nothing and print to stderr, and Pillow accept truncated images."""
    from loguru import logger

    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    logger.disable("lmms_eval")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.enable("lmms_eval")
        ImageFile.LOAD_TRUNCATED_IMAGES = before
