"""Model folders that somebody else spoiled, and a mark that code in them would leave."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.tiny_folder import edit_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Mark:
    """A pickle of this makes a folder when it is read."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.place), 0o777, True)


def write_pickle(file: Path, mark: Path) -> None:
    """A pickle that leaves a mark when it is read."""
    file.write_bytes(pickle.dumps(Mark(mark)))


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
