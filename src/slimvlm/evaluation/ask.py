"""Ask a model a benchmark's questions and score its answers: model + tasks → `Result`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from slimvlm.core.documents import parse_json, read_text
from slimvlm.core.errors import LONGEST, ConfigError, DataError, one_line, shortened
from slimvlm.core.files import explained, file_name
from slimvlm.core.progress import progress
from slimvlm.core.requests import digest
from slimvlm.data import chat
from slimvlm.data.images import identifying_bytes
from slimvlm.data.samples import Question, Task
from slimvlm.evaluation import metrics
from slimvlm.evaluation.measure import stored_bytes
from slimvlm.evaluation.paired import times_of
from slimvlm.evaluation.results import Result, TaskResult
from slimvlm.evaluation.tasks import find_tasks
from slimvlm.models import losses
from slimvlm.models.hidden import (
    as_inputs,
    evaluating,
    head_of,
    hidden_states,
    require_finite_values,
)
from slimvlm.models.load import anatomy, digest_of_weights


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
    folder = None if log_folder is None else Path(log_folder)
    asker = _Asker(model, processor, batch_size, folder)
    first: list[Question] = []
    results = {}
    with evaluating(model):
        for task in tasks:
            questions = list(task.load(limit))
            if not questions:
                raise DataError(f"task {task.name!r} has no questions")
            first.append(questions[0])
            results[task.name] = asker.asked(task, questions, blind, floors)
        how = {"blind": blind, "limit": limit, "batch_size": batch_size}
        return with_costs(model, processor, results, first[0], name, **how)


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
    return Result(
        model=name or str(model.config._name_or_path),
        total_params=shape.total_params,
        backbone_params=shape.backbone_params,
        tasks=tasks,
        **vars(times_of(model, processor, question)),
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
    names = ", ".join(question.id for question in questions[:3])
    encoded = chat.encode_questions(processor, questions)
    return reply_to(model, processor, encoded, max_new_tokens, f"question {shortened(names)}")


def reply_to(
    model: PreTrainedModel,
    processor: Any,
    encoded: Mapping[str, Any],
    max_new_tokens: int,
    what: str,
) -> list[str]:
    """Greedy replies to left-padded model inputs.

    Args:
        model: The model.
        processor: Its processor or tokenizer.
        encoded: What it is asked, from `slimvlm.data.chat`.
        max_new_tokens: Tokens of a reply at most.
        what: What that is, for messages.

    Raises:
        ConfigError: If the model's own settings of generation make no sense.
        NumericalError: If a logit is NaN.
    """
    inputs, tokenizer = as_inputs(model, encoded), chat.tokenizer_of(processor)
    try:
        with torch.no_grad():
            output = _generator(model).generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=tokenizer.pad_token_id,
                logits_processor=[_Finite(f"what the model says to {what}")],
            )
    except (ValueError, TypeError, LookupError) as error:
        raise ConfigError(
            f"model: cannot answer as its generation_config.json says ({one_line(error)[:LONGEST]})"
        ) from error
    new_tokens = output[:, inputs["input_ids"].shape[1] :]
    replies: list[str] = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    return [reply.strip() for reply in replies]


def choose(
    model: PreTrainedModel, processor: Any, questions: Sequence[Question], max_new_tokens: int = 0
) -> list[str]:
    """The likeliest choice of each question: highest log-probability of the whole answer turn."""
    replies = []
    for question in questions:
        found = likelihoods(model, processor, [(question, choice) for choice in question.choices])
        values = [value for value, _ in found]
        replies.append(question.choices[values.index(max(values))])
    return replies


@torch.no_grad()
def likelihoods(
    model: PreTrainedModel, processor: Any, answered: Sequence[tuple[Question, str]]
) -> list[tuple[float, bool]]:
    """Log-probability of each answer as a whole turn, and whether greed would say it."""
    samples = [chat.answered_sample(question, text) for question, text in answered]
    inputs = as_inputs(model, chat.encode_samples(processor, samples))
    labels = inputs.pop("labels")
    (hidden,) = hidden_states(model, inputs)
    rows, wanted, counted = losses.predictions(hidden, labels)
    found = torch.zeros(*counted.shape, 2, device=hidden.device)
    found[counted] = losses.by_chunks(partial(_loss_and_miss, head_of(model)), rows, wanted)
    require_finite_values(found, f"the likelihood of answers to question {answered[0][0].id!r}")
    return [(-loss, not misses) for loss, misses in found.sum(1).tolist()]


def _loss_and_miss(head: losses.Head, rows: Tensor, wanted: Tensor) -> Tensor:
    """``[N, 2]``: the cross-entropy of each wanted token, and 1 if another one is likelier."""
    logits = head(rows).float()
    loss = F.cross_entropy(logits, wanted, reduction="none")
    return torch.stack([loss, (logits.argmax(-1) != wanted).float()], dim=-1)


class _Finite(LogitsProcessor):
    """Looks at what a model says before a token is chosen: the largest of NaN is a token, too."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores as they are. Minus infinity is a token that must not be said."""
        require_finite_values(scores.amax(-1), self.where)
        return scores


