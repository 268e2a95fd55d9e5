"""Scores from inputs: of experts and their neurons, against what a token at a time gives.

Also of layers that not every batch runs.
"""

import pytest
import torch
from torch.nn import functional as F

import slimvlm as sv
from slimvlm.core.errors import UnsupportedModelError
from slimvlm.models.anatomy import unit_of
from slimvlm.models.parts import Parts
from tests import tiny
from tests.tolerances import FORWARD, SCORE_SHARE_OF_MAXIMUM, assert_close, assert_scores_close


def scored(model, batches, criterion, unit="expert", **options):
    return sv.score(model, batches, criterion, **options).of(unit)


def inputs_of(model, path, batch):
    """Record the inputs of the module at a path of each layer that has it, token by token."""
    found = []
    hooks = [
        layer.get_submodule(path).register_forward_pre_hook(
            lambda _, args: found.append(args[0].detach().flatten(0, -2))
        )
        for layer in Parts(model).layers
        if path in dict(layer.named_modules())
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def by_token(mlp, hidden, normalised):
    """For Qwen: how many tokens take each expert, and the mean of weight times output size."""
    experts, gate = mlp.experts, mlp.gate.weight
    count, size = torch.zeros(2, len(gate), dtype=torch.float64)
    for token in hidden:
        weights, taken = (gate @ token).softmax(0).topk(2)
        weights = weights / weights.sum() if normalised else weights
        for weight, expert in zip(weights, taken, strict=True):
            a, b = (experts.gate_up_proj[expert] @ token).chunk(2)
            output = experts.down_proj[expert] @ (F.silu(a) * b)
            count[expert] += 1
            size[expert] += float(weight * output.norm())
    return count, size / count.clamp_min(1)


@pytest.mark.parametrize(("name", "dense"), [("qwen3_moe", [1]), ("qwen3_vl_moe", [])])
def test_qwen_scores_are_means_over_the_tokens_of_an_expert(name, dense):
    model = tiny.build(name)
    batch = tiny.batch(model, 24)
    frequency, reap = (scored(model, [batch], name) for name in ("frequency", "reap"))
    hidden = inputs_of(model, "mlp.experts", batch)
    assert [i for i, values in enumerate(reap) if not len(values)] == dense
    sparse = [index for index in range(4) if index not in dense]
    for index, entered in zip(sparse, hidden, strict=True):
        mlp = Parts(model).layers[index].get_submodule("mlp")
        with torch.no_grad():
            count, mean = by_token(mlp, entered, normalised=name == "qwen3_vl_moe")
        assert_close(frequency[index].double(), count / len(entered), FORWARD)
        assert_scores_close(reap[index], mean.float(), SCORE_SHARE_OF_MAXIMUM)


def test_llama_4_scores_are_the_sizes_of_what_experts_add():
    model = tiny.build("llama4")
    batch = tiny.batch(model, 24)
    frequency, reap = (scored(model, [batch], name) for name in ("frequency", "reap"))
    entered = inputs_of(model, "feed_forward.router", batch)
    for index, hidden in zip((1, 3), entered, strict=True):
        block = Parts(model).layers[index].get_submodule("feed_forward")
        with torch.no_grad():
            routed = hidden @ block.router.weight.T
            weights, taken = routed.max(1)
            sizes = torch.zeros(4, dtype=torch.float64)
            for token, weight, expert in zip(hidden, weights.sigmoid(), taken, strict=True):
                a, b = (weight * token @ block.experts.gate_up_proj[expert]).chunk(2)
                sizes[expert] += float(((F.silu(a) * b) @ block.experts.down_proj[expert]).norm())
        count = taken.bincount(minlength=4)
        assert_close(frequency[index].double(), count / len(hidden), FORWARD)
        assert_scores_close(
            reap[index], (sizes / count.clamp_min(1)).float(), SCORE_SHARE_OF_MAXIMUM
        )


@pytest.mark.parametrize("criterion", ["reap", "frequency", "magnitude"])
@pytest.mark.parametrize("name", ["qwen3_vl_moe", "llama4", "gemma4-experts"])
def test_permuted_experts_have_permuted_scores(name, criterion):
    model, permuted = tiny.build(name), tiny.build(name)
    order = torch.tensor([2, 0, 3, 1])
    row = sv.anatomy(model).backbone.experts
    for entry in row.entries:
        parameter = Parts(permuted).layers[3].get_parameter(entry.path)
        parameter.data = parameter.data[order]
    data = [tiny.batch(model, 16, seed) for seed in range(2)]
    before, after = (scored(m, data, criterion) for m in (model, permuted))
    assert_scores_close(after[3], before[3][order], SCORE_SHARE_OF_MAXIMUM)
    assert (before[3] - after[3]).abs().max() > 1e-4 * before[3].abs().max()


def test_an_expert_that_no_token_takes_scores_zero():
    model = tiny.build("llama4")
    with torch.no_grad():
        router = Parts(model).layers[1].get_parameter("feed_forward.router.weight")
        router[2] = -torch.sign(router[0])
        router[:] = router[:1]  # all alike: the first of equal scores is taken
    for criterion in ("reap", "frequency"):
        scores = scored(model, [tiny.batch(model, 16)], criterion)
        assert (scores[1] > 0).sum() == 1


def test_dense_models_have_no_experts_to_score():
    model = tiny.build("llama")
    with pytest.raises(UnsupportedModelError, match="'llama' has no experts to score"):
        sv.score(model, [tiny.batch(model)], "reap")


def sent_on(mlp, hidden, expert):
    """For Qwen: the weighted neurons of an expert for each token; zeros if it is not taken."""
    weights, taken = (hidden @ mlp.gate.weight.T).softmax(1).topk(2)
    weights = weights / weights.sum(1, keepdim=True)
    share = (weights * (taken == expert)).sum(1, keepdim=True)
    gate, up = (hidden @ mlp.experts.gate_up_proj[expert].T).chunk(2, 1)
    return F.silu(gate) * up * share


def test_scores_of_expert_neurons_are_their_formulas():
    model = tiny.build("qwen3_vl_moe")
    batch = tiny.batch(model, 24)
    activation, wanda, flap = (
        scored(model, [batch], name, "neuron") for name in ("activation", "wanda", "flap")
    )
    for index, hidden in enumerate(inputs_of(model, "mlp.experts", batch)):
        mlp = Parts(model).layers[index].get_submodule("mlp")
        sizes, reads, varies = torch.zeros(3, 32)
        with torch.no_grad():
            for expert in range(4):
                sent, weight = sent_on(mlp, hidden, expert), mlp.experts.down_proj[expert]
                sizes += sent.abs().mean(0)
                reads += weight.abs().sum(0) * sent.square().mean(0).sqrt()
                varies += weight.square().sum(0) * sent.var(0, correction=0)
        assert_scores_close(activation[index], sizes, SCORE_SHARE_OF_MAXIMUM)
        assert_scores_close(wanda[index], reads, SCORE_SHARE_OF_MAXIMUM)
        assert_scores_close(flap[index], varies, SCORE_SHARE_OF_MAXIMUM)


@pytest.mark.parametrize("criterion", ["activation", "wanda", "flap", "magnitude"])
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5_moe", "llama4"])
def test_a_neuron_without_weights_in_any_expert_scores_zero(name, criterion):
    model = tiny.build(name)
    with torch.no_grad():
        for _, matrix in Parts(model).matrices():
            if unit_of(matrix.projection) == "neuron":
                for block in range(len(matrix.projection.segments)):
                    matrix.weight.select(matrix.projection.axis, block * 32 + 7).zero_()
    scores = scored(model, [tiny.batch(model, 24, seed) for seed in range(3)], criterion, "neuron")
    for values in scores:
        assert len(values) == 0 or (values[7] == 0 and (values > 0).sum() == 31)


@pytest.mark.parametrize("criterion", ["obs", "gate", "taylor"])
def test_criteria_that_cannot_score_experts_are_refused(criterion):
    model = tiny.build("qwen3_vl_moe")
    with pytest.raises(UnsupportedModelError, match=r"layer 0 has experts.*activation, wanda"):
        sv.score(model, [tiny.batch(model)], criterion)


@pytest.mark.parametrize("name", ["mllama"])
def test_layers_that_pictures_alone_reach_are_skipped_without_one(name):
    model = tiny.build(name)
    batch = tiny.batch(model, 12)
    blind = {key: batch[key] for key in ("input_ids", "attention_mask", "labels") if key in batch}
    blind["input_ids"] = blind["input_ids"].clamp(max=63)
    scores = sv.score(model, [blind], "block_influence")
    assert scores.layer.isfinite().all()
    assert (scores.layer == 0).any()
    assert sv.score(model, [blind, batch], "angular").layer.isfinite().any()
    for criterion in ("taylor", "gate", "activation", "wanda"):
        widths = sv.score(model, [blind], criterion)
        assert sv.make_plan(sv.anatomy(model), widths, 0.1).ratio > 0


@pytest.mark.parametrize("criterion", ["taylor", "taylor_mix"])
def test_a_last_batch_without_a_picture_drops_no_layer_from_sums_of_gradients(criterion):
    """Mllama's layers that read pictures run only in batches with some."""
    model = tiny.build("mllama")
    seeing, blind = tiny.batch(model, 12, 0), tiny.batch(model, 12, 1)
    blind = {name: blind[name] for name in ("input_ids", "attention_mask", "labels")}
    blind["input_ids"] = blind["input_ids"].clamp(max=90)
    expected, found = (
        scored(model, data, criterion, "neuron") for data in ([blind, seeing], [seeing, blind])
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) == len(theirs) > 0
        assert_scores_close(ours, theirs, SCORE_SHARE_OF_MAXIMUM)
