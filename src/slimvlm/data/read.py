"""Rows → `Sample`s: LLaVA's conversations and chat ``messages``, with their pictures."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from slimvlm.core.errors import ConfigError, DataError
from slimvlm.core.options import TooLong
from slimvlm.core.progress import Say
from slimvlm.core.requests import identity_of_files
from slimvlm.data.chat import require_readable
from slimvlm.data.images import find_image
from slimvlm.data.lengths import Limit, fitted
from slimvlm.data.rows import interleaved, rows_in_step, stated_pictures, turns_of
from slimvlm.data.samples import Message, Sample

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
IMAGE_WORD = "<image>"
"""Stands for a picture in plain text."""

_AT_ONCE = 256
_MISSING = object()


def load_samples(
    data: str | Path,
    images: str | Path | None = None,
    limit: int | None = None,
    max_bad: int = 0,
    warn: Say = print,
    processor: Any = None,
    max_length: int | None = None,
    context: int | None = None,
    too_long: TooLong = "refuse",
) -> list[Sample]:
    """Read conversations from any supported source.

    Args:
        data: ``demo``; a LLaVA-format ``.json``; a ``.jsonl`` or ``.parquet`` with ``messages``
            (or ``conversations``); a folder that ``datasets`` saved; or a hub dataset id.
        images: Folder that image paths start from and lie in; by default the data file's own, or
            the folder that ``datasets`` saved.
        limit: Read only the first so many good samples, in the order of `rows_in_step`.
        max_bad: Up to so many broken rows are skipped and named; one more is an error.
        warn: Receives one line for each row that was skipped.
        processor: A model's processor or tokenizer. Rows that it cannot read are broken, too: those
            that its chat template refuses, and pictures where it takes none.
        max_length: Rows with more tokens, counted by the processor, are too long.
        context: Tokens that the model reads at most; rows with more are too long, too.
        too_long: Whether rows that are too long are broken, too (``refuse``), or ``cut``; how many
            were cut is said.

    Raises:
        ConfigError: If the source does not exist or is not understood.
        DataError: If too many rows are broken; the message names the first one.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"samples {limit} must be at least 1")
    longest = _longest(processor, max_length, context, too_long)
    samples: list[Sample] = []
    bad = cut = 0
    for found in _found(data, images, limit, warn):
        try:
            samples.append(_readable(found, processor, longest))
            cut += samples[-1] is not found
        except DataError as error:
            bad += 1
            if bad > max_bad:
                raise DataError(f"data {str(data)!r}: {error} (--max-bad {max_bad})") from error
            warn(f"skipped: {error}")
        if len(samples) == limit:
            break
    if bad:
        warn(f"data {str(data)!r}: {bad} broken rows skipped, {len(samples)} samples read")
    if cut and longest is not None:
        warn(f"data {str(data)!r}: {cut} samples were cut to {longest.tokens} tokens")
    if not samples:
        raise DataError(f"data {str(data)!r}: no usable sample")
    return samples


def _found(
    data: str | Path, images: str | Path | None, limit: int | None, warn: Say
) -> Iterable[Sample | DataError]:
    """What each row of a source is: a sample, or why it is none."""
    if str(data) == "demo":
        from slimvlm.demo.conversations import demo_samples

        return demo_samples(limit or 1024)
    root = Path(images if images is not None else data)
    root = root if root.is_dir() or images is not None else root.parent
    if images is not None and not root.is_dir():
        raise ConfigError(f"images {str(images)!r} is not a folder")
    return _read_in_order(
        rows_in_step(data, warn), root.absolute(), min(limit or _AT_ONCE, _AT_ONCE)
    )


def _longest(
    processor: Any, max_length: int | None, context: int | None, too_long: TooLong
) -> Limit | None:
    if max_length is not None and max_length < 1:
        raise ConfigError(f"max_length {max_length} must be at least 1")
    if max_length is not None and processor is None:
        raise ConfigError(f"max_length {max_length} needs a processor to count tokens with")
    return Limit.of(max_length, context, too_long == "cut")


def _readable(found: Sample | DataError, processor: Any, longest: Limit | None) -> Sample:
    """A sample that the processor can read, short enough for the model."""
    if isinstance(found, DataError):
        raise found
    if processor is None:
        return found
    require_readable(processor, found)
    return found if longest is None else fitted(processor, found, longest)


def _read_in_order(
    numbered: Iterator[tuple[int, Any]], root: Path, at_once: int
) -> Iterator[Sample | DataError]:
    """What each row is: a sample, or why it is none. Several threads decode the pictures."""

    def attempt(row_at: tuple[int, Any]) -> Sample | DataError:
        index, row = row_at
        try:
            return _sample(row, index, root)
        except DataError as error:
            return error

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        while chunk := list(islice(numbered, at_once)):
            yield from pool.map(attempt, chunk)


def subset(samples: list[Sample], fraction: float, seed: int) -> list[Sample]:
    """A seeded share of the samples, in their original order.

    It is stratified: samples without pictures, with one and with several keep their shares, and so
    does each folder that pictures come from (to within one sample of a stratum, as far as the
    rounding of the whole allows). It is nested: 5 % of the data lie within its 10 %. It depends on
    the order of the samples and the seed alone, so it is the same on every rank.
    """
    count = max(round(len(samples) * fraction), 1)
    chosen = _stratified_order(samples, seed)[:count]
    return [samples[i] for i in sorted(chosen)]