def _loss_and_count(reply: str) -> tuple[float, int] | None:
    """What the log keeps of a passage; None where it keeps anything else."""
    with suppress(ValueError):
        found = parse_json(reply)
        if isinstance(found, list) and [type(v) for v in found] == [float, int]:
            return (found[0], found[1]) if math.isfinite(found[0]) and found[1] >= 0 else None
    return None


def _generator(model: PreTrainedModel) -> Any:
    """The model as something that generates, which its static type does not say."""
    return model


def _other_images(question: Question, others: Sequence[Question]) -> tuple[Image | Path, ...]:
    for other in others:
        if other.images != question.images:
            return other.images
    raise ConfigError(
        f"blind: question {question.id!r} finds no other pictures to be asked with (see --limit)"
    )


@dataclass(frozen=True)
class _Asker:
    """Asks a model what its log has not got, and scores all of it."""

    model: PreTrainedModel
    processor: Any
    batch_size: int
    folder: Path | None

    @cached_property
    def weights(self) -> str:
        """Whose the replies in the folder are."""
        return digest_of_weights(self.model) if self.folder is not None else ""

    def asked(
        self, task: Task, questions: Sequence[Question], blind: bool, floors: bool
    ) -> TaskResult:
        """One task asked as it is, blind, or both ways."""
        is_read = task.metric in metrics.LIKELIHOODS
        ask = self.read if is_read else self.answered
        shows = not is_read and any(question.images for question in questions)
        if not shows or not (blind or floors):
            return ask(task, questions)
        floor = ask(task, with_other_pictures(questions))
        result = floor if blind else ask(task, questions)
        return replace(result, blind_scores=floor.scores)

    def answered(self, task: Task, questions: Sequence[Question]) -> TaskResult:
        """One task; batches are the same whether or not some of it is in the log."""
        key = digest_of_questions(self.weights, task, questions, batch_size=self.batch_size)
        log = AnswerLog(self.folder, task.name, key)
        reply = choose if task.by_likelihood else answer
        prompts = [question.prompt for question in questions]
        for batch in batches_by_length(prompts, self.batch_size, task.name):
            picked = [questions[i] for i in batch]
            if any(question.id not in log.replies for question in picked):
                log.add(picked, reply(self.model, self.processor, picked, task.max_new_tokens))
        return _scored(task, questions, [log.replies[question.id] for question in questions])

    @torch.no_grad()
    def read(self, task: Task, questions: Sequence[Question]) -> TaskResult:
        """Loss or perplexity of the given answers (``answers[0]``), every token counted once.

        Without a prompt and pictures an answer is a plain passage, and no chat template is used.
        The log keeps mean loss and number of tokens of each answer.
        """
        log = AnswerLog(self.folder, task.name, digest_of_questions(self.weights, task, questions))
        for question in progress(questions, task.name):
            if _loss_and_count(log.replies.get(question.id, "")) is not None:
                continue
            inputs = as_inputs(self.model, self._reading(question))
            labels = inputs.pop("labels")
            (hidden,) = hidden_states(self.model, inputs)
            found = losses.token_cross_entropy(hidden, head_of(self.model), labels)
            require_finite_values(found, f"the loss of passage {question.id!r} of {task.name!r}")
            count = int(losses.label_counts(labels).sum())
            log.add([question], [json.dumps([float(found.sum()) / max(count, 1), count])])
        means, counts = zip(*(_loss_and_count(log.replies[q.id]) for q in questions), strict=True)
        total = sum(mean * count for mean, count in zip(means, counts, strict=True))
        loss = total / max(sum(counts), 1)
        return TaskResult(
            metric=task.metric,
            score=loss if task.metric == "loss" else metrics.perplexity(loss),
            chance=task.chance,
            in_average=False,
            ids=tuple(question.id for question in questions),
            replies=("",) * len(questions),
            scores=means,
        )

    def _reading(self, question: Question) -> dict[str, Any]:
        """Model inputs of a question with its answer; labels are where the answer is."""
        text = question.answers[0]
        if question.prompt or question.images:
            answered = chat.answered_sample(question, text)
            return dict(chat.encode_samples(self.processor, [answered]))
        encoded = dict(chat.tokenizer_of(self.processor)(text, return_tensors="pt"))
        return {**encoded, "labels": encoded["input_ids"]}


