"""Fewer experts from the verbs: prune, plan and compress, in memory and layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
import transformers as hf

import slimvlm as sv
from slimvlm.core.options import MemoryOptions, PlanConfig, PruneConfig
from slimvlm.models.load import anatomy
from slimvlm.runs.request import Request, requests_by_axis, resolved
from slimvlm.runs.verbs import plan as write_plan
from slimvlm.runs.verbs import prune
from tests import tiny, tiny_folder

pytestmark = pytest.mark.usefixtures("unhurried")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder.write_llava_data(tmp_path_factory.mktemp("data"), pictures=False))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Complete folders of text models with experts, by their type."""
    found = {}
    words = tiny_folder.processor("text")
    llama4 = tiny.CONFIGS["llama4"]().text_config
    for config in (tiny.CONFIGS["qwen3_moe"](), llama4):
        config.vocab_size = tiny_folder.VOCAB
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp(config.model_type)
        hf.AutoModelForCausalLM.from_config(config).save_pretrained(path)
        words.save_pretrained(path)
        found[config.model_type] = str(path)
    return found


def pruned(model: str, out: Path, low_memory: bool = False, **options: Any) -> sv.Plan:
    memory = MemoryOptions(low_memory=low_memory)
    prune(model, PruneConfig(**options), out, memory=memory, say=[].append)
    return sv.Plan.load(out / "slimvlm_plan.json")


def test_experts_alone_need_neither_a_ratio_nor_data(
    models: dict[str, str], tmp_path: Path
) -> None:
    plan = pruned(models["qwen3_moe"], tmp_path / "out", experts=0.25, samples=4)
    assert plan.criteria == {"expert": "reap"}
    assert [len(kept) for kept in plan.experts] == [3, 0, 3, 3]
    assert plan.neurons == sv.Plan.everything(plan.before).neurons
    smaller, _ = sv.load(tmp_path / "out", device="cpu")
    assert smaller.config.num_experts == 3
    assert anatomy(tmp_path / "out") == plan.after
    assert "3 of 4 experts" in (tmp_path / "out" / "README.md").read_text()


BARE = {"samples": 6, "local_steps": 0, "repair": "none"}


@pytest.mark.parametrize(
    ("asked", "criteria"),
    [
        ({"experts": 0.5, **BARE}, {"expert": "reap"}),
        ({"experts": 0.5, "criterion": ("frequency",), **BARE}, {"expert": "frequency"}),
        (
            {"ratio": 0.3, "samples": 6, "local_steps": 0},
            {"kv_group": "activation", "neuron": "activation"},
        ),
        (
            {"experts": 0.25, "ratio": 0.4, "axis": "depth", "samples": 8, "local_steps": 2},
            {"layer": "block_influence", "expert": "reap"},
        ),
    ],
)
def test_experts_and_their_neurons_have_criteria_of_their_own(
    models: dict[str, str],
    tmp_path: Path,
    data: str,
    asked: dict[str, Any],
    criteria: dict[str, str],
) -> None:
    plan = pruned(models["qwen3_moe"], tmp_path / "out", data=data, **asked)
    assert plan.criteria == criteria
    assert (plan.neurons != sv.Plan.everything(plan.before).neurons) == ("ratio" in asked)
    assert (len(plan.layers) < 4) == ("layer" in criteria)
    assert anatomy(tmp_path / "out") == plan.after


def test_neurons_of_dense_layers_are_the_walk_s_own_choice(tmp_path: Path, data: str) -> None:
    asked = {"ratio": 0.3, "samples": 6, "local_steps": 0, "data": data}
    dense = pruned(str(tiny_folder.folder("text")), tmp_path / "dense", **asked)
    assert dense.criteria == {"kv_group": "obs", "neuron": "obs"}


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("llama4_text", {"axis": "depth"}),
        ("qwen3_moe", {"ratio": 0.4, "criterion": ("activation", "reap")}),
    ],
)
def test_layer_by_layer_the_same_is_written(
    models: dict[str, str], tmp_path: Path, data: str, name: str, asked: dict[str, Any]
) -> None:
    options = {"data": data, "samples": 8, "experts": 0.5, "local_steps": 0, **asked}
    plan = pruned(models[name], tmp_path / "at once", **options)
    assert plan.criteria["expert"] == "reap"
    assert pruned(models[name], tmp_path / "by layer", True, **options) == plan
    whole, pieces = (sv.load(tmp_path / n, device="cpu")[0] for n in ("at once", "by layer"))
    ours, theirs = whole.state_dict(), pieces.state_dict()
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())


