"""Read JSON, JSONL, parquet and what ``datasets`` reads as `Sample`s: LLaVA's or chat turns."""

import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from itertools import count, islice
from pathlib import Path
from typing import Any

from slimvlm.core.documents import identity_of_files, parse_json
from slimvlm.core.errors import LONGEST, ConfigError, DataError, one_line, raised_as, shortened
from slimvlm.core.files import path_of
from slimvlm.core.options import TooLong
from slimvlm.core.progress import Say, silent
from slimvlm.data import chat
from slimvlm.data.samples import Message, Sample, find_image, size_of

MAX_LINE_BYTES = 64 * 2**20  # longest line of a ``.jsonl`` file
DEMO = 1024  # conversations of the demo that a seed draws from
BATCH, BATCH_BYTES = 64, 2**28
"""Rows of a parquet or Arrow file in memory at once, and their bytes unless one row has more."""
NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that `datasets` writes beside its data, as it does caches, whose names begin so."""
ENDINGS = (".json", ".jsonl", ".parquet", ".arrow", ".csv", ".tsv", ".txt", ".gz", ".zip")
TRAIN = ("train",)
SPLITS = {
    "train": {"train", "training"},
    "test": {"test", "testing"},
    "validation": {"valid", "validation", "val", "dev", "eval", "evaluation"},
}
"""Splits of a source, and the words in names of files that tell them apart."""


def drawn(places: Sequence[int], seed: int, last: int = 0) -> tuple[list[int], list[int]]:
    """Order rows by their places, which are hashes, and draw all but the last anew by a seed."""
    order = sorted(range(len(places)), key=places.__getitem__)
    first = max(len(order) - last, 0)
    ahead, behind = order[:first], order[first:]
    if seed:
        ahead.sort(key=lambda row: blake2b(f"{seed} {places[row]}".encode()).digest())
    return ahead, behind


def read_rows(
    data: str | Path, outlined: bool = False, splits: Sequence[str] = TRAIN, say: Say = silent
) -> Iterator[Any]:
    """Yield rows as plain values, or errors; those of a table without images if ``outlined``.

    A folder or a hub dataset gives the first of ``splits`` that it has, which ``say`` receives.
    """
    path = path_of(data, "data")
    if path.exists():
        with raised_as(ConfigError, OSError, f"data {str(data)!r}: cannot be read"):
            for file in files_of_folder(path, splits, say) if path.is_dir() else [path]:
                yield from _rows_of_file(file, outlined)
    elif str(data).count("/") == 1 and not (
        str(data).startswith((".", "/", "~")) or path.suffix in ENDINGS or path.parent.is_dir()
    ):
        import datasets

        try:
            there = datasets.get_dataset_split_names(str(data)) if len(splits) > 1 else splits
            split = next((each for each in splits if each in there), splits[-1])
            say(split)
            table = datasets.load_dataset(str(data), split=split).with_format("arrow")
            for part in table.iter(batch_size=BATCH):
                yield from plain_rows(part, outlined)
        except Exception as error:
            told = f"cannot be loaded ({one_line(error.__cause__ or error)[:LONGEST]})"
            raise ConfigError(f"data {str(data)!r}: {told}") from error
    else:
        raise ConfigError(f"data {str(data)!r}: no such file or folder, nor a hub id (owner/name)")


def _rows_of_file(path: Path, outlined: bool) -> Iterator[Any]:
    if path.suffix in (".parquet", ".arrow"):
        told = f"data {str(path)!r}: is not a {path.suffix[1:]} file"
        with raised_as(DataError, Exception, told):  # a broken one makes pyarrow raise anything
            for part in _parts_of_table(path):
                yield from plain_rows(part, outlined)
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
                        yield parse_json(line.decode())
                    except ValueError as error:
                        yield DataError(f"line {number} is not JSON ({error})")
    elif path.suffix == ".json":
        with raised_as(DataError, ValueError, f"data {str(path)!r}: the file is not JSON"):
            rows = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list):
            raise DataError(f"data {str(path)!r}: must be a list of samples")
        yield from rows
    else:
        told = "must end in .json, .jsonl or .parquet, or be a folder"
        raise ConfigError(f"data {str(path)!r}: {told}")


def _parts_of_table(path: Path) -> Iterator[Any]:
    """Yield a parquet or Arrow file some rows at a time, without the cache of ``datasets``."""
    import pyarrow
    from pyarrow import parquet

    def at_once(num_rows: int, num_bytes: int) -> int:  # each row may repeat all bytes
        if num_rows > path.stat().st_size:
            raise ValueError(f"it has {num_rows:,} rows, more than bytes")
        return min(max(BATCH_BYTES // max(num_bytes, 1), 1), BATCH)

    if path.suffix == ".parquet":
        with parquet.ParquetFile(path) as file:
            about = file.metadata
            groups = (about.row_group(n).total_byte_size for n in range(about.num_row_groups))
            yield from file.iter_batches(at_once(about.num_rows, max(groups, default=0)))
        return
    with pyarrow.memory_map(str(path)) as source:
        for batch in pyarrow.ipc.open_stream(source):
            size = at_once(len(batch), batch.nbytes)
            yield from (batch.slice(start, size) for start in range(0, len(batch), size))


def files_of_folder(folder: Path, splits: Sequence[str] = TRAIN, say: Say = silent) -> list[Path]:
    """List the data files of a folder: its most frequent kind, and of these a split.

    Files and links that lead out of the folder are refused, and no card or script in it is read.
    Where names tell apart splits, the first of ``splits`` counts that is there, which ``say`` gets;
    else all files but those of testing and validation.
    """
    where, inside = f"data {str(folder)!r}", folder.resolve()
    kinds: dict[str, list[Path]] = {}
    with raised_as(ConfigError, (OSError, RuntimeError), f"{where}: cannot be read"):
        for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
            if not path.resolve().is_relative_to(inside):
                raise ConfigError(f"{where}: {path.name!r} is a link that leads out of it")
            if not path.is_file():
                raise ConfigError(f"{where}: {path.name!r} is not a regular file")
            is_cache = path.name.startswith("cache-") and path.suffix == ".arrow"
            is_data = path.name not in NO_ROWS and not is_cache
            if is_data and path.suffix in (".jsonl", ".json", ".parquet", ".arrow"):
                kinds.setdefault(path.suffix, []).append(path)
    if not kinds:
        raise ConfigError(f"{where}: has no .jsonl, .json, .parquet or .arrow file")
    files = max(kinds.values(), key=len)
    words = {p: set(re.split(r"[^a-z]+", str(p.relative_to(folder)).lower())) for p in files}
    for each in splits:
        if wanted := [path for path in files if words[path] & SPLITS[each]]:
            say(each)
            return wanted
    others = [p for p in files if words[p].isdisjoint(SPLITS["test"] | SPLITS["validation"])]
    if not others or "train" not in splits:
        raise ConfigError(f"{where} has no {' or '.join(splits)} split")
    return others


def plain_rows(part: Any, outlined: bool) -> Any:
    """Convert a batch to rows, with images as stored, so that no path in them is opened."""
    if outlined:
        part = part.select([name for name in part.schema.names if name not in ("image", "images")])
    return part.to_pylist()


_ROLES = {"human": "user", "gpt": "assistant"} | {n: n for n in ("system", "user", "assistant")}
IMAGE_WORD = "<image>"  # placeholder of an image in plain text
MOST_PICTURES = 1024  # images of a sample
NAMED = 20  # broken rows that are named one by one; the others are counted
_USED = ("messages", "conversations", "image", "images", "system")
_ROW = {"id": "id", "messages": "turns", "conversations": "turns"}
_ROW |= {"images": "images", "image": "images", "system": "system"}
_TURN = {"role": "role", "from": "role", "content": "content", "value": "content"}
_PART = {"type": "type", "text": "text", "image": "source", "path": "source"}
_PART |= {"url": "source", "image_url": "source"}
"""What the fields of a row, a turn and a part hold: one of those with the same."""
_WEIGHTS = {"weight", "loss_weight", "loss", "train", "training"}  # 1 is understood
_CONTENT = {  # fields of rows and turns that change the content, and that no sample holds
    *("video", "videos", "audio", "audios", "tools", "functions", "tool_calls", "function_call"),
    *("documents", "refusal", "reasoning_content", "reasoning", "thinking"),
}
_MISSING = object()
_MEDIA = re.compile("image|img|video|audio|vision", re.IGNORECASE)


def load_samples(
    data: str | Path,
    images: str | Path | None = None,
    limit: int | None = None,
    max_bad_rows: int = 0,
    warn: Say = print,
    processor: Any = None,
    max_length: int | None = None,
    context: int | None = None,
    too_long: TooLong = "error",
    seed: int = 0,
    test: int = 0,
) -> list[Sample]:
    """Read conversations from any supported source, in an order drawn by their content.

    Args:
        data: ``demo``; a LLaVA-format ``.json``; a ``.jsonl`` or ``.parquet`` with ``messages``
            (or ``conversations``); a folder that ``datasets`` saved; or a hub dataset id.
        images: Folder that image paths start from and lie in; by default that of the data.
        limit: Number of good samples, drawn from the whole source; None for all.
        max_bad_rows: Maximum number of bad rows to skip.
        warn: Receives a line for each of the first broken rows, and one for unknown columns.
        processor: A model's processor or tokenizer. Rows that it cannot read are broken, and those
            with its own tokens for media in a text.
        max_length: Maximum tokens per sample, counted by the processor.
        context: Tokens that the model reads at most; another maximum.
        too_long: ``error``: rows over a maximum are bad rows; ``truncate``: they are shortened.
        seed: Random seed of the draw.
        test: Number of samples of the limit that no seed and no limit changes (but of ``demo``).

    Raises:
        ConfigError: If the source does not exist or is not understood.
        DataError: If too many rows are broken; the message names the first one.
    """
    for name, value in (("samples", limit), ("max_length", max_length)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value} must be at least 1")
    if max_length is not None and processor is None:
        raise ConfigError(f"max_length {max_length} needs a processor to count tokens with")
    root = path_of(data, "data") if images is None else path_of(images, "images")
    if images is not None and not root.is_dir():
        raise ConfigError(f"images {str(images)!r} is not a folder")
    root = (root if root.is_dir() else root.parent).absolute()
    given = [value for value in (max_length, context) if value is not None]
    most = min(given, default=None) if processor is not None else None
    added = {} if processor is None else chat.tokenizer_of(processor).added_tokens_decoder
    stands = getattr(processor, "image_token", "")  # no text may have it, nor those of other media
    marks = [word for word in map(str, added.values()) if word == stands or _MEDIA.search(word)]
    limits = most, most == max_length, too_long == "truncate", marks
    rows, places = _placed(data, limit, seed, processor is None or chat.can_see(processor))
    ahead, behind = drawn(places, seed, 0 if limit is None else min(test, limit))
    order = [*behind, *ahead[: None if limit is None else limit - len(behind) + max_bad_rows]]
    found, unknown, bad, where = dict[int, Sample](), set[str](), 0, f"data {str(data)!r}"
    cut = set[int]()
    for number, sample in _samples(rows, set(order), root, unknown):
        try:
            if isinstance(sample, DataError):
                raise sample
            short = sample if processor is None else fitted(processor, sample, *limits)
            usual = 0 if processor is None or not short.images else _most_tokens(processor, None)
        except DataError as error:
            bad += 1
            if bad > max_bad_rows:
                raise DataError(f"{where}: {error} (--max-bad-rows {max_bad_rows})") from error
            (warn if bad <= NAMED else silent)(f"skipped: {error}")
            continue
        tokens = estimated_length(short, usual)
        found[number] = replace(short, place=places[number], tokens=tokens)
        if short is not sample:
            cut.add(number)
    _most_tokens.cache_clear()  # it holds the processor
    read = [row for row in order if row in found][:limit]
    samples = [found[row] for row in read]
    if bad:
        warn(f"{where}: {bad} broken rows skipped, {len(samples)} samples read")
    if num_cut := len(cut.intersection(read)):
        warn(f"{where}: {num_cut} samples were cut to {most} tokens")
    if unknown:
        blind = "" if any(sample.images for sample in samples) else "no row has an image; "
        warn(f"{where}: {blind}unknown columns: {', '.join(sorted(unknown))}")
    if not samples:
        raise DataError(f"{where}: no usable sample")
    return samples


def _placed(
    data: str | Path, limit: int | None, seed: int, sees: bool
) -> tuple[Iterable[Any], list[int]]:
    """Return rows and their places in every draw: hashes of their turns and images.

    Equal rows are numbered, so that their places differ.
    """
    if str(data) == "demo":  # a mix already, without an end
        from slimvlm.demo.questions import demo_samples

        made = demo_samples(max(limit or DEMO, DEMO if seed else 1), pictures=sees)
        return made, list(range(len(made)))
    rows = list(read_rows(data)) if path_of(data, "data").suffix == ".json" else None
    seen, places = Counter[bytes](), list[int]()
    for row in read_rows(data, outlined=True) if rows is None else rows:
        content = [row.get(name) for name in _USED] if isinstance(row, dict) else str(row)
        key = blake2b(json.dumps(content, sort_keys=True, default=repr).encode()).digest()
        seen[key] += 1
        place = blake2b(key + b"%d" % seen[key], digest_size=8).digest()
        places.append(int.from_bytes(place))
    return read_rows(data) if rows is None else rows, places


def _samples(
    rows: Iterable[Any], wanted: set[int], root: Path, unknown: set[str]
) -> Iterator[tuple[int, Sample | DataError]]:
    """Yield the wanted rows with their numbers, as samples or the errors that break them."""
    known = {*_ROW, *_WEIGHTS, *_CONTENT}

    def converted(numbered: tuple[int, Any]) -> tuple[int, Sample | DataError]:
        number, row = numbered
        try:
            return number, row if isinstance(row, Sample) else _sample(number, row, root, unknown)
        except DataError as error:
            return number, error

    slimmed = (  # others' columns may be large
        (n, {k: v if k in known else bool(v) or None for k, v in row.items()})
        if isinstance(row, dict)
        else (n, row)
        for n, row in enumerate(rows)
        if n in wanted
    )
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:  # decodes images
        while chunk := list(islice(slimmed, 256)):
            yield from pool.map(converted, chunk)


def _known(
    fields: dict[str, Any], names: dict[str, str], where: str, unknown: set[str]
) -> dict[str, Any]:
    """Keep what is read of a row, turn or part, by what it holds; refuse other content."""
    given = {field: value for field, value in fields.items() if value not in (None, "", [], {})}
    for field, value in given.items():
        if field in _CONTENT or (field in _WEIGHTS and value != 1):
            raise DataError(f"{where} has {field!r} ({shortened(str(value))}), which is not read")
    unknown |= given.keys() - names.keys() - _WEIGHTS
    found: dict[str, str] = {}
    for field in (field for field in names if field in given):
        if found.setdefault(names[field], field) != field:
            raise DataError(f"{where} has both {found[names[field]]} and {field}")
    return {name: given[field] for name, field in found.items()}


def _sample(index: int, row: Any, root: Path, unknown: set[str]) -> Sample:
    """Convert a row. Images without a placeholder come before the first user turn's text."""
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError(f"row {index} is not an object")
    name = str(index if row.get("id") is None else row["id"])[:100]
    where = f"sample {name!r}"
    row = _known(row, _ROW, where, unknown)
    if not isinstance(row.get("turns"), list):
        raise DataError(f"{where} has no messages or conversations")
    messages, sources = _messages(row["turns"], where, unknown)
    if system := row.get("system"):
        if not isinstance(system, str) or any(m["role"] == "system" for m in messages):
            raise DataError(f"{where}: 'system' must be a text, and the only system turn")
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    stated = row.get("images", [])
    listed = iter(stated if isinstance(stated, list) else [stated])
    shown = [next(listed, _MISSING) if source is None else source for source in sources]
    named = [image for image in (*shown, *listed) if image is not _MISSING]
    if len(named) > MOST_PICTURES:
        raise DataError(f"{where} has {len(named)} images; at most {MOST_PICTURES} are read")
    pictures = tuple(find_image(image, name, root) for image in named)
    if sources and len(sources) != len(pictures):
        raise DataError(f"{where} has {len(sources)} image placeholders, {len(pictures)} images")
    if pictures and not sources:
        first = next((m for m in messages if m["role"] == "user"), None)
        if first is None:
            raise DataError(f"{where} has images, but no user turn to show them in")
        first["content"] = [{"type": "image"}] * len(pictures) + first["content"]
    return Sample(id=name, messages=tuple(messages), images=pictures)


