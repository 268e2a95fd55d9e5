"""Files that somebody else spoiled, and a mark that code in them would leave."""

import json
import os
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_folder import edit_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Mark:
    """A pickle of this makes a folder when it is read."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.place), 0o777, True)


def write_pickle(file: Path, mark: Path) -> None:
    file.write_bytes(pickle.dumps(Mark(mark)))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the weights of a folder in place."""
    weights = load_file(folder / WEIGHTS)
    edit(weights)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / WEIGHTS, {"format": "pt"})


def divide(folder: Path, *names: str) -> None:
    """Divide a folder's weights among files, with an index."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    rows = {key: names[number % len(names)] for number, key in enumerate(sorted(weights))}
    for name in names:
        held = {key: weights[key] for key, file in rows.items() if file == name}
        save_file(held, folder / name, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": rows}))


def renamed_part(folder: Path, name: str) -> None:
    """An index that names another file for half of the weights."""
    divide(folder, "a.safetensors", "b.safetensors")
    edit_json(
        folder / INDEX,
        lambda v: v["weight_map"].update(
            {k: name for k, file in v["weight_map"].items() if file == "a.safetensors"}
        ),
    )


DEEP: Any = 1
for _ in range(80):
    DEEP = [DEEP]
NASTY: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 1.5, 1e308, float("nan"), float("inf"), -float("inf")),
    *(10**6, 10**9, 10**12, 10**30, -(10**12), 2**31, 2**63),
    *("", "x", "auto", "../../evil", "/etc/passwd", "marked.bin", "evil/kernel", "~", "\x1b[2J"),
    *("a" * 10_000, "{t.__class__}", "{% for x in range(9) %}", "[bold]", "\u202e", "__class__"),
    *([], {}, [[]], [None], ["x", 3], {"a": 1}, {"model_type": "llama"}, DEEP),
)


def places(values: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside some values."""
    for key in values if isinstance(values, dict) else range(len(values)):
        yield (*at, key)
        if isinstance(values[key], dict | list):
            yield from places(values[key], (*at, key))


def mutated(values: Any, draw: random.Random) -> Any:
    """The values with something in them replaced, removed, added or moved."""
    values = json.loads(json.dumps(values))
    *way, key = draw.choice(list(places(values)))
    holder = values
    for step in way:
        holder = holder[step]
    kind = draw.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        names = ("evil", "auto_map", "_attn_implementation", "__class__", "")
        holder[draw.choice(names)] = holder[key]
    elif kind == 2 and isinstance(holder, dict):
        holder[key] = draw.choice(list(holder.values()))
    elif kind == 3 and isinstance(holder[key], int | float):
        holder[key] = holder[key] * draw.choice((-1, 0, 2, 10**3, 10**7, 10**15))
    elif kind == 4:
        holder[key] = [holder[key]]
    else:
        holder[key] = draw.choice(NASTY)
    return values


def torn(content: bytes, draw: random.Random) -> bytes:
    """A file cut short, with other bytes in it, or with some twice."""
    place = draw.randrange(max(len(content), 1))
    before, after = content[:place], content[place:]
    kinds = (b"\0", b"\xff\xfe", b"[" * 3000, b"{", b'"', b"&a [*a, *a]", b"!!python/x ")
    junk = draw.choice(kinds)
    inside, instead = before + junk + after, before + junk + after[len(junk) :]
    return draw.choice((before, inside, instead, before * 2, b""))


def spoil(file: Path, draw: random.Random) -> None:
    """Change a file: its values if it is JSON or YAML, or its bytes."""
    content = file.read_bytes()
    if file.suffix not in (".json", ".yaml") or draw.random() < 0.15:
        file.write_bytes(torn(content, draw))
    elif file.suffix == ".json":
        file.write_text(json.dumps(mutated(json.loads(content), draw)))
    else:
        file.write_text(yaml.safe_dump(mutated(yaml.safe_load(content), draw)))