def test_a_written_plan_has_its_experts_and_is_applied(
    models: dict[str, str], tmp_path: Path
) -> None:
    for axis in ("width", "depth"):
        config = PlanConfig(experts=0.25, axis=axis)
        made = write_plan(models["qwen3_moe"], config, tmp_path / f"{axis}.json", say=[].append)
        assert made.criteria == {"expert": "reap"}
    out, file = tmp_path / "out", tmp_path / "width.json"
    prune(models["qwen3_moe"], PruneConfig(), out, plan_file=file, say=[].append)
    assert anatomy(out) == made.after


def test_a_run_trains_with_fewer_experts(models: dict[str, str], tmp_path: Path, data: str) -> None:
    how = {"max_steps": 2, "batch_size": 2, "lora_rank": 2, "bf16": False}
    recover = sv.RecoverConfig(train="lora", loss="sft+hidden+kl", **how)
    shown = {"data": data, "samples": 6, "local_steps": 0, "report_samples": 0}
    config = sv.CompressConfig(experts=0.25, recover=recover, **shown)
    sv.compress(models["qwen3_moe"], config, tmp_path / "run", say=[].append)
    assert anatomy(tmp_path / "run").expert_counts == [3]
    assert "3 of 4 experts" in (tmp_path / "run" / "summary.md").read_text()


def test_no_axis_is_tried_where_experts_are_all_that_goes() -> None:
    for axis in (None, "chart", "auto"):
        asked = PruneConfig(experts=0.25, data="data.json", axis=axis)
        found = resolved(Request(model="model", prune=asked)).prune
        assert (found.axis, found.ratio, found.criterion) == ("width", 0.0, ("reap",))


def test_what_no_walk_chooses_is_said_before_weights_are_read(
    models: dict[str, str], tmp_path: Path, data: str
) -> None:
    asked = {"ratio": 0.3, "axis": "width", "criterion": ("obs",), "data": "no file"}
    with pytest.raises(sv.SlimError, match="has experts, whose neurons no walk chooses"):
        pruned(models["qwen3_moe"], tmp_path / "out", **asked)
    shape = anatomy(models["qwen3_moe"])
    request = Request(model="model", prune=PruneConfig(ratio=0.3, axis="auto", data=data))
    assert list(requests_by_axis(resolved(request), shape)) == ["depth"]


def test_heads_that_guess_further_tokens_are_counted_out(tmp_path: Path) -> None:
    model = tiny.build("qwen3_5_text")
    model.config.mtp_num_hidden_layers = 1
    model.save_pretrained(tmp_path / "model")
    heard: list[str] = []
    config = PruneConfig(ratio=0.2, axis="depth", criterion=("spacing",))
    prune(str(tmp_path / "model"), config, tmp_path / "out", say=heard.append)
    assert any("mtp_num_hidden_layers becomes 0" in line for line in heard)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["mtp_num_hidden_layers"] == 0
    assert "`mtp_num_hidden_layers` is 0" in (tmp_path / "out" / "README.md").read_text()
    assert model.config.mtp_num_hidden_layers == 1
    heard.clear()
    prune(str(tmp_path / "out"), config, tmp_path / "again", say=heard.append)
    assert not any("mtp" in line for line in heard)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 0.75}, r"experts 0.75 leaves 1 in a layer, but each token takes 2"),
        ({"experts": 1.0}, "experts 1.0 must be at least 0 and below 1"),
        ({"experts": 0.5, "criterion": ("obs",)}, "criterion 'obs' needs --data"),
        ({}, "either --ratio or --plan, or --vocab-size or --experts alone"),
    ],
)
def test_what_cannot_be_is_said_before_weights_are_read(
    models: dict[str, str],
    tmp_path: Path,
    options: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for a user
    with pytest.raises(sv.SlimError, match=message):
        pruned(models["qwen3_moe"], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    dense = str(tiny_folder.folder("text"))
    with pytest.raises(sv.SlimError, match=r"experts 0.5: 'llama' has none that can go"):
        pruned(dense, tmp_path / "out", experts=0.5)
