"""Ask a model a benchmark's questions and score its answers: model + tasks → `Result`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedModel

from slimvlm import chat, losses, metrics
from slimvlm.answers import AnswerLog, fingerprint, key_of
from slimvlm.checkpoint import anatomy
from slimvlm.errors import ConfigError, DataError
from slimvlm.memory import stored_bytes
from slimvlm.outputs import write_text
from slimvlm.progress import progress
from slimvlm.samples import Question, Task
from slimvlm.tasks import find_tasks
from slimvlm.timing import timed_runs

PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class TaskResult:
    """Scores of one task.

    Attributes:
        metric: Name of the metric.
        score: Mean in percent; for perplexity the perplexity itself (lower is better).
        chance: Score of guessing, in percent.
        in_average: Whether the task counts in AVG.
        ids: Question ids.
        replies: What the model said.
        scores: One score for each question, in [0, 1] but for MME, whose full score is above 100
            (for perplexity: its mean loss).
        details: Further numbers of the metric, in percent.
        majority: Score of the best constant answer to these very questions, in percent; None for
            perplexity, and where the scoring is not ours.
        blind_scores: The scores that the same model gets for the same questions when it is shown
            the pictures of other ones; empty where that was not measured or nothing is shown.
    """

    metric: str
    score: float
    chance: float
    in_average: bool
    ids: tuple[str, ...]
    replies: tuple[str, ...]
    scores: tuple[float, ...]
    details: Mapping[str, float] = field(default_factory=dict)
    majority: float | None = None
    blind_scores: tuple[float, ...] = ()

    @property
    def blind(self) -> float | None:
        """The blind floor: mean of `blind_scores` in percent; None where it was not measured."""
        return 100 * fmean(self.blind_scores) if self.blind_scores else None


@dataclass(frozen=True)
class Result:
    """Scores of one model on some tasks.

    Attributes:
        model: Name or path of the model.
        total_params: Parameters of the whole model.
        backbone_params: Parameters of its language backbone.
        tasks: Results by task name.
        prefill_ms: Median time to read one question, in milliseconds.
        decode_ms: Median time to write one token.
        blind: Whether every question was asked with the pictures of another one.
        limit: Only the first so many questions of each task were asked; None for all.
        batch_size: Questions that were answered at once; None if it is not known.
        dtype: Data type of the weights; empty if it is not known.
        weight_bytes: Bytes of all weights as they are in memory; None if it is not known.
    """

    model: str
    total_params: int
    backbone_params: int
    tasks: Mapping[str, TaskResult]
    prefill_ms: float
    decode_ms: float
    blind: bool = False
    limit: int | None = None
    batch_size: int | None = None
    dtype: str = ""
    weight_bytes: int | None = None

    @property
    def average(self) -> float:
        """AVG over the tasks that count."""
        counted = {name: task.score for name, task in self.tasks.items() if task.in_average}
        return metrics.average(counted) if counted else float("nan")

    def retention(self, baseline: Result, floors: Result | None = None) -> metrics.Retention:
        """AVG-% of this model relative to another one, over the tasks that both answered.

        The floor of a task, which `Retention.above_floor` takes off both models, is the highest of
        luck, the best constant answer, and the blind floor of the baseline where it was measured.

        Args:
            baseline: Result of the original model.
            floors: The original model evaluated blind, where ``baseline`` has no blind floors yet;
                see `with_blind_floors`.

        Raises:
            ConfigError: If they share no task, their questions differ, or only one was blind.
        """
        if floors is not None:
            baseline = baseline.with_blind_floors(floors)
        require_same_sight(self, baseline)
        shared = self._shared_tasks(baseline)
        return metrics.retention(
            {name: self.tasks[name].scores for name in shared},
            {name: baseline.tasks[name].scores for name in shared},
            {name: self.tasks[name].chance for name in shared},
            {name: _floor(name, self.tasks[name], baseline.tasks[name]) for name in shared},
        )

    def difference(self, baseline: Result) -> metrics.Difference:
        """AVG of this model minus that of another one, over the tasks that both answered.

        Raises:
            ConfigError: If they share no task, their questions differ, or only one was blind.
        """
        require_same_sight(self, baseline)
        shared = self._shared_tasks(baseline)
        return metrics.average_difference(
            {name: baseline.tasks[name].scores for name in shared},
            {name: self.tasks[name].scores for name in shared},
        )

    def with_blind_floors(self, blind: Result) -> Result:
        """This result with the floors that the same model's blind result gives.

        Args:
            blind: The same model on the same questions, from ``evaluate(..., blind=True)``.

        Raises:
            ConfigError: If that result was not blind or this one was, or the questions differ.
        """
        if self.blind or not blind.blind:
            raise ConfigError("floors: must be a blind result of a model that was not blind")
        found = {}
        for name, task in self.tasks.items():
            other = blind.tasks.get(name, task)
            if other.ids != task.ids:
                raise ConfigError(f"floors: task {name!r} asked other questions (see --limit)")
            found[name] = replace(task, blind_scores=other.blind_scores)
        return replace(self, tasks=found)

    def _shared_tasks(self, baseline: Result) -> list[str]:
        """Names of the tasks in AVG that both answered."""
        shared = [
            name for name, task in self.tasks.items() if task.in_average and name in baseline.tasks
        ]
        if not shared:
            raise ConfigError("baseline: it shares no task with this result")
        for name in shared:
            if self.tasks[name].ids != baseline.tasks[name].ids:
                raise ConfigError(f"baseline: task {name!r} asked other questions (see --limit)")
        return shared

    def save(self, path: str | Path) -> None:
        """Write everything as JSON, answers included."""
        values = {**asdict(self), "average": self.average}
        write_text(Path(path), json.dumps(values, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read what `save` wrote.

        Raises:
            ConfigError: If the file is missing or is not a result.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            values.pop("average")
            tasks = {name: _task_result(task) for name, task in values.pop("tasks").items()}
            return cls(tasks=tasks, **values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"result {str(path)!r}: cannot be read ({error})") from error


def require_same_sight(result: Result, baseline: Result) -> None:
    """Refuse to set a blind result against one with the right pictures.

    Raises:
        ConfigError: If only one of the two is blind.
    """
    if result.blind != baseline.blind:
        blind, other = ("this", "that") if result.blind else ("that", "this")
        raise ConfigError(
            f"baseline: {blind} result was asked blind, with the pictures of other questions, and "
            f"{other} one was not; their scores do not measure the same"
        )


def read_baseline(path: str | Path, blind: bool = False, floors: bool = False) -> Result:
    """A result file to set a new result against; refuses what would fail after the questions.

    Args:
        path: What `Result.save` wrote.
        blind: Whether the new result is blind.
        floors: Whether the baseline must have blind floors.

    Raises:
        ConfigError: If the file is no result, only one of the two is blind, or floors are missing.
    """
    baseline = Result.load(path)
    if baseline.blind != blind:
        which = "blind, the new result is not" if baseline.blind else "not blind, the new result is"
        raise ConfigError(f"baseline {str(path)!r}: it is {which}; their scores do not compare")
    if floors and all(task.blind is None for task in baseline.tasks.values()):
        raise ConfigError(
            f"baseline {str(path)!r}: it has no blind floors; evaluate that model with --floors"
        )
    return baseline


def evaluate(
    model: PreTrainedModel,
    processor: Any,
    tasks: Sequence[Task] | str,
    limit: int | None = None,
    batch_size: int = 16,
    name: str = "",
    blind: bool = False,
    log_folder: str | Path | None = None,
    floors: bool = False,
) -> Result:
    """Answer every question greedily and score the answers.

    Questions are batched by length with left padding; the result does not depend on the batch
    size beyond rounding, and is the same at every call.

    Args:
        model: A chat-capable model.
        processor: Its processor or tokenizer.
        tasks: What to ask: tasks, or their names separated by commas.
        limit: Only the first so many questions of each task.
        batch_size: Questions answered at once.
        name: Name of the model in the result.
        blind: Show each question the pictures of another one. What the model scores then is its
            blind floor: a task that is not clearly above it measures no sight.
        log_folder: Where replies are kept as they come, one JSON line each. An evaluation that was
            stopped goes on there; one that was finished is not asked again.
        floors: Ask every question that has pictures a second time, blind, and keep the scores
            beside those with the right pictures.

    Raises:
        ConfigError: If an option is out of range, or pictures cannot be exchanged.
    """
    for option, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} {value} must be at least 1")
    if blind and floors:
        raise ConfigError("floors: a blind result is the floor; leave out one of blind and floors")
    tasks = find_tasks(tasks) if isinstance(tasks, str) else tasks
    was_training = model.training
    model.eval()
    ask = _asker(model, processor, batch_size, log_folder)
    first: list[Question] = []
    results = {}
    try:
        for task in tasks:
            questions = list(task.load(limit))
            if not questions:
                raise DataError(f"task {task.name!r} has no questions")
            first.append(questions[0])
            results[task.name] = _evaluated(ask, task, questions, blind, floors)
        how = {"blind": blind, "limit": limit, "batch_size": batch_size}
        return with_costs(model, processor, results, first[0], name, **how)
    finally:
        model.train(was_training)


def with_costs(
    model: PreTrainedModel,
    processor: Any,
    tasks: Mapping[str, TaskResult],
    question: Question,
    name: str = "",
    **how: Any,
) -> Result:
    """Task results with the model's parameter counts and its times for one question beside them.

    Args:
        model: The model that answered.
        processor: Its processor or tokenizer.
        tasks: What it answered.
        question: What its times are measured on.
        name: Name of the model in the result.
        how: Further fields of `Result`: how the questions were asked.
    """
    shape = anatomy(model.config)  # of the configuration: quantised weights are packed
    prefill_ms, decode_ms = latency(model, processor, question)
    return Result(
        model=name or str(model.config._name_or_path),
        total_params=shape.total_params,
        backbone_params=shape.backbone_params,
        tasks=tasks,
        prefill_ms=prefill_ms,
        decode_ms=decode_ms,
        dtype=str(model.dtype).removeprefix("torch."),
        weight_bytes=stored_bytes(model),
        **how,
    )


def with_other_pictures(questions: Sequence[Question]) -> list[Question]:
    """The same questions, each with the pictures of the one half a list further on.

    Only questions with pictures take part. Where that one shows the same pictures, the next one
    that does not gives its own.

    Raises:
        ConfigError: If there are pictures, but not two questions that show different ones.
    """
    seeing = [question for question in questions if question.images]
    half = len(seeing) // 2
    turned = [*seeing[half:], *seeing[:half]]
    images = (_other_images(q, turned[i:] + turned[:i]) for i, q in enumerate(seeing))
    return [replace(q, images=next(images)) if q.images else q for q in questions]


def answer(
    model: PreTrainedModel, processor: Any, questions: Sequence[Question], max_new_tokens: int
) -> list[str]:
    """Greedy replies to a batch of questions."""
    inputs = on_device(model, chat.encode_questions(processor, questions))
    tokenizer = chat.tokenizer_of(processor)
    with torch.no_grad():
        output = _generator(model).generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=tokenizer.pad_token_id,
        )
    new_tokens = output[:, inputs["input_ids"].shape[1] :]
    replies: list[str] = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    return [reply.strip() for reply in replies]


@torch.no_grad()
def choose(
    model: PreTrainedModel, processor: Any, questions: Sequence[Question], max_new_tokens: int = 0
) -> list[str]:
    """The likeliest choice of each question: highest log-probability of the whole answer turn."""
    replies = []
    for question in questions:
        samples = [chat.answered_sample(question, choice) for choice in question.choices]
        inputs = on_device(model, chat.encode_samples(processor, samples))
        labels = inputs.pop("labels")
        loss = losses.token_cross_entropy(model(**inputs).logits, labels).sum(1)
        replies.append(question.choices[int(loss.argmin())])
    return replies


def latency(
    model: PreTrainedModel, processor: Any, question: Question, repeats: int = 5, tokens: int = 8
) -> tuple[float, float]:
    """Median milliseconds to read one question, and to write one further token, at batch 1."""
    inputs = on_device(model, chat.encode_questions(processor, [question]))
    runs = timed_runs([model], [inputs], 1 + tokens, repeats)[0]
    return median(run.prefill_ms for run in runs), median(run.decode_ms for run in runs)


def _generator(model: PreTrainedModel) -> Any:
    """The model as something that generates, which its static type does not say."""
    return model


def _task_result(values: dict[str, Any]) -> TaskResult:
    """A task's result from JSON, where tuples have become lists."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return TaskResult(**values)