def _messages(turns: list[Any], where: str, unknown: set[str]) -> tuple[list[Message], list[Any]]:
    """Convert turns to chat form; also return each placeholder's image, None if it has none."""
    messages, sources, texts = list[Message](), list[Any](), list[str]()
    for turn in turns:
        if not isinstance(turn, dict):
            raise DataError(f"{where}: a turn is not an object")
        turn = _known(turn, _TURN, f"{where}: a turn", unknown)
        role, content = _ROLES.get(str(turn.get("role"))), turn.get("content", "")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if role is None or not isinstance(content, list):
            told = f"a turn needs a known role and text (role {turn.get('role')!r})"
            raise DataError(f"{where}: {told}")
        parts = [found for part in content for found in _parts(part, where, unknown)]
        sources += [part.pop("source") for part in parts if part["type"] == "image"]
        messages.append({"role": role, "content": parts})
        texts.append("".join(part.get("text", "") for part in parts))
    answers = [t for t, m in zip(texts, messages, strict=True) if m["role"] == "assistant"]
    if not answers or not all(text.strip() for text in answers):
        raise DataError(f"{where} has no answer, or an empty one")
    try:  # JSON can hold half of a surrogate pair, where an emoji was cut
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: a text is not Unicode ({error.reason})") from error
    return messages, sources


