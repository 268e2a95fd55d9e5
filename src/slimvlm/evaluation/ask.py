"""Evaluate a model on tasks, question by question: model + tasks → `Result`."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimvlm.core import documents
from slimvlm.core.documents import digest, identity_of_files, parse_json, read_text
from slimvlm.core.errors import ConfigError, DataError, raised_as, shortened
from slimvlm.core.files import explained, file_name
from slimvlm.core.options import Questions
from slimvlm.core.progress import progress, steps
from slimvlm.data import chat
from slimvlm.data.samples import Question, Task, identifying_bytes
from slimvlm.evaluation import metrics
from slimvlm.evaluation.bench import stored_bytes, times_of
from slimvlm.evaluation.on_data import answer_losses
from slimvlm.evaluation.results import Result, TaskResult, asked_of
from slimvlm.evaluation.tasks import find_tasks
from slimvlm.models.devices import digest_of_weights
from slimvlm.models.hidden import as_inputs, evaluating, require_finite_values
from slimvlm.models.load import anatomy
from slimvlm.models.parts import context_of

Reached = Callable[[float], None]  # receives the share of a task's questions that are answered


def evaluate(
    model: PreTrainedModel,
    processor: Any,
    tasks: Sequence[Task] | str,
    limit: int | None = None,
    batch_size: int = 16,
    name: str = "",
    log_folder: str | Path | None = None,
    floors: bool = False,
) -> Result:
    """Reply greedily to every question and score the replies.

    Questions are batched by length with left padding; the result does not depend on the batch
    size beyond rounding, and is the same at every call.

    Tasks are given themselves or as a list of names with commas; ``limit`` takes the first
    questions of each. With ``floors``, questions with images are also evaluated blind, each with
    the images of another one, and both scores are stored: a task that is not clearly above this
    floor does not measure vision. Replies are appended to files in ``log_folder``, one JSON line
    each: a stopped evaluation resumes from them, and a finished one is not repeated.

    Raises:
        ConfigError: If an option is out of range, or images cannot be exchanged.
    """
    for option, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} {value} must be at least 1")
    tasks = find_tasks(tasks) if isinstance(tasks, str) else tasks
    folder = None if log_folder is None else Path(log_folder)
    weights = "" if folder is None else _digest_of_model(model, processor)
    first: list[Question] = []
    results = {}
    with evaluating(model), steps("evaluate", len(tasks)) as reached:
        for number, task in enumerate(tasks):
            questions = list(task.load(limit))
            if not questions:
                raise DataError(f"task {task.name!r} has no questions")
            first.append(questions[0])
            by_loss = task.metric in metrics.LIKELIHOODS
            options: dict[str, Any] = {} if by_loss else {"batch_size": batch_size}
            has_floor = floors and not by_loss and any(question.images for question in questions)
            rounds = [*([with_other_pictures(questions)] if has_floor else []), questions]
            found = []
            for turn, asked in enumerate(rounds):
                key = digest_of_questions(weights, task, asked, **options)
                log, parts = AnswerLog(folder, task.name, key), len(rounds)
                scaled = lambda x, n=parts, done=number + turn / parts: reached(done + x / n)  # noqa: E731
                found.append(_ask(model, processor, task, asked, log, scaled, **options))
            results[task.name] = replace(found[-1], blind_scores=found[0].scores * has_floor)
            reached(number + 1)
    return with_costs(model, processor, results, first[0], name, limit, batch_size)


def _digest_of_model(model: PreTrainedModel, processor: Any) -> str:
    """Hash all of a model that replies depend on: weights, settings, template and our own code."""
    settings: list[Any] = [
        each.to_json_string() for each in (model.config, model.generation_config)
    ]
    settings += [getattr(processor, "chat_template", None), documents.identity_of_code()]
    if chat.can_see(processor):
        settings.append(processor.image_processor.to_json_string())
    return digest([digest_of_weights(model).encode(), settings])


def _ask(
    model: PreTrainedModel,
    processor: Any,
    task: Task,
    questions: Sequence[Question],
    log: "AnswerLog",
    reached: Reached,
    batch_size: int = 1,
) -> TaskResult:
    """Score replies, or compute loss or perplexity over all tokens of the given answers."""
    by_loss = task.metric in metrics.LIKELIHOODS
    reply = _loss_of if by_loss else choose if task.by_likelihood else answer
    sees = [bool(question.images) for question in questions]
    prompts = [question.prompt for question in questions]
    if by_loss:  # what a damaged log holds is computed again
        for name in [name for name, (told, _) in log.replies.items() if not _is_loss(told)]:
            del log.replies[name]
    # batches are the same whatever the log holds
    for batch in batches_by_length(prompts, batch_size, task.name, reached, sees):
        picked = [questions[i] for i in batch]
        if any(question.id not in log.replies for question in picked):
            log.add(picked, reply(model, processor, picked, task.max_new_tokens))
    replies, cut = zip(*(log.replies[question.id] for question in questions), strict=True)
    values: dict[str, Any] = {"metric": task.metric, "chance": task.chance, **asked_of(questions)}
    if by_loss:
        means, counts = zip(*map(parse_json, replies), strict=True)
        total = sum(mean * count for mean, count in zip(means, counts, strict=True))
        loss = total / max(sum(counts), 1)
        score = loss if task.metric == "loss" else metrics.perplexity(loss)
        none = ("",) * len(questions)
        return TaskResult(score=score, in_average=False, replies=none, scores=means, **values)
    score_of, is_yes_no = metrics.metric_named(task.metric), task.metric == "yes_no"
    scores = tuple(map(score_of, replies, questions))
    return TaskResult(
        **values,
        score=100 * sum(scores) / len(scores),
        in_average=task.in_average,
        replies=replies,
        scores=scores,
        details=metrics.yes_no_details(replies, questions) if is_yes_no else {},
        majority=metrics.majority_score(task.metric, questions),
        offered=task.by_likelihood
        or all(q.choices and all(c in q.prompt for c in q.choices) for q in questions),
        cut=sum(cut),
    )


def _is_loss(text: str) -> bool:
    """Whether a text is what `_loss_of` writes: a finite mean, and how many tokens it is of."""
    with suppress(ValueError, TypeError):
        mean, count = parse_json(text)
        return type(count) is int and count >= 0 and type(mean) is float and math.isfinite(mean)
    return False


def _loss_of(
    model: PreTrainedModel, processor: Any, questions: Sequence[Question], max_new_tokens: int = 0
) -> list[tuple[str, bool]]:
    """Compute mean loss and number of tokens of a question's given answer, as JSON."""
    (question,) = questions
    text = question.answers[0]
    if question.prompt or question.images:
        encoded = chat.encode_samples(processor, [chat.answered_sample(question, text)])
        _require_context(model, encoded, questions)
    else:  # a plain passage has no chat template
        encoded = dict(chat.tokenizer_of(processor)(text, return_tensors="pt"))
        encoded = {n: each[:, : context_of(model.config)] for n, each in encoded.items()}
        encoded["labels"] = encoded["input_ids"]
    found, counted = answer_losses(model, encoded, f"the loss of passage {question.id!r}")
    count = int(counted.sum())
    mean = float(found.sum()) / max(count, 1)
    return [(json.dumps([mean, count]), False)]