def estimated_length(sample: Sample, image_tokens: int = 576) -> int:
    """About how many tokens a sample has: a key to batch samples of similar length.

    Neither the text nor the pictures are read by a tokenizer or processor: four characters count
    as a token, and every picture as equally many.

    Args:
        sample: A conversation.
        image_tokens: Tokens of a picture; 576 is LLaVA-1.5's number.
    """
    parts = (part for message in sample.messages for part in message["content"])
    characters = sum(len(part.get("text", "")) for part in parts)
    return characters // 4 + image_tokens * len(sample.images)


def _stratified_order(samples: list[Sample], seed: int) -> list[int]:
    """Indices in an order of which every beginning is a stratified sample.

    Each stratum is in random order and has one random offset.
    """
    strata: dict[tuple[int, str], list[int]] = {}
    for index, sample in enumerate(samples):
        strata.setdefault(_stratum(sample), []).append(index)
    draw = random.Random(seed)
    groups: list[tuple[float, list[int]]] = []
    for members in strata.values():
        draw.shuffle(members)
        groups.append((draw.random(), members))
    return interleaved(groups)


def _stratum(sample: Sample) -> tuple[int, str]:
    """How many pictures (0, 1, several), and the folder of the first."""
    first = sample.images[0] if sample.images else None
    return min(len(sample.images), 2), str(first.parent) if isinstance(first, Path) else ""


def identity_of_data(data: str) -> str:
    """What tells a source apart from another one under its name, as `slimvlm.core.files` has it."""
    return data if data == "demo" else identity_of_files(data, data)


def _sample(row: Any, index: int, root: Path) -> Sample:
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError(f"row {index} is not an object")
    name = str(row.get("id", index))[:100]
    turns = turns_of(row)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"sample {name!r} has no messages or conversations")
    stated = stated_pictures(row)
    given = [] if stated is None else stated if isinstance(stated, list) else [stated]
    messages, sources = _messages(turns, name)
    listed = iter(given)
    shown = [next(listed, _MISSING) if source is None else source for source in sources]
    named = [image for image in (*shown, *listed) if image is not _MISSING]
    pictures = [find_image(image, name, root) for image in named]
    messages = _with_placeholders(messages, len(pictures), name)
    return Sample(id=name, messages=tuple(messages), images=tuple(pictures))


def _require_unicode(messages: list[Message], name: str) -> None:
    """Refuse half of a surrogate pair, which JSON can hold where an emoji was cut."""
    try:
        "".join(part.get("text", "") for m in messages for part in m["content"]).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"sample {name!r}: a text is not Unicode ({error.reason})") from error


def _messages(turns: list[Any], name: str) -> tuple[list[Message], list[Any]]:
    """Turns in chat form, and for each placeholder the picture that stands there; None if none."""
    messages: list[Message] = []
    sources: list[Any] = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise DataError(f"sample {name!r}: a turn is not an object")
        said = turn.get("role", turn.get("from"))
        role = "system" if said == "system" else _ROLES.get(str(said))
        content = turn.get("content", turn.get("value"))
        if role is None or not isinstance(content, str | list):
            raise DataError(f"sample {name!r}: a turn needs a known role and text (role {said!r})")
        parts = _split_placeholders(content) if isinstance(content, str) else []
        for part in content if isinstance(content, list) else []:
            if not isinstance(part, dict) or part.get("type") not in ("text", "image"):
                raise DataError(f"sample {name!r}: content parts must be text or image")
            if part["type"] == "text":
                if not isinstance(part.get("text"), str):
                    raise DataError(f"sample {name!r}: a text part without text")
                parts += _split_placeholders(part["text"])
                continue
            source = next((part[k] for k in ("image", "path", "url") if part.get(k)), None)
            parts.append({"type": "image", "source": source})
        sources += [part.pop("source", None) for part in parts if part["type"] == "image"]
        messages.append({"role": role, "content": parts})
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers or not all(_has_text(m) for m in answers):
        raise DataError(f"sample {name!r} has no answer, or an empty one")
    _require_unicode(messages, name)
    return messages, sources


def _has_text(message: Message) -> bool:
    return any(part.get("text", "").strip() for part in message["content"])


def _split_placeholders(text: str) -> list[dict[str, Any]]:
    """``<image>`` and what follows → an image part and a text part."""
    parts: list[dict[str, Any]] = []
    for position, piece in enumerate(text.split(IMAGE_WORD)):
        if position:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _with_placeholders(messages: list[Message], pictures: int, name: str) -> list[Message]:
    """Pictures that no placeholder mentions come before the first user turn's text."""
    mentioned = sum(p["type"] == "image" for m in messages for p in m["content"])
    if mentioned == pictures:
        return messages
    if mentioned:
        raise DataError(f"sample {name!r} has {mentioned} image placeholders, {pictures} images")
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
    if first is None:
        raise DataError(f"sample {name!r} has images, but no user turn to show them in")
    content = [{"type": "image"}] * pictures + messages[first]["content"]
    return [*messages[:first], {"role": "user", "content": content}, *messages[first + 1 :]]