def _parts(part: Any, where: str, unknown: set[str]) -> Iterator[dict[str, Any]]:
    """Convert a part of a turn, images with their ``source``; a text's ``<image>`` is a part."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "image", "image_url"):
        raise DataError(f"{where}: content parts must be text or image, not {kind!r:.40}")
    known = _known(part, _PART, f"{where}: a part", unknown)
    if ("source" if kind == "text" else "text") in known:
        has = f"a part of type {kind!r} has {', '.join(sorted(part.keys() - {'type'}))}"
        raise DataError(f"{where}: {has}; it may have {kind.partition('_')[0]} alone")
    if kind != "text":
        source = known.get("source")
        if kind == "image_url" and isinstance(source, dict):
            source = source.get("url")
        yield {"type": "image", "source": source}
        return
    if not isinstance(part.get("text"), str):
        raise DataError(f"{where}: a text part without text")
    for position, piece in enumerate(part["text"].split(IMAGE_WORD)):
        if position:
            yield {"type": "image", "source": None}
            piece = piece.removeprefix("\n")
        if piece:
            yield {"type": "text", "text": piece}


def picture_tokens(processor: Any, size: tuple[int, int]) -> int:
    """Count the tokens that an image of a size adds to a question."""
    shown = chat.plain_question(processor, size)
    asked = [chat.encode_questions(processor, [q]) for q in (shown, replace(shown, images=()))]
    return int(asked[0]["input_ids"].shape[1] - asked[1]["input_ids"].shape[1])


@lru_cache(maxsize=2**14)
def _most_tokens(processor: Any, size: tuple[int, int] | None) -> int:
    """Bound an image's tokens, which may be stored turned, from above; None: a usual one."""
    if size is None:
        return picture_tokens(processor, chat.USUAL_SIZE)
    ways = (size, size[::-1])
    try:  # transformers' own count is private, but much faster, and leaves out separators
        asked = {"image_sizes": (*ways, chat.USUAL_SIZE[::-1])}
        *counts, usual = processor._get_num_multimodal_tokens(**asked)["num_image_tokens"]
        more = max(_most_tokens(processor, None) / usual, 1)
        return int(max(counts) * more * 9 / 8) + 16
    except Exception:  # some processors have none
        return max(picture_tokens(processor, way) for way in ways)


