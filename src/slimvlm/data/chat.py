"""Conversations ↔ model inputs, through the processor's own chat template.

Labels stand on assistant turns only. Where they are is read off the template: it is rendered a
second time with a mark in place of every text, which shows what it writes around the texts. A label
begins where generation would begin, and ends with the token that the template ends an answer with.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count, takewhile
from typing import Any

import torch
from jinja2 import TemplateSyntaxError
from PIL import Image
from torch import Tensor

from slimvlm.core.errors import LONGEST, ConfigError, DataError, SlimError, one_line
from slimvlm.data.images import open_image
from slimvlm.data.roles import IGNORE
from slimvlm.data.samples import Message, Question, Sample
from slimvlm.data.templates import limited

_MARK = "\ue000{}\ue001"
"""Stands for a text, between two characters that Unicode leaves to private use."""


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor, or the tokenizer itself for a text model."""
    return getattr(processor, "tokenizer", processor)


def can_see(processor: Any) -> bool:
    """Whether the processor takes pictures."""
    return getattr(processor, "image_processor", None) is not None


def question_messages(question: Question) -> list[Message]:
    """The user turn of a question: pictures first, then the text."""
    content: list[dict[str, str]] = [{"type": "image"} for _ in question.images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question.prompt}]}]


def answered_sample(question: Question, reply: str) -> Sample:
    """A question with a reply, as a conversation."""
    said = {"role": "assistant", "content": [{"type": "text", "text": reply}]}
    return Sample(question.id, (*question_messages(question), said), question.images)


def render(processor: Any, messages: Sequence[Message], generate: bool = False) -> str:
    """The text of a conversation as the model sees it, with one placeholder for each picture.

    Text models get plain strings as content. A tokenizer without a chat template gets the turns on
    lines of their own.

    Raises:
        DataError: If there are pictures and the model cannot see, or the template refuses the
            turns (Gemma's takes no system turn, for example).
        ConfigError: If the template is malformed or passes a limit of `slimvlm.data.templates`.
    """
    chat = list(messages) if can_see(processor) else [_text_only(m) for m in messages]
    if getattr(processor, "chat_template", None) is None:
        turns = [str(_text_only(message)["content"]) for message in messages]
        return "\n".join(turns) + ("\n" if generate else "")
    try:
        with limited():
            text: str = processor.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=generate
            )
    except TemplateSyntaxError as error:
        raise ConfigError(f"model: its chat template is malformed ({one_line(error)})") from error
    except SlimError:
        raise
    except Exception as error:  # a template is a program
        raise DataError(
            f"the chat template refuses the conversation ({one_line(error)})"
        ) from error
    return text


def _text_only(message: Message) -> Message:
    content = message["content"]
    if not isinstance(content, str):
        if any(part["type"] != "text" for part in content):
            raise DataError("a conversation has pictures, but the model cannot see")
        content = "".join(part["text"] for part in content)
    return {"role": message["role"], "content": content}


