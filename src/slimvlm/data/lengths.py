"""Samples that are longer than a model can read: found before anything runs, refused or cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from slimvlm.core.errors import DataError
from slimvlm.data.chat import begun, length_of, rendered
from slimvlm.data.samples import Message, Sample

LARGE_PICTURE = 2048
"""Tokens that a picture is taken to have at most before it is looked at."""


@dataclass(frozen=True)
class Limit:
    """The longest sample that is allowed.

    Attributes:
        tokens: So many tokens, those of pictures included.
        is_asked: Whether a user has asked for it. Else it is what the model can read, and a sample
            that cannot be longer is not counted.
        cuts: Whether longer samples are cut; else they are refused.
    """

    tokens: int
    is_asked: bool = True
    cuts: bool = False

    @classmethod
    def of(cls, asked: int | None, context: int | None, cuts: bool) -> Limit | None:
        """The lower one of what is asked for and what the model reads; None if there is neither."""
        given = [value for value in (asked, context) if value is not None]
        return cls(min(given), min(given) == asked, cuts) if given else None


def fitted(processor: Any, sample: Sample, limit: Limit) -> Sample:
    """The sample if it is short enough, or what is left of it when it is cut.

    Whole turns go from its end, as long as an answer stays. If that is still too long, the end of
    this answer goes.

    Args:
        processor: The model's processor or tokenizer.
        sample: A conversation.
        limit: The longest that is allowed.

    Raises:
        DataError: If it is longer and not to be cut, or its first question alone is too long.
    """
    if not limit.is_asked and _at_most(processor, sample) <= limit.tokens:
        return sample
    length = length_of(processor, sample)
    if length <= limit.tokens:
        return sample
    what = "--max-length is" if limit.is_asked else "the model reads"
    if not limit.cuts:
        raise DataError(
            f"sample {sample.id!r} has {length} tokens, {what} {limit.tokens} (--too-long cut "
            "shortens it)"
        )
    for count in _ends(sample.messages):
        shorter = begun(sample, sample.messages[:count])
        if length_of(processor, shorter) <= limit.tokens:
            return shorter
    first = shorter
    kept, beyond = 0, len(_answer(first))
    while beyond - kept > 1:  # so many characters fit, so many do not
        middle = (kept + beyond) // 2
        fits = length_of(processor, _with_answer(first, middle)) <= limit.tokens
        kept, beyond = (middle, beyond) if fits else (kept, middle)
    if not _answer(first)[:kept].strip():
        raise DataError(
            f"sample {sample.id!r} has {length} tokens, {what} {limit.tokens}: nothing of its "
            "answer is left when it is cut"
        )
    return _with_answer(first, kept)


def _at_most(processor: Any, sample: Sample) -> int:
    """More tokens than the sample can have: no token of text is shorter than a byte."""
    text = rendered(processor, sample).encode()
    return len(text) + LARGE_PICTURE * len(sample.images) + 8  # what a tokenizer adds


def _ends(messages: Sequence[Message]) -> list[int]:
    """Numbers of turns that end with an answer, the most first."""
    spoken = [i for i, message in enumerate(messages, 1) if message["role"] == "assistant"]
    return spoken[::-1]


def _answer(sample: Sample) -> str:
    return "".join(part.get("text", "") for part in sample.messages[-1]["content"])


def _with_answer(sample: Sample, characters: int) -> Sample:
    """The sample with the beginning of its last answer."""
    content = [{"type": "text", "text": _answer(sample)[:characters]}]
    last = {"role": "assistant", "content": content}
    return replace(sample, messages=(*sample.messages[:-1], last))