def _other_images(question: Question, others: Sequence[Question]) -> tuple[Image | Path, ...]:
    for other in others:
        if other.images != question.images:
            return other.images
    raise ConfigError(
        f"blind: question {question.id!r} finds no other pictures to be asked with (see --limit)"
    )


def _floor(name: str, task: TaskResult, baseline: TaskResult) -> float | tuple[float, ...]:
    """The highest floor of a task: in percent, or one score for each question if it is blind."""
    known = [task.chance, *(m for m in (task.majority, baseline.majority) if m is not None)]
    blind = baseline.blind
    if blind is not None and metrics.average({name: blind}) > max(known):
        return baseline.blind_scores
    return max(known)


def _evaluated(
    ask: Callable[[Task, Sequence[Question]], TaskResult],
    task: Task,
    questions: Sequence[Question],
    blind: bool,
    floors: bool,
) -> TaskResult:
    """One task asked as it is, blind, or both ways."""
    shows = task.metric != PERPLEXITY and any(question.images for question in questions)
    if not shows or not (blind or floors):
        return ask(task, questions)
    floor = ask(task, with_other_pictures(questions))
    result = floor if blind else ask(task, questions)
    return replace(result, blind_scores=floor.scores)


def _asker(
    model: PreTrainedModel, processor: Any, batch_size: int, log_folder: str | Path | None
) -> Callable[[Task, Sequence[Question]], TaskResult]:
    """A function that asks what the log has not got, and scores all of it."""
    folder = Path(log_folder) if log_folder is not None else None
    mark = fingerprint(model) if folder is not None else ""

    def ask(task: Task, questions: Sequence[Question]) -> TaskResult:
        if task.metric == PERPLEXITY:
            log = AnswerLog(folder, task.name, key_of(mark, task, questions))
            return _perplexity(model, processor, task, questions, log)
        key = key_of(mark, task, questions, batch_size=batch_size)
        log = AnswerLog(folder, task.name, key)
        _ask(model, processor, task, questions, batch_size, log)
        return _scored(task, questions, log)

    return ask


