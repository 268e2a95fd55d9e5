"""Counted FLOPs are those that torch counts, for every kind of backbone and after pruning."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slimvlm.models import devices as module
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.cost import decode_flops, prefill_flops
from slimvlm.models.devices import usable_cores
from slimvlm.pruning.cut import prune_
from tests import tiny
from tests.handmade import plan_by_hand

TOKENS = 20
FAMILIES = (  # gemma2 has a window of 16, qwen3_moe a dense layer between those with experts
    *("llama", "qwen2", "phi", "phi3", "gemma2", "llava-qwen3", "qwen2_5_vl", "qwen3_moe"),
    "cohere2",
)


def counted(model, batch_size):
    """Count prefill and one decode step with torch."""
    model.set_attn_implementation("eager")  # torch has no formula for the fused one of CPUs
    model.set_experts_implementation("eager")
    ids = torch.randint(32, 64, (batch_size, TOKENS))
    call = model
    with torch.no_grad(), FlopCounterMode(display=False) as reading:
        output = call(input_ids=ids, use_cache=True, logits_to_keep=1)
    with torch.no_grad(), FlopCounterMode(display=False) as writing:
        call(input_ids=ids[:, :1], cache=output.past_key_values, logits_to_keep=1)
    return reading.get_total_flops(), writing.get_total_flops()


@pytest.mark.parametrize("family", [*FAMILIES, "llava-mistral"])
def test_flops_are_what_torch_counts(family):
    model = tiny.build(family)
    if family == "llava-mistral":
        plan = plan_by_hand(read_anatomy(model), (0, 2, 3), kv_groups=(0, 3), neurons=range(40))
        prune_(model, plan)
        assert prefill_flops(plan.after, TOKENS, 3) < prefill_flops(plan.before, TOKENS, 3)
    shape = read_anatomy(model)
    expected = prefill_flops(shape, TOKENS, 3), decode_flops(shape, TOKENS + 1, 3)
    assert counted(model, 3) == expected


def test_experts_count_that_a_token_takes():
    models = [tiny.made(tiny.CONFIGS["gemma4-experts"](top_k_experts=k)) for k in (1, 2)]
    (one, ours), (two, more) = (
        (counted(model, 3)[0], prefill_flops(read_anatomy(model), TOKENS, 3)) for model in models
    )
    assert two - one == more - ours > 0


@pytest.mark.parametrize(("limit", "most"), [("50000 100000", 0.5), ("max 100000", 10_000.0)])
def test_a_container_limits_the_cores(limit, most, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CPU_LIMIT", tmp_path / "cpu.max")
    assert usable_cores() == torch.get_num_threads()
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    assert usable_cores() == min(torch.get_num_threads(), most)
