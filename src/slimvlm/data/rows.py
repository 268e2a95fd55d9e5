"""Data sources → rows of plain values: JSON, JSONL, parquet and what ``datasets`` reads."""

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


def rows_in_step(data: str | Path, say: Say) -> Iterator[tuple[int, Any]]:
    """The rows of a source, each with its number there, so that its beginning is like the whole.

    The order is the source's, unless rows with a picture and rows without stand apart in it: then
    they come in step, each kind in its order, and any beginning has about the shares of the whole.
    Of n rows in random order, p with a picture, 2 p (n - p) / n have a successor of the other kind,
    on average (Wald and Wolfowitz 1940). Kinds stand apart where less than half as many have.

    Args:
        data: As for `read_rows`, which says what is raised.
        say: Receives a line where the order is not the source's.
    """
    kept = list(read_rows(data)) if Path(data).suffix == ".json" else None

    def again(outlined: bool = False) -> Iterator[Any]:
        return read_rows(data, outlined) if kept is None else iter(kept)

    shows = [_shows_picture(row) for row in again(outlined=True)]
    if not _stand_apart(shows):
        yield from enumerate(again())
        return
    pictures, texts = sum(shows), len(shows) - sum(shows)
    say(f"data {str(data)!r}: {pictures} rows with pictures and {texts} without are read in step")
    with_picture = compress(enumerate(again()), shows)
    without = compress(enumerate(again()), (not shown for shown in shows))
    for shown in _in_step(shows):
        yield next(with_picture if shown else without)


def _shows_picture(row: Any) -> bool:
    """Whether a row has a picture, as far as can be told without opening one."""
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
    """What a row has where its turns should be."""
    return row.get("messages") or row.get("conversations")


def stated_pictures(row: dict[str, Any]) -> Any:
    """What a row has where its pictures should be: one, a list of them, or None."""
    return row.get("images") if row.get("images") is not None else row.get("image")


def _stand_apart(kinds: Sequence[bool]) -> bool:
    changes = sum(one != other for one, other in pairwise(kinds))
    return changes * len(kinds) < sum(kinds) * (len(kinds) - sum(kinds))


def _in_step(kinds: Sequence[bool]) -> list[int]:
    """The kinds in an order of which each beginning has about the shares of the whole."""
    return interleaved((0.5, [kind] * kinds.count(kind)) for kind in (False, True))


def interleaved(groups: Iterable[tuple[float, Sequence[int]]]) -> list[int]:
    """The members of groups, so that each beginning has about every group's share of the whole.

    The k-th of a group's n members stands at (k + u) / n.

    Args:
        groups: Of each group the offset u, from 0 to 1, and its members in their order.
    """
    placed = [
        ((k + offset) / len(members), member)
        for offset, members in groups
        for k, member in enumerate(members)
    ]
    return [member for _, member in sorted(placed)]


def read_rows(data: str | Path, outlined: bool = False) -> Iterator[Any]:
    """The rows of a data source as plain values, and a `DataError` for each that is not JSON.

    Args:
        data: A ``.json``, ``.jsonl`` or ``.parquet`` file, a folder that ``datasets`` saved, or a
            hub dataset id.
        outlined: Whether stored pictures are left out: of a column of them is told how many a row
            has, or whether it has one.

    Raises:
        ConfigError: If the source does not exist or is not understood.
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
        with path.open("rb") as lines:
            for number, line in enumerate(_lines(lines), 1):
                if isinstance(line, DataError):
                    yield DataError(f"line {number} {line}")
                elif line.strip():
                    yield _parsed(line.decode("utf-8", "replace"), f"line {number}")
    elif path.suffix == ".json":
        rows = _parsed(path.read_text(encoding="utf-8", errors="replace"), "the file")
        if isinstance(rows, DataError):
            raise DataError(f"data {str(path)!r}: {rows}")
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
    """Refuse a folder that reads elsewhere: by a link, or by a path in one of its descriptions."""
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
    """What a description by which ``datasets`` finds files says of their places."""
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
    """Rows with pictures as they are stored, so that no path among them is opened unchecked."""
    for part in table.with_format("arrow").iter(batch_size=64):
        yield from (_outlined(part) if outlined else part).to_pylist()


def _outlined(part: Any) -> Any:
    """A table that tells of pictures how many a row has, or whether it has one."""
    for index, name in enumerate(part.column_names):
        if name in ("image", "images"):
            chunks = part.column(name).chunks
            told = [getattr(chunk, "value_lengths", chunk.is_valid)() for chunk in chunks]
            part = part.set_column(index, name, told)
    return part


def _lines(file: BinaryIO) -> Iterator[bytes | DataError]:
    """The lines of a file; of one that is too long no more than the limit is in memory."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)
        yield DataError(f"has more than {MAX_LINE_BYTES:,} bytes")


def _parsed(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        return DataError(f"{where} is not JSON ({error})")
