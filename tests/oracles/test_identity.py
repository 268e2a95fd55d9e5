"""A stopped run goes on only with what it began with: each file that it reads changes a little."""

import shutil
from contextlib import suppress

import pytest

import slimvlm as sv
from slimvlm.core.errors import ConfigError
from slimvlm.core.progress import silent
from slimvlm.runs import stages
from tests import tiny_folder as folders
from tests.handmade import Stopped, stops
from tests.tables import tables
from tests.tiers import tiered
from tests.trust.spoiled import edit_weights

TABLES = tables(__file__)


def change(path, old, new):
    if path.suffix == ".safetensors":  # two neighbours: no sum, shape or size tells
        edit_weights(path.parent, lambda w: w[old][0, :2].copy_(w[old][0, :2].flip(0).clone()))
        return
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


WEIGHTS = ("model/model.safetensors", "model.layers.1.mlp.down_proj.weight", None)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    tiered(
        [WEIGHTS, *map(tuple, TABLES["changes"])],
        lambda file, *_: file in (WEIGHTS[0], "rows.jsonl"),
    ),
)
def test_a_run_does_not_go_on_with_another_file(file, old, new, tmp_path, monkeypatch):
    shutil.copytree(folders.folder("text"), tmp_path / "model")
    folders.write_llava_data(tmp_path, pictures=False)
    for name, text in TABLES["files"].items():
        (tmp_path / name).write_text(text)

    monkeypatch.setattr(stages, "walk", stops)
    options = {"ratio": 0.3, "axis": "width", "recover": "none", "samples": 4, "limit": 1}
    options |= {"vocab_size": "auto", "test_samples": 0, "tasks": str(tmp_path / "task.yaml")}
    options |= {"data": str(tmp_path / "data.json"), "vocab_text": str(tmp_path / "words.txt")}

    def run():
        sv.compress(str(tmp_path / "model"), out=tmp_path / "run", say=silent, **options)

    for _ in range(2):  # with the same files it goes on
        with suppress(Stopped):
            run()
    change(tmp_path / file, old, new)
    with pytest.raises(ConfigError, match="begun with another"):
        run()