def _ask(
    model: PreTrainedModel,
    processor: Any,
    task: Task,
    questions: Sequence[Question],
    batch_size: int,
    log: AnswerLog,
) -> None:
    """Ask what the log has not got; batches are the same whether or not some are in it."""
    for batch in _by_length(questions, batch_size, task.name):
        picked = [questions[i] for i in batch]
        if any(question.id not in log.replies for question in picked):
            reply = choose if task.by_likelihood else answer
            log.add(picked, reply(model, processor, picked, task.max_new_tokens))


def _scored(task: Task, questions: Sequence[Question], log: AnswerLog) -> TaskResult:
    score = metrics.METRICS[task.metric]
    replies = [log.replies[question.id] for question in questions]
    scores = [score(reply, question) for reply, question in zip(replies, questions, strict=True)]
    is_yes_no = task.metric == "yes_no"
    return TaskResult(
        metric=task.metric,
        score=100 * sum(scores) / max(len(scores), 1),
        chance=task.chance,
        in_average=task.in_average,
        ids=tuple(question.id for question in questions),
        replies=tuple(replies),
        scores=tuple(scores),
        details=metrics.yes_no_details(replies, questions) if is_yes_no else {},
        majority=metrics.majority_score(task.metric, questions),
    )


def _by_length(questions: Sequence[Question], batch_size: int, name: str) -> Iterator[list[int]]:
    """Batches of indices whose prompts have similar lengths, longest first; a progress bar."""
    order = sorted(range(len(questions)), key=lambda i: (-len(questions[i].prompt), i))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    yield from progress(batches, name)