def encode_samples(processor: Any, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Padded model inputs with ``labels`` on the assistant turns.

    Args:
        processor: The model's processor, or its tokenizer.
        samples: Conversations that end with an assistant turn.

    Raises:
        DataError: If a picture cannot be read, the template refuses a conversation or hides where
            its answers are, or a sample has no answer tokens.
    """
    _require_words(processor)
    texts = [rendered(processor, sample) for sample in samples]
    images = [[open_image(image) for image in sample.images] for sample in samples]
    inputs = _processed(processor, samples, texts, images)
    labels = torch.full_like(inputs["input_ids"], IGNORE)
    for row, sample in enumerate(samples):
        length = int(inputs["attention_mask"][row].sum())
        ids = inputs["input_ids"][row, :length].tolist()
        for start, stop in _answer_spans(processor, sample, texts[row], images[row], ids):
            labels[row, start:stop] = inputs["input_ids"][row, start:stop]
        if not (labels[row] != IGNORE).any():
            raise DataError(f"sample {sample.id!r} has no assistant turn to learn from")
    return {**inputs, "labels": labels}


def require_readable(processor: Any, sample: Sample) -> None:
    """Refuse a sample that `encode_samples` would refuse. Its pictures are not looked at.

    Args:
        processor: The model's processor, or its tokenizer.
        sample: A conversation.

    Raises:
        DataError: If the template refuses the conversation or hides where its answers are, or the
            model cannot see its pictures.
    """
    _answers(processor, sample, rendered(processor, sample))


def length_of(processor: Any, sample: Sample) -> int:
    """Tokens of a sample, those of its pictures included.

    Raises:
        DataError: If the template or the processor refuses it.
    """
    images = [[open_image(image) for image in sample.images]]
    inputs = _processed(processor, [sample], [rendered(processor, sample)], images)
    return int(inputs["input_ids"].shape[1])


def rendered(processor: Any, sample: Sample) -> str:
    """The text of a sample as the model sees it.

    Raises:
        DataError: If the template refuses it; the message names it.
    """
    try:
        return render(processor, sample.messages)
    except DataError as error:
        raise DataError(f"sample {sample.id!r}: {error}") from error


def _processed(
    processor: Any, samples: Sequence[Sample], texts: list[str], images: list[list[Image.Image]]
) -> dict[str, Tensor]:
    """Model inputs of rendered samples, padded on the right."""
    try:
        return process(processor, texts, images, padding_side="right")
    except DataError as error:
        names = ", ".join(repr(sample.id) for sample in samples)
        raise DataError(f"sample {names}: {error}") from error


def encode_questions(processor: Any, questions: Sequence[Question]) -> dict[str, Tensor]:
    """Left-padded model inputs, ready for generation."""
    asked = [Sample(each.id, tuple(question_messages(each)), each.images) for each in questions]
    return encode_prompts(processor, asked)


def encode_prompts(processor: Any, asked: Sequence[Sample]) -> dict[str, Tensor]:
    """Left-padded model inputs of conversations that end with a user's turn, for generation."""
    _require_words(processor)
    texts = [render(processor, each.messages, generate=True) for each in asked]
    images = [[open_image(image) for image in each.images] for each in asked]
    return process(processor, texts, images, padding_side="left")


def _require_words(processor: Any) -> None:
    if processor is None:
        raise ConfigError("model: its folder has neither a processor nor a tokenizer")


def process(
    processor: Any, texts: list[str], images: list[list[Image.Image]], padding_side: str
) -> dict[str, Tensor]:
    """Run the processor over a batch of rendered conversations."""
    tokenizer = tokenizer_of(processor)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = padding_side
    options = {
        "return_tensors": "pt",
        "padding": True,
        "padding_side": padding_side,  # some processors have a default that beats the tokenizer's
        "add_special_tokens": adds_special_tokens(tokenizer, texts[0]),
    }
    try:
        if not any(images):
            return dict(tokenizer(texts, **options))
        return dict(processor(text=texts, images=images, **options))
    except (
        Exception
    ) as error:  # a text that holds the model's own token for pictures, wrong settings
        told = one_line(error)[:LONGEST]
        raise DataError(f"the processor refuses the conversation ({told})") from error


def unexpanded_ids(processor: Any, text: str) -> list[int]:
    """Token ids of a rendered conversation with one placeholder for each picture."""
    tokenizer = tokenizer_of(processor)
    ids: list[int] = tokenizer(
        text, add_special_tokens=adds_special_tokens(tokenizer, text)
    ).input_ids
    return ids


def adds_special_tokens(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer must add its first token: not if the template already did."""
    return tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)


@dataclass(frozen=True)
class _Answer:
    """Characters of an answer in the rendered text, and the pictures that come before it."""

    start: int
    stop: int
    num_images: int


def _answer_spans(
    processor: Any, sample: Sample, text: str, images: list[Image.Image], ids: list[int]
) -> list[tuple[int, int]]:
    """Positions of the assistant turns among the processed tokens.

    Where a picture alone takes another number of tokens than among several (LLaVA-OneVision), the
    answer's own tokens are looked for.
    """
    tokenizer = tokenizer_of(processor)
    adds = adds_special_tokens(tokenizer, text)
    plain = tokenizer(text, return_offsets_mapping=True, add_special_tokens=adds)
    left, right = torch.tensor(plain["offset_mapping"]).reshape(-1, 2).T
    added = {0: 0, len(images): len(ids) - len(left)}  # tokens that so many pictures add
    spans: list[tuple[int, int]] = []
    behind = 0  # where the last answer ends among the plain tokens
    for answer in _answers(processor, sample, text):
        hits = ((left < answer.stop) & (right > answer.start)).nonzero().flatten().tolist()
        if not hits:
            continue
        shown = answer.num_images
        if shown not in added:
            before = text[: answer.start]
            inputs = process(processor, [before], [images[:shown]], "right")
            alone = tokenizer(before, add_special_tokens=adds)
            added[shown] = inputs["input_ids"].shape[1] - len(alone["input_ids"])
        said = plain["input_ids"][hits[0] : hits[-1] + 1]
        start = hits[0] + added[shown]
        if ids[start : start + len(said)] != said:
            earliest = hits[0] - behind + (spans[-1][1] if spans else 0)
            start = _found(said, ids, earliest, sample)
        spans.append((start, start + len(said)))
        behind = hits[-1] + 1
    return spans


def _found(said: list[int], ids: list[int], earliest: int, sample: Sample) -> int:
    """The first place of an answer's tokens from a position on."""
    for start in range(earliest, len(ids) - len(said) + 1):
        if ids[start : start + len(said)] == said:
            return start
    raise DataError(f"sample {sample.id!r}: an answer cannot be found among its tokens")


def _answers(processor: Any, sample: Sample, text: str) -> list[_Answer]:
    """Where the answers are, each with what the template writes to end it.

    Two renders of the whole conversation are enough, however many turns it has.
    """
    marked = _marked(sample.messages)
    around, order = _split_at_marks(render(processor, marked))
    places = _places(_texts_of(sample.messages), around, order, text)
    if places is None:
        raise DataError(
            f"sample {sample.id!r}: the chat template rewrites what was said, so answers cannot be "
            "located"
        )
    prompt = _generation_prompt(processor, marked)
    end = _end_of_answer(tokenizer_of(processor), around[-1])
    answers, part, images = [], 0, 0
    for message in sample.messages:
        images += num_images(message)
        parts = range(part, part + len(_texts_of([message])))
        part = parts.stop
        spoken = [i for i in parts if i in places]
        if message["role"] != "assistant" or not spoken:
            continue
        start, stop = places[spoken[0]][0], places[spoken[-1]][1]
        before, after = (around[order.index(spoken[i]) - i] for i in (0, -1))
        prompted = before.rfind(prompt)
        start -= len(before) - prompted - len(prompt) if prompted >= 0 else 0
        stop += len(end) if after.startswith(end) else 0
        answers.append(_Answer(start, stop, images))
    return answers


def _texts_of(messages: Sequence[Message]) -> list[str]:
    """Every text of a conversation in order."""
    contents = [message["content"] for message in messages]
    parts = [[{"text": c}] if isinstance(c, str) else c for c in contents]
    return [part["text"] for content in parts for part in content if "text" in part]


def _marked(messages: Sequence[Message]) -> list[Message]:
    """The conversation with a numbered mark for each text."""
    numbers = count()

    def mark(content: Any) -> Any:
        if isinstance(content, str):
            return _MARK.format(next(numbers))
        return [
            {**part, "text": _MARK.format(next(numbers))} if "text" in part else part
            for part in content
        ]

    return [{**message, "content": mark(message["content"])} for message in messages]


def _split_at_marks(text: str) -> tuple[list[str], list[int]]:
    """What stands around the marks of a rendered conversation, and their numbers."""
    pieces = re.split(_MARK.format(r"(\d+)"), text)
    return pieces[::2], [int(number) for number in pieces[1::2]]


def _places(
    texts: list[str], around: list[str], order: list[int], text: str
) -> dict[int, tuple[int, int]] | None:
    """Characters of each text, which the template may have stripped; None if they do not fit."""
    if len(set(order)) != len(order) or not text.startswith(around[0]):
        return None
    places: dict[int, tuple[int, int]] = {}
    position = len(around[0])
    for number, after in zip(order, around[1:], strict=True):
        said = texts[number]
        forms = (said, said.rstrip(), said.lstrip(), said.strip())
        form = next((f for f in forms if text.startswith(f + after, position)), None)
        if form is None:
            return None
        places[number] = (position, position + len(form))
        position += len(form) + len(after)
    return places if position == len(text) else None


def _generation_prompt(processor: Any, marked: list[Message]) -> str:
    """What the template writes before an answer begins, at the first turn that is one."""
    first = next((i for i, m in enumerate(marked) if m["role"] == "assistant"), 0)
    if not first:
        return ""
    asked, waiting = (
        _split_at_marks(render(processor, marked[:first], generate))[0][-1]
        for generate in (False, True)
    )
    same = takewhile(lambda pair: pair[0] == pair[1], zip(asked, waiting, strict=False))
    return waiting[len(list(same)) :] or waiting


def _end_of_answer(tokenizer: Any, last: str) -> str:
    """What ends an answer: up to the first special token of what ends the conversation."""
    specials = [token.content for token in tokenizer.added_tokens_decoder.values()]
    ends = [(last.find(token), -len(token)) for token in specials if token in last]
    if not ends:
        return last.rstrip()
    at, negative_length = min(ends)
    return last[: at - negative_length]


def num_images(message: Message) -> int:
    """How many pictures a turn shows."""
    content = message["content"]
    return 0 if isinstance(content, str) else sum(part["type"] == "image" for part in content)


def begun(sample: Sample, messages: Sequence[Message]) -> Sample:
    """A conversation up to some turn, with the pictures that it has shown."""
    shown = sum(map(num_images, messages))
    return replace(sample, messages=tuple(messages), images=sample.images[:shown])
