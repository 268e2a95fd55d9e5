"""Conversations ↔ model inputs, through the processor's own chat template.

Labels stand on assistant turns only. Where they are is read off the template: what it adds when
the next assistant turn is appended is the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from slimvlm.errors import DataError
from slimvlm.losses import IGNORE
from slimvlm.samples import Message, Question, Sample


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor, or the tokenizer itself for a text model."""
    return getattr(processor, "tokenizer", processor)


def can_see(processor: Any) -> bool:
    """Whether the processor takes pictures."""
    return getattr(processor, "image_processor", None) is not None


def open_image(image: Image.Image | Path) -> Image.Image:
    """Load a picture as RGB.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        if not isinstance(image, Path):
            return image.convert("RGB")
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"image {str(image)!r}: cannot be read ({error})") from error


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
    """
    chat = list(messages) if can_see(processor) else [_text_only(m) for m in messages]
    if getattr(processor, "chat_template", None) is None:
        turns = [str(_text_only(message)["content"]) for message in messages]
        return "\n".join(turns) + ("\n" if generate else "")
    text: str = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=generate)
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
        DataError: If a picture cannot be read, or a sample has no answer tokens.
    """
    texts = [render(processor, sample.messages) for sample in samples]
    images = [[open_image(image) for image in sample.images] for sample in samples]
    inputs = process(processor, texts, images, padding_side="right")
    labels = torch.full_like(inputs["input_ids"], IGNORE)
    for row, sample in enumerate(samples):
        length = int(inputs["attention_mask"][row].sum())
        for start, stop in _answer_spans(processor, sample, texts[row], images[row], length):
            labels[row, start:stop] = inputs["input_ids"][row, start:stop]
        if not (labels[row] != IGNORE).any():
            raise DataError(f"sample {sample.id!r} has no assistant turn to learn from")
    return {**inputs, "labels": labels}


def encode_questions(processor: Any, questions: Sequence[Question]) -> dict[str, Tensor]:
    """Left-padded model inputs, ready for generation."""
    texts = [render(processor, question_messages(q), generate=True) for q in questions]
    images = [[open_image(image) for image in question.images] for question in questions]
    return process(processor, texts, images, padding_side="left")


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
        "add_special_tokens": _adds_special_tokens(tokenizer, texts[0]),
    }
    if any(images):
        return dict(processor(text=texts, images=images, **options))
    return dict(tokenizer(texts, **options))


def _adds_special_tokens(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer must add its first token: not if the template already did."""
    return tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)


def _answer_spans(
    processor: Any, sample: Sample, text: str, images: list[Image.Image], length: int
) -> list[tuple[int, int]]:
    """Token positions of the assistant turns in the processed sequence."""
    turns = [i for i, message in enumerate(sample.messages) if message["role"] == "assistant"]
    if not turns:
        return []
    first_images = sum(map(_num_images, sample.messages[: turns[0]]))
    if first_images < len(images):  # a picture after an answer: count tokens prefix by prefix
        return [_span_by_prefixes(processor, sample, images, turn) for turn in turns]
    tokenizer = tokenizer_of(processor)
    plain = tokenizer(
        text,
        return_offsets_mapping=True,
        add_special_tokens=_adds_special_tokens(tokenizer, text),
    )
    added = length - len(plain["input_ids"])  # by pictures, which all come before the answers
    spans = []
    for turn in turns:
        start, stop = _answer_characters(processor, sample, text, turn)
        hits = [
            i
            for i, (left, right) in enumerate(plain["offset_mapping"])
            if left < stop and right > start
        ]
        if hits:
            spans.append((hits[0] + added, hits[-1] + 1 + added))
    return spans


def _answer_characters(processor: Any, sample: Sample, text: str, turn: int) -> tuple[int, int]:
    prefix = render(processor, sample.messages[:turn], generate=True)
    through = render(processor, sample.messages[: turn + 1]).rstrip()
    if not text.startswith(prefix):
        raise DataError(
            f"sample {sample.id!r}: the chat template rewrites earlier turns, so answers cannot be "
            "located"
        )
    return len(prefix), len(through)


def _span_by_prefixes(
    processor: Any, sample: Sample, images: list[Image.Image], turn: int
) -> tuple[int, int]:
    """A turn's token positions, by processing the conversation up to it and through it."""
    lengths = []
    for end, generate in ((turn, True), (turn + 1, False)):
        messages = sample.messages[:end]
        text = render(processor, messages, generate=generate)
        shown = images[: sum(map(_num_images, messages))]
        inputs = process(processor, [text if generate else text.rstrip()], [shown], "right")
        lengths.append(inputs["input_ids"].shape[1])
    return lengths[0], lengths[1]


def _num_images(message: Message) -> int:
    content = message["content"]
    return 0 if isinstance(content, str) else sum(part["type"] == "image" for part in content)
