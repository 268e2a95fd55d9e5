"""Counted FLOPs are those that torch counts, for every kind of backbone and after pruning."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slimvlm.models import devices as module
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.cost import Picture, decode_flops, prefill_flops, question_flops
from slimvlm.models.devices import usable_cores
from slimvlm.models.parts import family_of
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


PICTURES = {  # of 32 pixels in patches of 8, and one class token; Qwen's windows have 2 x 2 patches
    "llava-llama": Picture(17, 17, 16, 16),
    "idefics3": Picture(16, 16, 4, 4),
    "qwen2_5_vl": Picture(16, 16, 4, 4),
    "llava-pixtral": Picture(16, 16, 16, 16),
    "internvl-qwen2": Picture(17, 17, 4, 4),
    "gemma3": Picture(16, 16, 4, 4),
    "qwen3_vl": Picture(16, 16, 4, 4),
}


@pytest.mark.parametrize("family", PICTURES)
def test_flops_of_a_question_about_an_image_are_what_torch_counts(family):
    config = tiny.CONFIGS[family]()
    if family == "qwen2_5_vl":
        config.vision_config.window_size = 16
    model = tiny.made(config)
    model.set_attn_implementation("eager")
    inputs = {**tiny.batch(model, 12), "use_cache": True, "logits_to_keep": 1}
    del inputs["labels"]
    shape = read_anatomy(model)
    assert shape.tower.unread == (family == "llava-llama")
    with torch.no_grad(), FlopCounterMode(display=False) as counting:
        model(**inputs)
    found = question_flops(shape, PICTURES[family], 12)
    by_part, name = counting.get_flop_counts(), type(model).__name__
    row = family_of(model.config.model_type)

    def counted_in(part):
        lists = [f"{name}.{part}.{i}" for i in range(2)]  # are not called themselves
        of_list = sum(sum(by_part[each].values()) for each in lists if each in by_part)
        counts = by_part.get(f"{name}.{part}", {None: of_list})
        return sum(n for operator, n in counts.items() if operator != torch.ops.aten.convolution)

    projected = sum(map(counted_in, row.projector))
    inside = sum(counted_in(part) for part in row.projector if part.startswith(row.vision))
    assert found.tower == counted_in(row.vision) - inside
    assert found.projector == pytest.approx(projected, rel=0.05)  # which counts its biases, too
    assert found.backbone == counted_in(row.backbone) + counted_in(row.head)


def test_of_a_tower_without_known_layers_every_parameter_counts():
    shape = read_anatomy(tiny.build("perception_lm"))
    assert shape.tower is None
    found = question_flops(shape, Picture(16, 16, 16, 16))
    assert found.tower == 2 * 16 * shape.vision_params
    assert question_flops(read_anatomy(tiny.build("llama")), Picture())[:2] == (0, 0)
