"""Plans by hand and in files."""

import json
from dataclasses import replace

import jaxtyping
import pytest

from slimvlm.core.errors import ConfigError, SlimError
from slimvlm.planning.make import make_plan
from slimvlm.planning.plan import Plan
from tests.handmade import plan_by_hand
from tests.planning.anatomies import anatomy_named, scores_named

THREE = ((0,),) * 3
WRONG = {  # with layers 0 and 1, groups of layers 2 and 3 are left over
    "layers": [(0, 2, 1), (0, 1, 1), (0, 4), (-1, 0), (), (0, 1)],
    "kv_groups": [*((*THREE, last) for last in ((), (4,), (1, 0))), THREE, ((0,),) * 5],
    "neurons": [((0,), (0,), (96,), (0,)), ((0,), (0,), (0, 0), (0,))],
}


@pytest.mark.parametrize("field", WRONG)
def test_plans_that_name_no_such_units_are_refused(field):
    everything = Plan.everything(anatomy_named("llama"))
    for value in WRONG[field]:
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


@pytest.mark.parametrize(
    "edit",
    [
        lambda values: values["layers"].append(99),
        lambda values: values["neurons"][values["layers"][0]].reverse(),
        lambda values: values["kv_groups"][values["layers"][0]].clear(),
        lambda values: values["kv_groups"].pop(),
        lambda values: values["layers"].append("two"),
        lambda values: values["neurons"][values["layers"][0]].insert(0, 0.5),
        lambda values: values.update(neurons=None),
        lambda values: values.update(format="slimvlm-plan/0"),
        lambda values: values.update(axis="diagonal"),
        lambda values: values.pop("before"),
        lambda values: values["before"].pop("layers"),
        lambda values: values["before"].update(color="red"),
        lambda values: values["before"].update(text_type="abacus"),
    ],
    ids=range(13),
)
def test_bad_edits_are_refused(edit, tmp_path, monkeypatch):
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
