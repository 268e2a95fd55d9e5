"""Ask a model a benchmark's questions and score its answers: model + tasks → `Result`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimvlm import chat, losses, metrics
from slimvlm.answers import AnswerLog, fingerprint, key_of
from slimvlm.errors import ConfigError
from slimvlm.geometry import read_anatomy
from slimvlm.outputs import write_text
from slimvlm.progress import progress
from slimvlm.samples import Question, Task
from slimvlm.tasks import find_tasks

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
    """

    metric: str
    score: float
    chance: float
    in_average: bool
    ids: tuple[str, ...]
    replies: tuple[str, ...]
    scores: tuple[float, ...]
    details: Mapping[str, float] = field(default_factory=dict)


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
    """

    model: str
    total_params: int
    backbone_params: int
    tasks: Mapping[str, TaskResult]
    prefill_ms: float
    decode_ms: float

    @property
    def average(self) -> float:
        """AVG over the tasks that count."""
        counted = {name: task.score for name, task in self.tasks.items() if task.in_average}
        return metrics.average(counted) if counted else float("nan")

    def retention(self, baseline: Result) -> metrics.Retention:
        """AVG-% of this model relative to another one, over the tasks that both answered.

        Raises:
            ConfigError: If they share no task, or their questions differ.
        """
        shared = [
            name for name, task in self.tasks.items() if task.in_average and name in baseline.tasks
        ]
        if not shared:
            raise ConfigError("baseline: it shares no task with this result")
        for name in shared:
            if self.tasks[name].ids != baseline.tasks[name].ids:
                raise ConfigError(f"baseline: task {name!r} asked other questions (see --limit)")
        return metrics.retention(
            {name: self.tasks[name].scores for name in shared},
            {name: baseline.tasks[name].scores for name in shared},
            {name: self.tasks[name].chance for name in shared},
        )

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


def evaluate(
    model: PreTrainedModel,
    processor: Any,
    tasks: Sequence[Task] | str,
    limit: int | None = None,
    batch_size: int = 16,
    name: str = "",
    blind: bool = False,
    log_folder: str | Path | None = None,
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
    """
    for option, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} {value} must be at least 1")
    tasks = find_tasks(tasks) if isinstance(tasks, str) else tasks
    was_training = model.training
    model.eval()
    asked: list[Question] = []
    folder = Path(log_folder) if log_folder is not None else None
    mark = fingerprint(model) if folder is not None else ""
    results = {}
    for task in tasks:
        questions = list(task.load(limit))
        if blind:
            questions = with_other_pictures(questions)
        asked.extend(questions[:1])
        if task.metric == PERPLEXITY:
            results[task.name] = _perplexity(model, processor, task, questions)
        else:
            key = key_of(mark, task, questions, batch_size=batch_size)
            log = AnswerLog(folder, task.name, key)
            _ask(model, processor, task, questions, batch_size, log)
            results[task.name] = _scored(task, questions, log)
    result = with_costs(model, processor, results, asked[0], name)
    model.train(was_training)
    return result


def with_costs(
    model: PreTrainedModel,
    processor: Any,
    tasks: Mapping[str, TaskResult],
    question: Question,
    name: str = "",
) -> Result:
    """Task results with the model's parameter counts and its times for one question beside them."""
    anatomy = read_anatomy(model)
    prefill_ms, decode_ms = latency(model, processor, question)
    return Result(
        model=name or str(model.config._name_or_path),
        total_params=anatomy.total_params,
        backbone_params=anatomy.backbone_params,
        tasks=tasks,
        prefill_ms=prefill_ms,
        decode_ms=decode_ms,
    )


def with_other_pictures(questions: Sequence[Question]) -> list[Question]:
    """The same questions, each with the pictures of the one half a list further on."""
    half = len(questions) // 2
    turned = [*questions[half:], *questions[:half]]
    return [replace(q, images=other.images) for q, other in zip(questions, turned, strict=True)]


def answer(
    model: PreTrainedModel, processor: Any, questions: Sequence[Question], max_new_tokens: int
) -> list[str]:
    """Greedy replies to a batch of questions."""
    inputs = _on_device(model, chat.encode_questions(processor, questions))
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
        inputs = _on_device(model, chat.encode_samples(processor, samples))
        labels = inputs.pop("labels")
        loss = losses.token_cross_entropy(model(**inputs).logits, labels).sum(1)
        replies.append(question.choices[int(loss.argmin())])
    return replies


def latency(
    model: PreTrainedModel, processor: Any, question: Question, repeats: int = 5, tokens: int = 8
) -> tuple[float, float]:
    """Median milliseconds to read one question, and to write one further token, at batch 1."""
    inputs = _on_device(model, chat.encode_questions(processor, [question]))
    prefill, decode = [], []
    for _ in range(repeats):
        one = _generation_seconds(model, inputs, 1)
        many = _generation_seconds(model, inputs, 1 + tokens)
        prefill.append(one)
        decode.append(max(many - one, 0.0) / tokens)
    return 1e3 * sorted(prefill)[repeats // 2], 1e3 * sorted(decode)[repeats // 2]


def _generator(model: PreTrainedModel) -> Any:
    """The model as something that generates, which its static type does not say."""
    return model


def _generation_seconds(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], new_tokens: int
) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        _generator(model).generate(
            **inputs,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _task_result(values: dict[str, Any]) -> TaskResult:
    """A task's result from JSON, where tuples have become lists."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return TaskResult(**values)


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
    )


def _by_length(questions: Sequence[Question], batch_size: int, name: str) -> Iterator[list[int]]:
    """Batches of indices whose prompts have similar lengths, longest first; a progress bar."""
    order = sorted(range(len(questions)), key=lambda i: (-len(questions[i].prompt), i))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    yield from progress(batches, name)


@torch.no_grad()
def _perplexity(
    model: PreTrainedModel, processor: Any, task: Task, questions: Sequence[Question]
) -> TaskResult:
    """Token-weighted perplexity of plain passages (``answers[0]``), no chat template."""
    tokenizer = chat.tokenizer_of(processor)
    means, counts = [], []
    for question in progress(questions, task.name):
        inputs = _on_device(model, dict(tokenizer(question.answers[0], return_tensors="pt")))
        labels = inputs["input_ids"]
        means.append(float(losses.cross_entropy(model(**inputs).logits, labels)))
        counts.append(int(losses.label_counts(labels).sum()))
    total = sum(mean * count for mean, count in zip(means, counts, strict=True))
    return TaskResult(
        metric=PERPLEXITY,
        score=float(torch.tensor(total / max(sum(counts), 1)).exp()),
        chance=task.chance,
        in_average=False,
        ids=tuple(question.id for question in questions),
        replies=("",) * len(questions),
        scores=tuple(means),
    )


def _on_device(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    moved = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            floating = value.is_floating_point()
            moved[name] = value.to(model.device, model.dtype if floating else None)
    return moved
