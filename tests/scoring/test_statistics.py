"""Statistics: what is stored is what was there, and what is loaded is of use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import slimvlm as sv
from slimvlm.core.errors import ConfigError
from slimvlm.scoring.criteria import CRITERIA
from slimvlm.scoring.statistics import Gates, Grams
from tests import tiny
from tests.handmade import plan_by_hand


def labelled(model: Any) -> list[dict[str, torch.Tensor]]:
    batches = [tiny.batch(model, 12, seed) for seed in range(3)]
    return [{**batch, "labels": batch["input_ids"]} for batch in batches]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_statistics_survive_their_file(criterion: str, tmp_path: Path) -> None:
    about_experts = CRITERIA[criterion].units == ("expert",)
    model = tiny.build("qwen3_vl_moe" if about_experts else "llava-phi3").bfloat16()
    collected = sv.collect(model, labelled(model), criterion)
    collected.save(tmp_path / "run.v1")
    loaded = sv.Statistics.load(tmp_path / "run.v1")
    assert type(loaded) is type(collected)
    assert loaded.kind == collected.kind
    assert (loaded.num_samples, loaded.num_tokens) == (collected.num_samples, collected.num_tokens)
    ours, theirs = loaded.tensors(), collected.tensors()
    assert ours.keys() == theirs.keys()
    assert loaded.parts.keys() == collected.parts.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("name", ["llama", "phi", "llava-phi3"])
def test_a_model_is_repaired_by_stored_statistics(name: str, tmp_path: Path) -> None:
    model = tiny.build(name)
    statistics = sv.collect(model, labelled(model), "obs")
    statistics.save(tmp_path / "statistics")
    plan = plan_by_hand(sv.anatomy(model), neurons=range(0, 96, 2))
    after: list[dict[str, torch.Tensor]] = []
    reports = []
    for given in (statistics, sv.Statistics.load(tmp_path / "statistics")):
        pruned = tiny.build(name)
        sv.prune_(pruned, plan)
        sliced = {key: value.clone() for key, value in pruned.state_dict().items()}
        reports.append(sv.repair_(pruned, plan, given))
        after.append({key: value.clone() for key, value in pruned.state_dict().items()})
        assert any(not torch.equal(after[-1][key], sliced[key]) for key in sliced)
    assert reports[0] == reports[1]
    assert all(torch.equal(after[0][key], after[1][key]) for key in after[0])


def test_statistics_of_another_model_do_not_repair() -> None:
    model, other = tiny.build("llama"), tiny.build("llava-llama")
    statistics = sv.collect(model, labelled(model), "obs")
    assert isinstance(statistics, Grams)
    place = (0, "mlp.down_proj")
    odd = {**statistics.parts, place: statistics.parts[0, "self_attn.o_proj"]}
    plan = plan_by_hand(sv.anatomy(model), neurons=range(64))
    sv.prune_(model, plan)
    with pytest.raises(ConfigError, match=r"'0.mlp.down_proj' is of another model"):
        sv.repair_(model, plan, Grams(parts=odd, weight=statistics.weight))
    gates = sv.collect(other, labelled(other), "gate")
    with pytest.raises(ConfigError, match="'gates' cannot repair"):
        sv.repair_(model, plan, gates)


@pytest.mark.parametrize("broken", ["missing", "text", "scores", "kind", "parts"])
def test_what_is_no_file_of_statistics_is_refused(broken: str, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    gates = Gates(parts={(0, "neuron"): torch.ones(2, dtype=torch.float64)})
    if broken == "text":
        path.write_text("not what it says")
    elif broken == "scores":
        sv.Scores("by-hand", layer=torch.ones(2)).save(path)
    elif broken == "kind":
        gates.save(path)
        with pytest.raises(ConfigError, match=r"of kind 'gates', not 'grams'"):
            Grams.load(path)
        path.unlink()
    elif broken == "parts":
        gates.save(path)
        path.write_bytes(path.read_bytes().replace(b'"gates"', b'"grams"'))
    with pytest.raises(ConfigError, match=r"statistics .*cannot be read"):
        sv.Statistics.load(path)
