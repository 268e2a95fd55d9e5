"""Scores against the plain formulas of LLM-Pruner, ShortGPT and Gromov et al.

The reference side of every comparison is written here again from the papers' code, without its
bugs: full gradients by plain autograd of transformers' own loss, then loops over heads and
neurons. Nothing of slimvlm is used in it.
"""

import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from slimvlm.scoring.forward import angular_distance, block_influence
from slimvlm.scoring.score_model import score
from tests import tiny
from tests.handmade import joined
from tests.tolerances import LOSS, assert_close, assert_scores_close

HEAD_DIM = 8
CONFIGS = {
    "llama-mha": lambda: tiny.llama(num_key_value_heads=8),
    "llama-gqa": lambda: tiny.llama(num_key_value_heads=2),
    "phi": tiny.phi,
    "phi3": tiny.phi3,
}
every_model = pytest.mark.parametrize("name", CONFIGS)


def model_named(name):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def samples(model):
    """Three samples of one length whose numbers of labels differ much."""
    batches = [tiny.batch(model, 14, seed) for seed in range(3)]
    for batch, unlabelled in zip(batches, (12, 7, 2), strict=True):
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, :unlabelled] = -100
    return batches


# The reference: gradients


def gradients(model, batch):
    """Gradients of transformers' mean loss over a batch."""
    model.zero_grad()
    model(**batch).loss.backward()
    found = {
        name: parameter.grad.double()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    return found


# The reference: units. A term is a tensor shaped like the weight; a unit adds up its own entries.
def layer_names(model, index):
    prefix = f"model.layers.{index}."
    for name, module in model.named_modules():
        if name.startswith(prefix) and isinstance(module, nn.Linear):
            yield name


def head_parts(model, index, terms, group):
    """One sum for each of q, k, v, o: of the KV head and of the query heads that read it."""
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    queries = range(group * (heads // kv_heads), (group + 1) * (heads // kv_heads))
    at = f"model.layers.{index}.self_attn."
    output = f"{at}dense.weight" if f"{at}dense.weight" in terms else f"{at}o_proj.weight"
    if f"{at}qkv_proj.weight" in terms:
        fused = terms[f"{at}qkv_proj.weight"]
        q = fused[: heads * HEAD_DIM]
        k = fused[heads * HEAD_DIM : (heads + kv_heads) * HEAD_DIM]
        v = fused[(heads + kv_heads) * HEAD_DIM :]
    else:
        q, k, v = (terms[f"{at}{x}_proj.weight"] for x in "qkv")

    def rows(matrix, which):
        total = torch.zeros((), dtype=torch.float64)
        for head in which:
            for channel in range(head * HEAD_DIM, (head + 1) * HEAD_DIM):
                total = total + matrix[channel].sum()
        return total

    return [rows(q, queries), rows(k, [group]), rows(v, [group]), rows(terms[output].T, queries)]


def neuron_parts(model, index, terms, neuron):
    """One sum for each of gate, up, down (fc1, fc2 for Phi)."""
    at = f"model.layers.{index}.mlp."
    if f"{at}fc1.weight" in terms:
        return [terms[f"{at}fc1.weight"][neuron].sum(), terms[f"{at}fc2.weight"][:, neuron].sum()]
    if f"{at}gate_up_proj.weight" in terms:
        gate, up = terms[f"{at}gate_up_proj.weight"].chunk(2)
    else:
        gate, up = terms[f"{at}gate_proj.weight"], terms[f"{at}up_proj.weight"]
    return [gate[neuron].sum(), up[neuron].sum(), terms[f"{at}down_proj.weight"][:, neuron].sum()]


def assert_scores_are(model, scores, terms, mean=False):
    """Compare all scores with sums (or means over matrices) of the terms of each unit."""
    for index in range(model.config.num_hidden_layers):
        for values, parts_of in (
            (scores.kv_group[index], head_parts),
            (scores.neuron[index], neuron_parts),
        ):
            expected = []
            for unit in range(len(values)):
                parts = torch.stack(parts_of(model, index, terms, unit))
                expected.append(parts.mean() if mean else parts.sum())
            assert_scores_close(values, torch.stack(expected))


def weights(model):
    return {
        f"{name}.weight": model.get_submodule(name).weight.detach().double()
        for index in range(model.config.num_hidden_layers)
        for name in layer_names(model, index)
    }


TAYLOR = {
    "LLM-Pruner's first order": ("taylor", {}, lambda w, g, each: (w * g).abs()),
    "equation 5": (
        *("taylor", {"gradient": "per_sample"}),
        lambda w, g, each: (w * each).abs().mean(0),
    ),
    "LLM-Pruner's second order": (
        *("taylor_second", {}),
        lambda w, g, each: (w * each.square().mean(0) * w).abs(),
    ),
    "LLM-Pruner's mix": (
        *("taylor_mix", {}),
        lambda w, g, each: (w * g - 0.5 * w * each.square().mean(0) * w).abs(),
    ),
}
"""Criterion, options, and terms of a weight, the whole gradient and that of each sample."""


@every_model
@pytest.mark.parametrize("case", TAYLOR)
def test_taylor_is_its_formula(name, case):
    model, (criterion, options, formula) = model_named(name), TAYLOR[case]
    data = samples(model)
    whole, each = gradients(model, joined(data)), [gradients(model, one) for one in data]
    terms = {
        key: formula(w, whole[key], torch.stack([g[key] for g in each]))
        for key, w in weights(model).items()
    }
    for batches in ([joined(data)], data):
        scores = score(model, batches, criterion, **options)
        assert_scores_are(model, scores, terms)
        for index, found in enumerate(() if scores.layer is None else scores.layer):
            expected = sum(terms[f"{path}.weight"].sum() for path in layer_names(model, index))
            assert float(found) == pytest.approx(float(expected), rel=1e-5)


@every_model
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_magnitude_is_llm_pruners_l1_and_l2(name, p, reduction):
    model = model_named(name)
    terms = {key: w.abs() ** p for key, w in weights(model).items()}
    scores = score(model, [], "magnitude", p=p, reduction=reduction)
    assert_scores_are(model, scores, terms, mean=reduction == "mean")


@every_model
def test_a_gate_is_the_signed_sum_of_its_columns_taylor_terms(name):
    """Scaling a unit's output by m scales its output columns: dL/dm = sum of w * dL/dw there."""
    model = model_named(name)
    data = samples(model)
    each = [gradients(model, one) for one in data]
    scores = score(model, [joined(data)], "gate")
    for index in range(4):
        for key, w in weights(model).items():
            path = key.removeprefix(f"model.layers.{index}.").removesuffix(".weight")
            if path not in ("self_attn.o_proj", "self_attn.dense", "mlp.down_proj", "mlp.fc2"):
                continue
            values = scores.of("neuron" if path.startswith("mlp") else "kv_group")[index]
            per_column = torch.stack([(w * g[key]).sum(0) for g in each])
            per_unit = torch.stack(
                [columns.sum(1).abs().mean() for columns in per_column.chunk(len(values), dim=1)]
            )
            assert_scores_close(values, per_unit)


def weighted_losses(model, batch, weights):
    """Cross-entropy of every token but the first, times the weight of its role."""
    logits = model(input_ids=batch["input_ids"]).logits
    terms = []
    for t in range(1, batch["input_ids"].shape[1]):
        role = "prompt" if batch["labels"][0, t] == -100 else "answer"
        log_p = logits[0, t - 1].log_softmax(-1)[batch["input_ids"][0, t]]
        terms.append(-weights[role] * log_p)
    return torch.stack(terms)


@pytest.mark.parametrize("gradient", ["batch", "per_sample"])
def test_token_weights_weigh_the_loss(gradient):
    model = model_named("llama-gqa")
    data = samples(model)
    weights_of = {"prompt": 0.25, "answer": 2.0}
    totals = []
    for batch in data:
        answers = int((batch["labels"][:, 1:] != -100).sum())
        totals.append(0.25 * (13 - answers) + 2.0 * answers)
    each = []
    for batch, total in zip(data, totals, strict=True):
        model.zero_grad()
        (weighted_losses(model, batch, weights_of).sum() / total).backward()
        each.append({k: p.grad.double() for k, p in model.named_parameters()})
    model.zero_grad()
    shares = [total / sum(totals) for total in totals]
    terms = {}
    for key, w in weights(model).items():
        if gradient == "per_sample":
            terms[key] = torch.stack([(w * g[key]).abs() for g in each]).mean(0)
        else:
            parts = [share * g[key] for share, g in zip(shares, each, strict=True)]
            terms[key] = (w * torch.stack(parts).sum(0)).abs()
    for batches in ([joined(data)], data):
        options = {"token_weights": weights_of, "gradient": gradient}
        assert_scores_are(model, score(model, batches, "taylor", **options), terms)


# Inputs of the writing matrices
def consumer_inputs(model, data):
    """``[tokens, channels]`` inputs of o_proj and down_proj (dense, fc2 for Phi) by name."""
    seen = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(args[0][0].double())
        )
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in ("o_proj", "dense", "down_proj", "fc2")
    ]
    with torch.no_grad():
        for batch in data:
            model(input_ids=batch["input_ids"])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@every_model
@pytest.mark.parametrize("criterion", ["wanda", "flap"])
def test_wanda_and_flap_are_their_formulas(name, criterion):
    model = model_named(name)
    with torch.no_grad():  # a mean away from zero, so that variance and second moment differ
        for layer in model.model.layers:
            for parameter in layer.parameters():
                parameter.add_(0.02)
    data = samples(model)
    scores = score(model, data, criterion)
    for path, x in consumer_inputs(model, data).items():
        index = int(path.split(".")[2])
        w = model.get_submodule(path).weight.detach().double()
        values = scores.of("neuron" if ".mlp." in path else "kv_group")[index]
        width = x.shape[1] // len(values)
        for unit, found in enumerate(values):
            expected = 0.0
            for j in range(unit * width, (unit + 1) * width):
                if criterion == "wanda":
                    expected += float(w[:, j].abs().sum() * (x[:, j] ** 2).mean().sqrt())
                else:
                    expected += float(x[:, j].var(unbiased=False) * (w[:, j] ** 2).sum())
            assert float(found) == pytest.approx(expected, rel=1e-4)


# Layers
def hidden_states(model, batch):
    """Those after the embedding and each layer, and at last those before the final norm."""
    norm, seen = getattr(model.model, "norm", None) or model.model.final_layernorm, []
    hook = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    with torch.no_grad():
        output = model(input_ids=batch["input_ids"], output_hidden_states=True)
    hook.remove()
    return *(state[0] for state in output.hidden_states), seen[0]


def shortgpt(x, y):
    """ShortGPT's ``block_influence``: the full S x S product for its diagonal, in float32."""
    sim = (x @ y.T) / (x.norm(dim=-1, keepdim=True) * y.norm(dim=-1, keepdim=True).T)
    return 1 - sim.diagonal().nan_to_num(nan=0.5)


@every_model
def test_block_influence_sums_are_shortgpts(name):
    model = model_named(name)
    data = [tiny.batch(model, tokens, seed) for seed, tokens in enumerate((9, 17, 5))]
    expected, last = torch.zeros(4, dtype=torch.float64), 0.0
    for batch in data:
        states = hidden_states(model, batch)  # the last layer's are after the final norm
        for index in range(4):
            expected[index] += shortgpt(states[index], states[index + 1]).double().sum()
        last += float(shortgpt(states[3], states[5]).sum())
    options = {"reduction": "sum", "last_layer": "postnorm"}
    layer = score(model, data, "block_influence", **options).layer
    torch.testing.assert_close(layer.double(), expected, rtol=1e-5, atol=0)
    clean = score(model, data, "block_influence", reduction="sum").layer
    torch.testing.assert_close(clean[:-1], layer[:-1], rtol=1e-6, atol=0)
    assert float(clean[-1]) == pytest.approx(last, rel=1e-5)
    assert abs(clean[-1] - layer[-1]) > 1e-3 * layer[-1]  # the final norm's weights matter
    mean = score(model, data, "block_influence").layer
    torch.testing.assert_close(mean * (9 + 17 + 5), clean, rtol=1e-6, atol=0)


@every_model
def test_angular_distances_are_those_of_the_last_tokens(name):
    model = model_named(name)
    data = [tiny.batch(model, tokens, seed) for seed, tokens in enumerate((9, 17, 5))]
    found = score(model, data, "angular")
    for length in range(1, 5):
        for start in range(4):
            if start + length > 4:
                assert math.isinf(found.layer_runs[length - 1, start])
                continue
            distances = []
            for batch in data:
                *states, _, last = hidden_states(model, batch)
                states.append(last)  # before the final norm
                x, y = states[start][-1].double(), states[start + length][-1].double()
                cosine = float(x @ y) / math.sqrt(float(x @ x) * float(y @ y))
                distances.append(math.acos(cosine) / math.pi)
            expected = sum(distances) / len(distances)
            assert float(found.layer_runs[length - 1, start]) == pytest.approx(expected, abs=1e-5)
    assert torch.equal(found.layer, found.layer_runs[0])


# Numerics
def test_half_precision_norms_do_not_overflow_and_tiny_vectors_keep_their_angle():
    x = (40 * torch.randn(2, 5, 64)).half()
    y = (x.float() + 5 * torch.randn(2, 5, 64)).half()
    assert (x.norm(dim=-1) * y.norm(dim=-1)).isinf().any()  # what ShortGPT divides by
    exact = 1 - torch.cosine_similarity(x.double(), y.double(), dim=-1)
    values = block_influence(x, y)
    assert values.dtype == torch.float32
    assert values.shape == (2, 5)
    assert_close(values, exact, LOSS)
    x = torch.full((1, 3, 512), 60000.0, dtype=torch.float16)
    y = x.clone()
    y[:, 1, ::2] = -60000.0
    y[:, 2] = -60000.0
    assert_close(block_influence(x, y), torch.tensor([[0.0, 1.0, 2.0]]), LOSS)
    assert_close(angular_distance(x, y), torch.tensor([[0.0, 0.5, 1.0]]), LOSS)
    x = 1e-9 * torch.randn(1, 4, 64)
    assert_close(block_influence(x, 3 * x), torch.zeros(1, 4), LOSS)


def test_block_influence_is_row_wise_does_not_see_masked_tokens_and_is_finite():
    x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    x[0, 3:] = math.nan
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, 3:] = 0
    values = block_influence(x, y, mask)
    assert values[0, 3:].tolist() == [0, 0]
    assert values.isfinite().all()
    assert torch.equal(values[1], block_influence(x, y)[1])
    assert torch.equal(values, block_influence(x, y, mask.bool()))
    x = torch.randn(1, 30000, 4)  # an S x S product of these would need 3.6 GB
    assert block_influence(x, x.flip(1)).shape == (1, 30000)
    x, y = torch.zeros(1, 2, 8), torch.randn(1, 2, 8)
    for found in (block_influence(x, y), angular_distance(x, y), angular_distance(x, x)):
        assert found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_identical_vectors_have_angle_zero_not_nan(dtype):
    x = torch.randn(400, 64).to(dtype)
    unclamped = torch.arccos((x * x).sum(-1) / (x.norm(dim=-1) * x.norm(dim=-1)))
    assert unclamped.isnan().any()  # the reference's bug B6
    assert angular_distance(x, x).max() < 1e-7
    assert angular_distance(x, -x).min() > 1 - 1e-7