def fitted(
    processor: Any,
    sample: Sample,
    most: int | None,
    is_asked: bool = True,
    cuts: bool = False,
    marks: Sequence[str] = (),
) -> Sample:
    """Return a sample that can be learnt from, of at most so many tokens.

    It is refused if a text has one of ``marks``. To cut it, drop last turns, then its answer's end.
    A limit that no user requested is the model's context. Images are processed, which is slow,
    only where an estimate is above it.
    """
    text, _ = chat.located(processor, sample)
    said = "".join(part.get("text", "") for m in sample.messages for part in m["content"])
    if word := next((each for each in marks if each in said), None):
        raise DataError(f"sample {sample.id!r}: a text has the model's own {word!r}")
    if most is None:
        return sample
    shown = sum(_most_tokens(processor, size_of(image)) for image in sample.images)
    if len(text.encode()) + 8 + shown <= most:  # no token is shorter than a byte; a few are added
        return sample
    if chat.process(processor, [text], [[]], "right")["input_ids"].shape[1] + shown <= most:
        return sample
    length = chat.length_of(processor, sample)
    if length <= most:
        return sample
    which = "--max-length is" if is_asked else "the model reads"
    told = f"sample {sample.id!r} has {length} tokens, {which} {most}"
    if not cuts:
        raise DataError(f"{told} (--too-long truncate shortens it)")
    shorter = _cut(processor, sample, most)
    if shorter is None:
        raise DataError(f"{told}: nothing of its answer is left when it is cut")
    return shorter