def with_costs(
    model: PreTrainedModel,
    processor: Any,
    tasks: Mapping[str, TaskResult],
    question: Question,
    name: str,
    limit: int | None,
    batch_size: int,
) -> Result:
    """Add parameter counts, the times for one question, and options to task results."""
    shape = anatomy(model.config)  # of the configuration: quantised weights are packed
    (times,), _ = times_of([(model, processor)], question)
    return Result(
        model=name or str(model.config._name_or_path),
        total_params=shape.total_params,
        backbone_params=shape.backbone_params,
        tasks=tasks,
        **vars(times),
        dtype=str(model.dtype).removeprefix("torch."),
        weight_bytes=stored_bytes(model),
        limit=limit,
        batch_size=batch_size,
    )


def with_other_pictures(questions: Sequence[Question]) -> list[Question]:
    """Give each question the images of one half a list further on, or of the next with others."""
    seeing = [question for question in questions if question.images]
    half, found = len(seeing) // 2, {}
    for i, question in enumerate(seeing):
        others = (seeing[(half + i + step) % len(seeing)].images for step in range(len(seeing)))
        images = next((each for each in others if each != question.images), None)
        if images is None:
            told = "finds no other images to be evaluated with (see --limit)"
            raise ConfigError(f"floors: question {question.id!r} {told}")
        found[id(question)] = replace(question, images=images)
    return [found.get(id(question), question) for question in questions]


def answer(
    model: PreTrainedModel, processor: Any, questions: Sequence[Question], max_new_tokens: int
) -> list[tuple[str, bool]]:
    """Reply greedily to a batch of questions; flag replies that are cut off at the token limit."""
    inputs = as_inputs(model, chat.encode_questions(processor, questions))
    _require_context(model, inputs, questions)
    tokenizer, generator = chat.tokenizer_of(processor), cast(Any, model)
    names = shortened(", ".join(question.id for question in questions[:3]))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    greedy = {"do_sample": False, "num_beams": 1, "pad_token_id": pad}

    def finite(_: Tensor, scores: Tensor) -> Tensor:
        """Raise if logits are NaN: argmax would return a token regardless."""
        require_finite_values(scores.amax(-1), f"the logits of question {names}")
        return scores

    told = "model: cannot answer as its generation_config.json says"
    with raised_as(ConfigError, (ValueError, TypeError, LookupError), told), torch.no_grad():
        output = generator.generate(
            **inputs, **greedy, max_new_tokens=max_new_tokens, logits_processor=[finite]
        )
    new_tokens = output[:, inputs["input_ids"].shape[1] :]
    ends = generator.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends, device=output.device).flatten()
    cut = (new_tokens.shape[1] >= max_new_tokens) & ~torch.isin(new_tokens, ends).any(1)
    # a prompt may end with the beginning of a thought
    tails = tokenizer.batch_decode(inputs["input_ids"][:, -8:])
    opened = (max(t * tail.rstrip().endswith(t) for t in metrics.THINKING) for tail in tails)
    replies: list[str] = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    texts = [begun + reply.strip() for begun, reply in zip(opened, replies, strict=True)]
    return list(zip(texts, cut.tolist(), strict=True))


