"""Read JSON, JSONL, parquet and what ``datasets`` reads as `Sample`s: LLaVA's or chat turns."""

import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import compress, count, islice, pairwise
from pathlib import Path
from typing import Any, TypeVar

from slimvlm.core.documents import identity_of_files, parse_json, read_object
from slimvlm.core.errors import LONGEST, ConfigError, DataError, one_line, raised_as, shortened
from slimvlm.core.files import path_of
from slimvlm.core.options import TooLong
from slimvlm.core.progress import Say, silent
from slimvlm.data.chat import can_see, length_of, num_images, rendered, require_readable
from slimvlm.data.samples import Message, Sample, find_image

Member = TypeVar("Member")

MAX_LINE_BYTES = 64 * 2**20  # longest line of a ``.jsonl`` file
BATCH, BATCH_BYTES = 64, 2**28
"""Rows of a parquet or Arrow file in memory at once, and their bytes unless one row has more."""
NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Names of JSON files beside the data."""
_JUDGING = {"test", "testing"}, {"valid", "validation", "val", "dev", "eval", "evaluation"}
TRAIN = ("train",)
SPLITS = {"train": {"train", "training"}, "test": _JUDGING[0], "validation": _JUDGING[1]}
"""Splits of a source, and the words in names of files that tell them apart."""
KEPT_BYTES = 2**29  # a ``.jsonl`` file up to this size is parsed once, and its rows are kept


def rows_in_step(data: str | Path, say: Say) -> Iterator[tuple[int, Any]]:
    """Yield the numbered rows of a source in an order whose beginning represents the whole.

    The order is the source's, unless rows with a picture and rows without are separated in it: then
    they are interleaved, each kind in its order, and ``say`` receives a line. Of n rows in random
    order, p with a picture, 2 p (n - p) / n have a successor of the other kind, on average (Wald
    and Wolfowitz 1940). Kinds are separated where less than half as many have.
    """
    path, kept = path_of(data, "data"), None
    if path.suffix == ".json" or (
        path.suffix == ".jsonl" and path.is_file() and path.stat().st_size <= KEPT_BYTES
    ):
        kept = list(read_rows(data))

    def again(outlined: bool = False) -> Iterator[Any]:
        return read_rows(data, outlined) if kept is None else iter(kept)

    shows = [_shows_picture(row) for row in again(outlined=True)]
    pictures, texts = sum(shows), len(shows) - sum(shows)
    changes = sum(one != other for one, other in pairwise(shows))
    if changes * len(shows) >= pictures * texts:
        yield from enumerate(again())
        return
    say(f"data {str(data)!r}: {pictures} rows with pictures and {texts} without are interleaved")
    with_picture = compress(enumerate(again()), shows)
    without = compress(enumerate(again()), (not shown for shown in shows))
    for shown in interleaved([(0.5, [False] * texts), (0.5, [True] * pictures)]):
        yield next(with_picture if shown else without)


def _shows_picture(row: Any) -> bool:
    """Return whether a row has a picture, as far as can be told without opening one."""
    if not isinstance(row, dict):
        return False
    turns = turns_of(row)
    return bool(stated_pictures(row)) or any(
        part.get("type") == "image"
        for turn in (turns if isinstance(turns, list) else ())
        if isinstance(turn, dict) and isinstance(turn.get("content"), list)
        for part in turn["content"]
        if isinstance(part, dict)
    )


def turns_of(row: dict[str, Any]) -> Any:
    """Return the field of a row that should hold its turns."""
    return row.get("messages") or row.get("conversations")


def stated_pictures(row: dict[str, Any]) -> Any:
    """Return the field of a row that should hold its pictures: one, a list of them, or None."""
    return row.get("images") if row.get("images") is not None else row.get("image")


def interleaved(groups: Iterable[tuple[float, Sequence[Member]]]) -> list[Member]:
    """Merge (offset u, members): the k-th of n members has the place (k + u) / n."""
    placed = [
        ((k + offset) / len(members), order, member)
        for order, (offset, members) in enumerate(groups)
        for k, member in enumerate(members)
    ]
    return [member for *_, member in sorted(placed, key=lambda row: row[:2])]


def read_rows(
    data: str | Path, outlined: bool = False, splits: Sequence[str] = TRAIN, say: Say = silent
) -> Iterator[Any]:
    """Yield rows as plain values, or errors; ``outlined`` ones have numbers for stored pictures.

    Of a folder or a hub dataset, the first of ``splits`` is read that it has, which ``say`` gets.
    """
    path = path_of(data, "data")
    if path.exists():
        try:
            for file in files_of_folder(path, splits, say) if path.is_dir() else [path]:
                yield from _rows_of_file(file, outlined)
        except OSError as error:
            raise ConfigError(f"data {str(data)!r}: cannot be read ({error.strerror})") from error
    elif str(data).count("/") == 1 and not str(data).startswith((".", "/")):
        import datasets

        try:
            there = datasets.get_dataset_split_names(str(data)) if len(splits) > 1 else splits
            split = next((each for each in splits if each in there), splits[-1])
            say(split)
            table = datasets.load_dataset(str(data), split=split).with_format("arrow")
            for part in table.iter(batch_size=BATCH):
                yield from plain_rows(part, outlined)
        except Exception as error:
            reason = one_line(error.__cause__ or error)[:LONGEST]
            raise ConfigError(f"data {str(data)!r}: cannot be loaded ({reason})") from error
    else:
        raise ConfigError(f"data {str(data)!r}: no such file, folder or dataset")


def _rows_of_file(path: Path, outlined: bool) -> Iterator[Any]:
    if path.suffix in (".parquet", ".arrow"):
        yield from _plain_rows(path, outlined)
    elif path.suffix == ".jsonl":
        with path.open("rb") as file:
            for number in count(1):
                line = file.readline(MAX_LINE_BYTES + 1)
                if not line:
                    return
                if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                    while line and not line.endswith(b"\n"):  # it never is in memory
                        line = file.readline(MAX_LINE_BYTES)
                    yield DataError(f"line {number} has more than {MAX_LINE_BYTES:,} bytes")
                elif line.strip():
                    try:
                        yield parse_json(line.decode("utf-8", "replace"))
                    except ValueError as error:
                        yield DataError(f"line {number} is not JSON ({error})")
    elif path.suffix == ".json":
        with raised_as(DataError, ValueError, f"data {str(path)!r}: the file is not JSON"):
            rows = parse_json(path.read_text(encoding="utf-8", errors="replace"))
        if not isinstance(rows, list):
            raise DataError(f"data {str(path)!r}: must be a list of conversations")
        yield from rows
    else:
        raise ConfigError(
            f"data {str(path)!r}: must end in .json, .jsonl or .parquet, or be a folder"
        )


def files_of_folder(folder: Path, splits: Sequence[str] = TRAIN, say: Say = silent) -> list[Path]:
    """List the data files of a folder: what ``datasets`` saved, or else those of a split.

    Files and links that lead out of the folder are refused, and no card or script in it is read.
    Where names tell apart splits, the first of ``splits`` counts that is there, which ``say`` gets;
    else all files but those of testing and validation.
    """
    where, inside = f"data {str(folder)!r}", folder.resolve()
    with raised_as(ConfigError, (OSError, RuntimeError), f"{where}: cannot be read"):
        found = sorted(path for path in folder.rglob("*") if not path.is_dir())
        outside = [path for path in found if not path.resolve().is_relative_to(inside)]
    if outside:
        raise ConfigError(f"{where}: {outside[0].name!r} is a link that leads out of it")
    if pipes := [path for path in found if not path.is_file()]:
        raise ConfigError(f"{where}: {pipes[0].name!r} is not a regular file")
    saved = folder
    if (folder / "dataset_dict.json").exists():
        named = next((each for each in splits if (folder / each).is_dir()), splits[-1])
        saved = folder / named
        say(named)
    if (saved / "state.json").exists():
        state = read_object(saved / "state.json", "data")
        listed = state.get("_data_files")
        rows = listed if isinstance(listed, list) else []
        names = [str(row.get("filename") if isinstance(row, dict) else row) for row in rows]
        own = {path.name: path for path in found if path.parent == saved}
        if unknown := [name for name in names if name not in own]:
            told = f"state.json names {shortened(unknown[0])}"
            raise ConfigError(f"{where}: {told}, but its files must lie in it")
        return [own[name] for name in names]
    kinds: dict[str, list[Path]] = {}
    for path in found:
        if path.suffix in (".jsonl", ".json", ".parquet", ".arrow") and path.name not in NO_ROWS:
            kinds.setdefault(path.suffix, []).append(path)
    if not kinds:
        raise ConfigError(f"{where}: has no .jsonl, .json, .parquet or .arrow file")
    files = max(kinds.values(), key=len)
    split = {p: set(re.split(r"[^a-z]+", str(p.relative_to(folder)).lower())) for p in files}
    for each in splits:
        if wanted := [path for path in files if split[path] & SPLITS[each]]:
            say(each)
            return wanted
    return [path for path in files if not split[path] & set[str]().union(*_JUDGING)]


def _plain_rows(path: Path, outlined: bool) -> Iterator[Any]:
    """Yield the rows of a parquet or Arrow file, without the cache of ``datasets``."""
    import pyarrow
    from pyarrow import parquet

    try:
        if path.suffix == ".parquet":
            with parquet.ParquetFile(path) as file:
                about = file.metadata
                groups = (about.row_group(n).total_byte_size for n in range(about.num_row_groups))
                at_once = _at_once(path, about.num_rows, max(groups, default=0))
                for part in file.iter_batches(at_once):
                    yield from plain_rows(part, outlined)
            return
        with pyarrow.memory_map(str(path)) as source:
            for batch in pyarrow.ipc.open_stream(source):
                at_once = _at_once(path, len(batch), batch.nbytes)
                for start in range(0, len(batch), at_once):
                    yield from plain_rows(batch.slice(start, at_once), outlined)
    except Exception as error:  # broken files make pyarrow raise almost anything
        kind = path.suffix.removeprefix(".")
        reason = one_line(error)[:LONGEST]
        raise DataError(f"data {str(path)!r}: is not a {kind} file ({reason})") from error


def _at_once(path: Path, num_rows: int, num_bytes: int) -> int:
    """Return how many rows to convert at once: each may repeat all bytes, from a dictionary."""
    if num_rows > path.stat().st_size:
        raise ValueError(f"it has {num_rows:,} rows, more than bytes")
    return min(max(BATCH_BYTES // max(num_bytes, 1), 1), BATCH)


def plain_rows(part: Any, outlined: bool) -> Any:
    """Convert a batch to rows, with pictures as stored, so that no path in them is opened."""
    for index, name in enumerate(part.schema.names if outlined else ()):
        if name in ("image", "images"):
            column = part.column(index)
            chunks = getattr(column, "chunks", [column])
            numbers = [getattr(chunk, "value_lengths", chunk.is_valid)() for chunk in chunks]
            joined = numbers if hasattr(column, "chunks") else numbers[0]
            part = part.set_column(index, name, joined)
    return part.to_pylist()


_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
IMAGE_WORD = "<image>"  # placeholder of a picture in plain text
MOST_PICTURES = 1024  # pictures of a sample
LARGE_PICTURE = 2048  # upper estimate of a picture's tokens
_AT_ONCE = 256
_FIELDS = {"id", "messages", "conversations", "image", "images"}
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
    if max_length is not None and processor is None:
        raise ConfigError(f"max_length {max_length} needs a processor to count tokens with")
    if max_length is not None and max_length < 1:
        raise ConfigError(f"max_length {max_length} must be at least 1")
    given = [value for value in (max_length, context) if value is not None]
    most = min(given, default=None) if processor is not None else None
    is_asked, cuts = most == max_length, too_long == "cut"
    samples: list[Sample] = []
    bad = cut = 0
    for found in _samples(data, images, limit, warn, processor):
        try:
            if isinstance(found, DataError):
                raise found
            if processor is not None:
                require_readable(processor, found)
            short = found if most is None else fitted(processor, found, most, is_asked, cuts)
            samples.append(short)
            cut += short is not found
        except DataError as error:
            bad += 1
            if bad > max_bad:
                raise DataError(f"data {str(data)!r}: {error} (--max-bad {max_bad})") from error
            warn(f"skipped: {error}")
        if len(samples) == limit:
            break
    if bad:
        warn(f"data {str(data)!r}: {bad} broken rows skipped, {len(samples)} samples read")
    if cut:
        warn(f"data {str(data)!r}: {cut} samples were cut to {most} tokens")
    if not samples:
        raise DataError(f"data {str(data)!r}: no usable sample")
    return samples


def _samples(
    data: str | Path, images: str | Path | None, limit: int | None, warn: Say, processor: Any
) -> Iterator[Sample | DataError]:
    """Yield each row as a sample, or the error that makes it broken."""
    if str(data) == "demo":
        from slimvlm.demo.questions import demo_samples

        has_pictures = processor is None or can_see(processor)
        yield from demo_samples(limit or 1024, pictures=has_pictures)
        return
    root = path_of(data, "data") if images is None else path_of(images, "images")
    root = root if root.is_dir() or images is not None else root.parent
    if images is not None and not root.is_dir():
        raise ConfigError(f"images {str(images)!r} is not a folder")
    root = root.absolute()

    def attempt(numbered: tuple[int, Any]) -> Sample | DataError:
        try:
            return _sample(*numbered, root)
        except DataError as error:
            return error

    rows = (  # others' columns may be large
        (n, {k: row[k] for k in _FIELDS & row.keys()} if isinstance(row, dict) else row)
        for n, row in rows_in_step(data, warn)
    )
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:  # decodes pictures
        while chunk := list(islice(rows, min(limit or _AT_ONCE, _AT_ONCE))):
            yield from pool.map(attempt, chunk)


def _sample(index: int, row: Any, root: Path) -> Sample:
    """Convert a row. Pictures without a placeholder come before the first user turn's text."""
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError(f"row {index} is not an object")
    name = str(row.get("id", index))[:100]
    turns = turns_of(row)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"sample {name!r} has no messages or conversations")
    messages, sources = _messages(turns, name)
    stated = stated_pictures(row)
    listed = iter([] if stated is None else stated if isinstance(stated, list) else [stated])
    shown = [next(listed, _MISSING) if source is None else source for source in sources]
    named = [image for image in (*shown, *listed) if image is not _MISSING]
    if len(named) > MOST_PICTURES:
        raise DataError(
            f"sample {name!r} has {len(named)} images; at most {MOST_PICTURES} are read"
        )
    pictures = tuple(find_image(image, name, root) for image in named)
    if sources and len(sources) != len(pictures):
        raise DataError(
            f"sample {name!r} has {len(sources)} image placeholders, {len(pictures)} images"
        )
    if pictures and not sources:
        first = next((m for m in messages if m["role"] == "user"), None)
        if first is None:
            raise DataError(f"sample {name!r} has images, but no user turn to show them in")
        first["content"] = [{"type": "image"}] * len(pictures) + first["content"]
    return Sample(id=name, messages=tuple(messages), images=pictures)


