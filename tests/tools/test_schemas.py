"""The JSON Schemas in docs are those of the classes, and say what the readers say."""

import json
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml

import slimvlm as sv
from slimvlm.core.errors import ConfigError
from slimvlm.core.options import CompressConfig, RecoverConfig
from slimvlm.runs.compress import option_values, read_config
from slimvlm.runs.study.config import read_study
from slimvlm_tools.schemas import schemas
from tests import tiny

ROOT = Path(__file__).parents[2]
FULL = CompressConfig(ratio=0.3, units=("neuron",), data="d", recover=RecoverConfig(train="full"))


known = cache(schemas)


def accepts(name, values):
    return jsonschema.Draft202012Validator(known()[name]).is_valid(values)


@pytest.mark.parametrize("name", ["run", "study", "plan"])
def test_docs_hold_the_schemas_of_the_classes(name):
    """`python -m slimvlm_tools.schemas docs/schemas` writes them again."""
    written = json.loads((ROOT / "docs" / "schemas" / f"{name}.schema.json").read_text())
    assert written == known()[name]


@pytest.mark.parametrize("study", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_study_fits(study):
    values = yaml.safe_load(study.read_text())
    read_study(study)
    assert accepts("study", values)
    assert not accepts("study", {**values, "colour": "red"})


ROWS = yaml.safe_load(Path(__file__).with_name("schemas.yaml").read_text())


@pytest.mark.parametrize(("values", "is_allowed"), ROWS)
def test_the_schema_of_a_run_agrees_with_the_reader(values, is_allowed, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": "m", **values}))
    assert accepts("run", {"model": "m", **values}) == is_allowed
    if is_allowed:
        read_config(path)
    else:
        with pytest.raises(ConfigError):
            read_config(path)


def test_a_written_run_and_a_written_plan_fit():
    assert accepts("run", option_values("m", FULL))
    anatomy = sv.anatomy(tiny.build("llava-llama"))
    scores = sv.Scores("mine", layer=torch.arange(len(anatomy.layers)).float())
    plan = json.loads(json.dumps(sv.make_plan(anatomy, scores, ratio=0.3, axis="depth").to_dict()))
    assert accepts("plan", plan)
    assert not accepts("plan", {**plan, "layers": "all"})