def _cut(processor: Any, sample: Sample, most: int) -> Sample | None:
    """Drop last turns, or else the end of the only answer; None if nothing of it is left."""
    answered = [n for n, message in enumerate(sample.messages, 1) if message["role"] == "assistant"]
    for kept in reversed(answered):
        turns = sample.messages[:kept]
        pictures = sample.images[: sum(p["type"] == "image" for m in turns for p in m["content"])]
        shorter = replace(sample, messages=turns, images=pictures)
        if chat.length_of(processor, shorter) <= most:
            return shorter
    *before, last = shorter.messages
    answer = "".join(part.get("text", "") for part in last["content"])
    fits, beyond, found = 0, len(answer), None  # so many characters fit, so many do not
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        content = [{"type": "text", "text": answer[:middle]}]
        turns = (*before, {"role": "assistant", "content": content})
        shorter = replace(shorter, messages=turns, is_cut=True)
        if chat.length_of(processor, shorter) <= most:
            fits, found = middle, shorter
        else:
            beyond = middle
    return found if answer[:fits].strip() else None


def subset(samples: list[Sample], fraction: float, seed: int) -> list[Sample]:
    """Draw a seeded share, nested, in order, stratified by number of images and their folder."""
    strata: dict[tuple[int, str], list[int]] = {}
    for index, sample in enumerate(samples):
        first = sample.images[0] if sample.images else None
        folder = str(first.parent) if isinstance(first, Path) else ""
        strata.setdefault((min(len(sample.images), 2), folder), []).append(index)
    draw, placed = random.Random(seed), list[tuple[float, int]]()
    for members in strata.values():  # each in random order, evenly spread from a random offset
        draw.shuffle(members)
        offset = draw.random()
        placed += [((k + offset) / len(members), index) for k, index in enumerate(members)]
    chosen = sorted(placed)[: max(round(len(samples) * fraction), 1)]
    return [samples[index] for index in sorted(index for _, index in chosen)]


def estimated_length(sample: Sample, image_tokens: int) -> int:
    """Estimate a sample's tokens: 4 characters each; 576 an image (LLaVA-1.5's number)."""
    parts = (part for message in sample.messages for part in message["content"])
    characters = sum(len(part.get("text", "")) for part in parts)
    return characters // 4 + image_tokens * len(sample.images)


def identity_of_data(data: str) -> str:
    """Identify a data source's content, as `slimvlm.core.files` does."""
    return data if data == "demo" else identity_of_files(data, data)
