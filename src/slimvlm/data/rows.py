"""Read data sources as rows of plain values: JSON, JSONL, parquet and what ``datasets`` reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, pairwise
from pathlib import Path
from typing import Any, BinaryIO

from slimvlm.core.documents import (
    MAX_YAML_BYTES,
    parse_json,
    parse_yaml,
    read_object,
    read_text,
    texts_in,
)
from slimvlm.core.errors import LONGEST, ConfigError, DataError, one_line, shortened
from slimvlm.core.progress import Say

MAX_LINE_BYTES = 64 * 2**20
"""Longest line of a ``.jsonl`` file."""
KEPT_BYTES = 2**29
"""Size up to which a ``.jsonl`` file is parsed once and its rows are kept while they are read."""


def rows_in_step(data: str | Path, say: Say) -> Iterator[tuple[int, Any]]:
    """Yield the numbered rows of a source in an order whose beginning represents the whole.

    The order is the source's, unless rows with a picture and rows without are separated in it: then
    they are interleaved, each kind in its order, and ``say`` receives a line. Of n rows in random
    order, p with a picture, 2 p (n - p) / n have a successor of the other kind, on average (Wald
    and Wolfowitz 1940). Kinds are separated where less than half as many have.
    """
    path, kept = Path(data), None
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


def interleaved(groups: Iterable[tuple[float, Sequence[int]]]) -> list[int]:
    """Merge groups so that each beginning has about every group's share of the whole.

    The k-th of a group's n members has the place (k + u) / n; a group is its offset u, from 0 to 1,
    and its members.
    """
    placed = [
        ((k + offset) / len(members), member)
        for offset, members in groups
        for k, member in enumerate(members)
    ]
    return [member for _, member in sorted(placed)]


def read_rows(data: str | Path, outlined: bool = False) -> Iterator[Any]:
    """Yield the rows of a data source as plain values, and a `DataError` for one that is not JSON.

    ``outlined`` replaces a column of stored pictures by their number, or whether there is one.
    """
    path = Path(data)
    if path.is_file():
        try:
            yield from _rows_of_file(path, outlined)
        except OSError as error:
            raise ConfigError(f"data {str(data)!r}: cannot be read ({error.strerror})") from error
    elif path.is_dir() or (str(data).count("/") == 1 and not str(data).startswith((".", "/"))):
        yield from _rows_of_dataset(path if path.is_dir() else str(data), outlined)
    else:
        raise ConfigError(f"data {str(data)!r}: no such file, folder or dataset")


def _rows_of_file(path: Path, outlined: bool) -> Iterator[Any]:
    if path.suffix == ".parquet":
        import datasets

        try:
            table = datasets.Dataset.from_parquet(str(path))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"data {str(path)!r}: is not a parquet file ({error})") from error
        yield from _plain_rows(table, outlined)
    elif path.suffix == ".jsonl":
        with path.open("rb") as file:
            yield from _rows_of_lines(file)
    elif path.suffix == ".json":
        try:
            rows = parse_json(path.read_text(encoding="utf-8", errors="replace"))
        except ValueError as error:
            raise DataError(f"data {str(path)!r}: the file is not JSON ({error})") from error
        if not isinstance(rows, list):
            raise DataError(f"data {str(path)!r}: must be a list of conversations")
        yield from rows
    else:
        raise ConfigError(
            f"data {str(path)!r}: must end in .json, .jsonl or .parquet, or be a folder"
        )


def _rows_of_dataset(source: Path | str, outlined: bool) -> Iterable[Any]:
    import datasets

    if isinstance(source, Path):
        _require_own_files(source)
    try:
        if isinstance(source, Path) and (source / "state.json").exists():
            table = datasets.load_from_disk(str(source))
        elif isinstance(source, Path) and (source / "dataset_dict.json").exists():
            table = datasets.load_from_disk(str(source))["train"]
        else:
            table = datasets.load_dataset(str(source), split="train")
        return _plain_rows(table, outlined)
    except Exception as error:  # broken files make datasets and pyarrow raise almost anything
        reason = one_line(error.__cause__ or error)[:LONGEST]
        raise ConfigError(f"data {str(source)!r}: cannot be loaded ({reason})") from error


def _require_own_files(folder: Path) -> None:
    """Refuse a folder that reads files outside it, through a link or a path in a description."""
    where, inside = f"data {str(folder)!r}", folder.resolve()
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise ConfigError(f"{where}: {path.name!r} is a link that leads out of it")
        for named in texts_in(_files_named_by(path)):
            if "://" in named or ".." in named or named.startswith(("/", "~")):
                raise ConfigError(
                    f"{where}: {path.name} names {shortened(named)}, but its files must lie in it"
                )


def _files_named_by(path: Path) -> Any:
    """Return the part of a ``datasets`` description that names files."""
    if path.name in ("state.json", "dataset_dict.json") and path.is_file():
        values = read_object(path, "data")
        return [values.get("_data_files"), values.get("splits")]
    if path.name in ("README.md", ".huggingface.yaml") and path.is_file():
        text = read_text(path, "data", MAX_YAML_BYTES)
        head = text.split("---")[1] if text.startswith("---") else text * (path.suffix == ".yaml")
        try:
            values = parse_yaml(head)
        except ValueError as error:
            raise ConfigError(f"data {str(path)!r}: cannot be read ({error})") from error
        return values.get("configs") if isinstance(values, dict) else None
    return None


def _plain_rows(table: Any, outlined: bool) -> Iterator[Any]:
    """Yield rows with pictures as they are stored, so that no path in them is opened unchecked."""
    for part in table.with_format("arrow").iter(batch_size=64):
        for index, name in enumerate(part.column_names if outlined else ()):
            if name in ("image", "images"):
                chunks = part.column(name).chunks
                numbers = [getattr(chunk, "value_lengths", chunk.is_valid)() for chunk in chunks]
                part = part.set_column(index, name, numbers)
        yield from part.to_pylist()


def _rows_of_lines(file: BinaryIO) -> Iterator[Any]:
    """Yield the rows of a ``.jsonl`` file; a line that is too long never is in memory."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            yield DataError(f"line {number} has more than {MAX_LINE_BYTES:,} bytes")
        elif line.strip():
            try:
                yield parse_json(line.decode("utf-8", "replace"))
            except ValueError as error:
                yield DataError(f"line {number} is not JSON ({error})")