@torch.no_grad()
def _perplexity(
    model: PreTrainedModel,
    processor: Any,
    task: Task,
    questions: Sequence[Question],
    log: AnswerLog,
) -> TaskResult:
    """Token-weighted perplexity of plain passages (``answers[0]``), no chat template.

    The log keeps mean loss and number of tokens of each passage.
    """
    tokenizer = chat.tokenizer_of(processor)
    for question in progress(questions, task.name):
        if question.id in log.replies:
            continue
        inputs = on_device(model, dict(tokenizer(question.answers[0], return_tensors="pt")))
        labels = inputs["input_ids"]
        mean = float(losses.cross_entropy(model(**inputs).logits, labels))
        log.add([question], [json.dumps([mean, int(losses.label_counts(labels).sum())])])
    means, counts = zip(*(json.loads(log.replies[q.id]) for q in questions), strict=True)
    total = sum(mean * count for mean, count in zip(means, counts, strict=True))
    return TaskResult(
        metric=PERPLEXITY,
        score=float(torch.tensor(total / max(sum(counts), 1)).exp()),
        chance=task.chance,
        in_average=False,
        ids=tuple(question.id for question in questions),
        replies=("",) * len(questions),
        scores=means,
    )


def on_device(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors among inputs where the model is; pictures in its data type."""
    moved = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            floating = value.is_floating_point()
            moved[name] = value.to(model.device, model.dtype if floating else None)
    return moved
