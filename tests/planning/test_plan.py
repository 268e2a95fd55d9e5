"""Plans by hand and in files."""

import json
from dataclasses import replace
from pathlib import Path

import jaxtyping
import pytest
import yaml

from slimvlm.core.errors import ConfigError, SlimError
from slimvlm.planning.make import make_plan
from slimvlm.planning.plan import Plan
from tests.handmade import plan_by_hand
from tests.planning.anatomies import anatomy_named, scores_named

TABLE = yaml.safe_load(Path(__file__).with_name("edits.yaml").read_text())


def as_tuples(value):
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


@pytest.mark.parametrize("field", TABLE["wrong"])
def test_plans_that_name_no_such_units_are_refused(field):
    everything = Plan.everything(anatomy_named("llama"))
    for value in as_tuples(TABLE["wrong"][field]):
        with pytest.raises(ConfigError, match="plan"):
            replace(everything, **{field: value})


@pytest.mark.parametrize("axis", ["depth", "width", "both"])
@pytest.mark.parametrize("name", ["llama", "llava-llama", "qwen3_vl", "7b"])
def test_plans_survive_their_file(name, axis, tmp_path):
    plan = make_plan(anatomy_named(name), scores_named(name), 0.3, axis)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert json.loads((tmp_path / "plan.json").read_text())["ratio"] == plan.ratio
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


def edited(tmp_path, edit):
    path = tmp_path / "plan.json"
    make_plan(anatomy_named("llama"), scores_named("llama"), 0.3, "both").save(path)
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))
    return path


def test_a_plan_may_be_edited_by_hand(tmp_path):
    original = make_plan(anatomy_named("llama"), scores_named("llama"), 0.3, "both")
    index = original.layers[0]

    def drop_a_neuron(values):
        values["neurons"][index].pop()
        values["ratio"] = 0.99  # not believed

    plan = Plan.load(edited(tmp_path, drop_a_neuron))
    neuron = anatomy_named("llama").layers[0].neuron_params
    expected = original.ratio + neuron / original.before.backbone_params
    assert plan.ratio == pytest.approx(expected, abs=1e-12)
    assert plan.neurons[index] == original.neurons[index][:-1]


@pytest.mark.parametrize(("place", "method", "words"), [(*e[:2], e[2:]) for e in TABLE["edits"]])
def test_bad_edits_are_refused(place, method, words, tmp_path, monkeypatch):
    def edit(values):
        part, kept = values, values["layers"][0]
        for key in place.split():
            part = part[kept if key == "kept" else key]
        getattr(part, method)(*words)

    path = edited(tmp_path, edit)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(SlimError, match=r"plan|abacus"):
        Plan.load(path)


@pytest.mark.parametrize("content", [None, b"", b"[1, 2]", b"{", b"\xff\xfe\x00", b'"plan"', b"7"])
def test_files_that_are_no_plans_are_refused(content, tmp_path):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"plan\.json"):
        Plan.load(path)
    with pytest.raises(ConfigError, match=r"plan"):
        Plan.load(tmp_path)


def test_the_summary_tells_what_is_kept():
    plan = plan_by_hand(anatomy_named("llama"), [0, 2], [1], range(10))
    text = plan.summary()
    assert f"{plan.ratio:.2%}" in text
    assert "2 of 4 layers" in text
    assert "1 KV groups" in text
    assert "10 neurons" in text