def _messages(turns: list[Any], name: str) -> tuple[list[Message], list[Any]]:
    """Convert turns to chat form; return also each placeholder's picture, None if it has none."""
    messages: list[Message] = []
    sources: list[Any] = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise DataError(f"sample {name!r}: a turn is not an object")
        written = turn.get("role", turn.get("from"))
        role = "system" if written == "system" else _ROLES.get(str(written))
        content = turn.get("content", turn.get("value"))
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if role is None or not isinstance(content, list):
            raise DataError(
                f"sample {name!r}: a turn needs a known role and text (role {written!r})"
            )
        parts, shown = _parts(content, name)
        sources += shown
        messages.append({"role": role, "content": parts})
    texts = [(m["role"], "".join(part.get("text", "") for part in m["content"])) for m in messages]
    answers = [text for role, text in texts if role == "assistant"]
    if not answers or not all(text.strip() for text in answers):
        raise DataError(f"sample {name!r} has no answer, or an empty one")
    try:  # JSON can hold half of a surrogate pair, where an emoji was cut
        "".join(text for _, text in texts).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"sample {name!r}: a text is not Unicode ({error.reason})") from error
    return messages, sources


def _parts(content: list[Any], name: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """Convert a turn's content; ``<image>`` in a text becomes a part of its own."""
    parts: list[dict[str, Any]] = []
    sources: list[Any] = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in ("text", "image"):
            raise DataError(f"sample {name!r}: content parts must be text or image")
        if part["type"] == "image":
            parts.append({"type": "image"})
            sources.append(next((part[k] for k in ("image", "path", "url") if part.get(k)), None))
            continue
        if not isinstance(part.get("text"), str):
            raise DataError(f"sample {name!r}: a text part without text")
        for position, piece in enumerate(part["text"].split(IMAGE_WORD)):
            if position:
                parts.append({"type": "image"})
                sources.append(None)
                piece = piece.removeprefix("\n")
            if piece:
                parts.append({"type": "text", "text": piece})
    return parts, sources


def fitted(
    processor: Any, sample: Sample, most: int, is_asked: bool = True, cuts: bool = False
) -> Sample:
    """Return a sample of at most so many tokens; to cut it, drop last turns, then its answer's end.

    A limit that no user asked for is the model's context; what cannot exceed it is not tokenised.
    """
    if not is_asked:  # no token of text is shorter than a byte; a tokenizer adds a few
        size = len(rendered(processor, sample).encode()) + LARGE_PICTURE * len(sample.images) + 8
        if size <= most:
            return sample
    length = length_of(processor, sample)
    if length <= most:
        return sample
    which = "--max-length is" if is_asked else "the model reads"
    told = f"sample {sample.id!r} has {length} tokens, {which} {most}"
    if not cuts:
        raise DataError(f"{told} (--too-long cut shortens it)")
    answered = [n for n, message in enumerate(sample.messages, 1) if message["role"] == "assistant"]
    for kept in reversed(answered):
        turns = sample.messages[:kept]
        pictures = sample.images[: sum(map(num_images, turns))]
        shorter = replace(sample, messages=turns, images=pictures)
        if length_of(processor, shorter) <= most:
            return shorter
    # cut the last answer at the last character that fits, found by bisection
    *before, last = shorter.messages
    answer = "".join(part.get("text", "") for part in last["content"])

    def with_answer(characters: int) -> Sample:
        content = [{"type": "text", "text": answer[:characters]}]
        turns = (*before, {"role": "assistant", "content": content})
        return replace(shorter, messages=turns, is_cut=True)

    fits, beyond = 0, len(answer)
    while beyond - fits > 1:  # so many characters fit, so many do not
        middle = (fits + beyond) // 2
        if length_of(processor, with_answer(middle)) <= most:
            fits = middle
        else:
            beyond = middle
    if not answer[:fits].strip():
        raise DataError(f"{told}: nothing of its answer is left when it is cut")
    return with_answer(fits)


def subset(samples: list[Sample], fraction: float, seed: int) -> list[Sample]:
    """Draw a seeded share, nested, in order, stratified by number of pictures and their folder."""
    strata: dict[tuple[int, str], list[int]] = {}
    for index, sample in enumerate(samples):
        first = sample.images[0] if sample.images else None
        folder = str(first.parent) if isinstance(first, Path) else ""
        strata.setdefault((min(len(sample.images), 2), folder), []).append(index)
    draw = random.Random(seed)
    groups: list[tuple[float, list[int]]] = []
    for members in strata.values():  # each in random order, with one random offset
        draw.shuffle(members)
        groups.append((draw.random(), members))
    chosen = interleaved(groups)[: max(round(len(samples) * fraction), 1)]
    return [samples[i] for i in sorted(chosen)]


def estimated_length(sample: Sample, image_tokens: int = 576) -> int:
    """Estimate a sample's tokens: 4 characters each; 576 a picture (LLaVA-1.5's number)."""
    parts = (part for message in sample.messages for part in message["content"])
    characters = sum(len(part.get("text", "")) for part in parts)
    return characters // 4 + image_tokens * len(sample.images)


def identity_of_data(data: str) -> str:
    """Identify a data source's content, as `slimvlm.core.files` does."""
    return data if data == "demo" else identity_of_files(data, data)