def choose(
    model: PreTrainedModel, processor: Any, questions: Sequence[Question], max_new_tokens: int = 0
) -> list[tuple[str, bool]]:
    """Pick the choice whose turn has the highest log-probability per byte (lm-eval's acc_norm)."""
    # undivided, the beginning of a longer choice would always be likelier
    pairs = [(question, choice) for question in questions for choice in question.choices]
    values: dict[str, dict[str, float]] = {question.id: {} for question in questions}
    for start in range(0, len(pairs), len(questions)):
        batch = pairs[start : start + len(questions)]
        found = likelihoods(model, processor, batch)
        for (question, choice), value in zip(batch, found, strict=True):
            values[question.id][choice] = value / max(len(choice.encode()), 1)
    return [(max(each, key=each.__getitem__), False) for each in values.values()]


def likelihoods(
    model: PreTrainedModel, processor: Any, answered: Sequence[tuple[Question, str]]
) -> list[float]:
    """Return each answer turn's log-probability."""
    samples = [chat.answered_sample(question, text) for question, text in answered]
    where = f"the likelihood of answers to question {answered[0][0].id!r}"
    inputs = chat.encode_samples(processor, samples)
    _require_context(model, inputs, [question for question, _ in answered])
    found, _ = answer_losses(model, inputs, where)
    return [-loss for loss in found.sum(1).tolist()]


def _require_context(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], questions: Sequence[Question]
) -> None:
    counts, most = inputs["attention_mask"].sum(1).tolist(), context_of(model.config)
    tokens, name = max(zip(counts, (question.id for question in questions), strict=True))
    if most is not None and tokens > most:
        raise DataError(f"question {shortened(name)} has {tokens} tokens, the model reads {most}")


def batches_by_length(
    prompts: Sequence[str],
    batch_size: int,
    name: str,
    reached: Reached | None = None,
    sees: Sequence[bool] = (),
) -> Iterator[list[int]]:
    """Batch the indices of prompts of similar length, longest first, and show progress."""
    kinds = sees or [True] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (not kinds[i], -len(prompts[i]), i))
    yield from progress(chat.batches_by_kind(order, kinds, batch_size), name, reached=reached)


def digest_of_questions(weights: str, task: Task, questions: Sequence[Question], **how: Any) -> str:
    """Hash all that a task's replies depend on: the model, its questions, images, options.

    Raises:
        DataError: If two questions have one id: they would share a reply.
    """
    for name, count in Counter(question.id for question in questions).items():
        if count > 1:
            raise DataError(f"task {task.name!r}: two questions have the id {shortened(name)}")
    how |= {"max_new_tokens": task.max_new_tokens, "by_likelihood": task.by_likelihood}
    rows = ([q.id, q.prompt, q.answers, q.choices] for q in questions)
    images = (map(identifying_bytes, q.images) for q in questions)
    asked = chain.from_iterable((row, *shown) for row, shown in zip(rows, images, strict=True))
    return digest(chain([weights.encode(), [task.name, how]], asked))[:24]


def identities_of_tasks(asked: Questions) -> tuple[str, ...]:
    """Hash what own tasks are made of: files, questions, images, the folder of tasks."""
    found = []
    for path in (part.strip() for part in asked.tasks.split(",")):
        if path.endswith((".yaml", ".yml")):
            (task,) = find_tasks(path)
            questions = digest_of_questions("", task, task.load(asked.limit))
            found += [identity_of_files(path, path), questions]
    folder = asked.task_folder
    return (*found, *([] if folder is None else [identity_of_files(folder, folder)]))


class AnswerLog:
    """Append replies to a file, one JSON line for each question; without a folder, keep none."""

    def __init__(self, folder: Path | None, task: str, key: str) -> None:
        self._path = None if folder is None else folder / f"{file_name(task)}-{key}.jsonl"
        self._cut_short = False
        # by question, and whether they reached the token limit
        self.replies: dict[str, tuple[str, bool]] = {}
        if self._path is None or not self._path.is_file():
            return
        text = read_text(self._path, "log")
        self._cut_short = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            try:
                row = parse_json(line)
            except ValueError:  # cut short by a kill
                continue
            if isinstance(row, dict) and all(isinstance(row.get(k), str) for k in ("id", "reply")):
                self.replies[row["id"]] = row["reply"], row.get("cut") is True

    def add(self, questions: Sequence[Question], replies: Sequence[tuple[str, bool]]) -> None:
        """Append a batch."""
        self.replies |= zip((q.id for q in questions), replies, strict=True)
        if self._path is None:
            return
        with explained(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as log:
                log.write("\n" * self._cut_short)
                self._cut_short = False
                for q, (reply, is_cut) in zip(questions, replies, strict=True):
                    row: dict[str, Any] = {"id": q.id, "prompt": q.prompt, "answers": q.answers}
                    row |= {"reply": reply, **({"cut": True} if is_cut else {})}
                    log.write(json.dumps(row) + "\n")