def _scored(task: Task, questions: Sequence[Question], replies: Sequence[str]) -> TaskResult:
    score = metrics.metric_named(task.metric)
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


def batches_by_length(prompts: Sequence[str], batch_size: int, name: str) -> Iterator[list[int]]:
    """Batches of indices of prompts with similar lengths, longest first; a progress bar."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    yield from progress(batches, name)


def digest_of_questions(weights: str, task: Task, questions: Sequence[Question], **how: Any) -> str:
    """A hash of everything that a task's replies depend on: model, questions, pictures, options.

    Args:
        weights: From `slimvlm.models.load.digest_of_weights`.
        task: The task.
        questions: Those that are asked.
        how: Options of asking.
    """

    def parts() -> Iterator[Any]:
        yield weights.encode()
        yield [task.name, task.max_new_tokens, how]
        for question in questions:
            yield [question.id, question.prompt, question.answers]
            yield from map(identifying_bytes, question.images)

    return digest(parts())[:24]


class AnswerLog:
    """One JSON line for each question, appended batch by batch.

    Args:
        folder: Where logs lie; None keeps nothing.
        task: Name of the task.
        key: From `digest_of_questions`; another key is another file.
    """

    def __init__(self, folder: Path | None, task: str, key: str) -> None:
        self._path = folder / f"{file_name(task)}-{key}.jsonl" if folder is not None else None
        self._cut_short = False
        self.replies: dict[str, str] = {}
        if self._path is not None and self._path.is_file():
            text = read_text(self._path, "log")
            self._cut_short = bool(text) and not text.endswith("\n")
            for line in text.splitlines():
                row = _parsed(line)
                if row is not None:
                    self.replies[row["id"]] = row["reply"]

    def add(self, questions: Sequence[Question], replies: Sequence[str]) -> None:
        """Append a batch."""
        for question, reply in zip(questions, replies, strict=True):
            self.replies[question.id] = reply
        if self._path is None:
            return
        rows = [
            {"id": q.id, "prompt": q.prompt, "answers": q.answers, "reply": reply}
            for q, reply in zip(questions, replies, strict=True)
        ]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with explained(self._path), self._path.open("a") as log:
            if self._cut_short:
                log.write("\n")
                self._cut_short = False
            log.write("".join(json.dumps(row) + "\n" for row in rows))


def _parsed(line: str) -> dict[str, str] | None:
    """A row, or None for a line that a kill cut short or an edit broke."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    is_row = isinstance(row, dict) and all(isinstance(row.get(k), str) for k in ("id", "reply"))
    return row if is_row else None
