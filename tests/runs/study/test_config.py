"""Study files: every shipped one is sound, every mistake is named in one line."""

from copy import deepcopy
from pathlib import Path

import pytest
import yaml

from slimvlm.core.documents import built
from slimvlm.core.errors import ConfigError, SlimError
from slimvlm.runs.study import prepared
from slimvlm.runs.study.config import StudyConfig, expand, read_study
from tests import tiny_folder as folders
from tests.runs.study.study_files import study
from tests.tables import tables
from tests.tiers import tiered

TABLES = tables(__file__)

SHIPPED = sorted((Path(__file__).parents[3] / "studies").glob("*.yaml"))
PAPER = ("llava-1.5-7b", "bunny-3b", "mini-internvl-4b")


@pytest.mark.parametrize(
    "path",
    tiered(SHIPPED, lambda path: path.stem in ("demo", PAPER[0])),
    ids=lambda path: path.stem,
)
def test_a_shipped_study_is_sound_and_says_its_command(path):
    config = read_study(path)
    cells = expand(config)
    head = path.read_text().split("\ndata:")[0]
    assert f"slimvlm study studies/{path.name} --out " in head
    assert "# Expect:" in head
    assert "# Result:" in head
    assert f"{len(cells)} cells" in head
    assert len({cell.label for cell in cells}) == len(cells)


def shipped(name):
    return read_study(next(path for path in SHIPPED if path.stem == name))


def published(config, cell):
    return next((row for row in config.reference.rows if row.matches(cell.values())), None)


@pytest.mark.parametrize("name", tiered(PAPER, lambda name: name == PAPER[0]))
def test_the_papers_grids_carry_its_numbers(name):
    config = shipped(name)
    found = [published(config, cell) for cell in expand(config)]
    untrained = [c for c in expand(config) if c.recovery == "none"]
    assert len(untrained) == 8
    assert all(published(config, cell) for cell in untrained)
    assert sum(row is not None for row in found) >= 45


def test_the_numbers_are_the_papers():
    config = shipped("llava-1.5-7b")
    by_cell = {
        (c.options.axis, c.options.ratio, c.recovery): published(config, c)
        for c in expand(config)
        if c.recovery == "none" or c.options.recover.fraction == 1
    }
    for cell, number in {
        ("width", 0.15, "none"): 90.87,
        ("depth", 0.60, "none"): 5.34,
        ("depth", 0.15, "sft+hidden"): 98.10,
        ("width", 0.60, "sft+hidden"): 78.13,
        ("width", 0.60, "sft+rkl"): 79,
    }.items():
        assert by_cell[cell].retention == number


def test_cells_are_every_combination_once_told_apart_by_their_options(tmp_path):
    data = tmp_path / "data.json"
    grid = {"ratio": [0.2, 0.4], "recovery": ["none", "sft"], "seed": [0, 1], "fraction": [0.5, 1]}
    cells = expand(study(data, grid))
    untrained = [cell for cell in cells if cell.recovery == "none"]
    assert len(untrained) == 2 * 2 * 2  # a fraction of nothing is nothing
    assert len(cells) - len(untrained) == 2 * 2 * 2 * 2
    twice = study(data, grid)
    assert expand(StudyConfig(**{**vars(twice), "grids": twice.grids * 2})) == cells
    seeds = {
        (cell.seed, cell.options.recover.seed or 0) for cell in cells if cell.recovery != "none"
    }
    assert seeds == {(0, 0), (1, 1)}
    data = folders.write_llava_data(tmp_path, pictures=False)
    one = study(data, {"prune": {"gradient": "batch", "samples": 4}})
    other = study(data, {"prune": {"samples": 4}})  # as the study says
    cells = expand(StudyConfig(**{**vars(one), "grids": one.grids + other.grids}))
    assert [cell.words for cell in cells] == ["gradient batch"] * 4 + [""] * 4
    assert len({cell.label for cell in cells}) == 8
    assert cells[0].values()["options"] == "gradient batch"


@pytest.mark.parametrize(("changes", "message"), TABLES["mistakes"])
def test_a_mistake_is_named_in_one_line(changes, message, tmp_path):
    data = folders.write_llava_data(tmp_path / "data", 6, pictures=False)
    values = {
        **{"recoveries": {"sft": {"loss": "sft"}}, "data": str(data), "tasks": "text_odd"},
        **deepcopy({"grids": [{"ratio": 0.2, "recovery": ["none", "sft"]}], **changes}),
    }
    for each in values["grids"] or ():
        each.setdefault("model", str(folders.folder("text")))
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(SlimError) as error:
        prepared(path, print)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_study_is_refused_and_one_value_needs_no_list(tmp_path):
    path = tmp_path / "study.yaml"
    for text in ("", "- 1", "grids: [", "grids: {ratio: x}"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="study "):
            read_study(path)
    one = built(StudyConfig, {"grids": {"ratio": 0.2, "axis": "depth"}})
    assert one == built(StudyConfig, {"grids": [{"ratio": [0.2], "axis": ["depth"]}]})
