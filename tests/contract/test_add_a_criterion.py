"""The page on adding a criterion is true: its function and row are all that a new one takes."""

import re
from pathlib import Path

import pytest
import torch

import slimvlm as sv
from slimvlm.core.errors import ConfigError
from tests import tiny
from tests.tables import criteria_table

PAGE = Path(__file__).parents[2] / "docs" / "add-a-criterion.md"


@pytest.fixture(autouse=True)
def energy():
    """The criterion of the page, added while a program runs."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    before = dict(sv.CRITERIA)
    exec(compile(block, str(PAGE), "exec"), {"__name__": "page"})
    assert sv.CRITERIA.keys() - before.keys() == {"energy"}
    yield
    del sv.CRITERIA["energy"]


def batches(model):
    return [tiny.batch(model, 12, seed) for seed in range(2)]


def test_the_new_criterion_scores_plans_and_prunes():
    model = tiny.build("llava-llama")
    before = sv.anatomy(model)
    scores = sv.score(model, batches(model), "energy", power=2)
    assert scores.criterion == "energy"
    assert scores.options["power"] == 2
    plan = sv.make_plan(before, scores, ratio=0.3, axis="width")
    sv.prune_(model, plan)
    assert sv.anatomy(model) == plan.after
    kept, values = plan.neurons[0], scores.of("neuron")[0]
    gone = sorted(set(range(len(values))) - set(kept))
    assert values[list(kept)].min() >= values[gone].max()


def test_the_new_criterion_works_with_low_memory(tmp_path):
    model = tiny.build("llava-llama")
    model.save_pretrained(tmp_path / "model")
    expected = sv.score(model, batches(model), "energy")
    found = sv.score_checkpoint(tmp_path / "model", batches(model), "energy")
    assert found.options == expected.options
    for unit in ("kv_group", "neuron"):
        for ours, theirs in zip(found.of(unit), expected.of(unit), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_the_new_criterion_is_checked_and_listed_and_the_page_names_every_capture():
    model = tiny.build("llama")
    with pytest.raises(ConfigError, match="power=3 must be one of: 1, 2"):
        sv.score(model, batches(model), "energy", power=3)
    with pytest.raises(ConfigError, match=r"has no option 'colour'\. It has: power"):
        sv.score(model, batches(model), "energy", colour=1)
    assert "| `energy` | kv_group, neuron | yes | one line for tables |" in criteria_table()
    from slimvlm.scoring import criteria

    page = PAGE.read_text()
    captures = {n: v for n, v in vars(criteria).items() if isinstance(v, criteria.Capture)}
    assert set(re.findall(r"^\| `([A-Z_]+)` \|", page, re.MULTILINE)) == set(captures)
    assert all(row.capture in captures.values() for row in sv.CRITERIA.values())
