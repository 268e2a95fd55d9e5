"""The battery that every row of the table of criteria passes, whatever its options."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from slimvlm.core.errors import ConfigError, DataError, NumericalError
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.parts import Parts
from slimvlm.scoring.criteria import CRITERIA, criteria_table
from slimvlm.scoring.score_model import score
from slimvlm.scoring.unit_scores import Scores
from tests import tiny
from tests.handmade import Batch, assert_untouched, joined, logits, padded, snapshot
from tests.tiers import tiered
from tests.tolerances import (
    ELIMINATION_SHARE_OF_MAXIMUM,
    FORWARD,
    SCORE_SHARE_OF_MAXIMUM,
    assert_close,
    assert_scores_close,
)

UNITS = ("layer", "kv_group", "neuron", "expert")
MODELS = ("llama", "llava-llama", "internvl-qwen2", "llava-phi", "llava-phi3", "qwen3_vl")


def _cases() -> list[Any]:
    """Every criterion with every combination of its options' values."""
    cases = []
    for name, row in CRITERIA.items():
        choices = {k: v for k, v in row.options.items() if isinstance(v, tuple)}
        for values in itertools.product(*choices.values()):
            options = dict(zip(choices, values, strict=True))
            label = "-".join([name, *map(str, values)])
            cases.append(pytest.param(name, options, id=label))
    return cases


EXPERTS_ALONE = [name for name, row in CRITERIA.items() if row.units == ("expert",)]


def build(criterion: str, name: str) -> PreTrainedModel:
    """A tiny model; one with experts instead where a criterion is about nothing else."""
    if criterion in EXPERTS_ALONE:
        sees = tiny.is_multimodal(tiny.CONFIGS[name]())
        return tiny.build("qwen3_vl_moe" if sees else "qwen3_moe")
    return tiny.build(name)


CASES = _cases()
WITH_DATA = [case for case in CASES if CRITERIA[case.values[0]].needs_data]
WITH_LABELS = [c for c in CASES if CRITERIA[c.values[0]].capture.backward]
OVER_TOKENS = [c for c in WITH_DATA if c not in WITH_LABELS and c.values[0] != "angular"]
WIDTH = [c for c in CASES if "neuron" in CRITERIA[c.values[0]].units and c.values[0] != "random"]

every_case = pytest.mark.parametrize(("criterion", "options"), CASES)
every_case_with_data = pytest.mark.parametrize(("criterion", "options"), WITH_DATA)
every_case_with_labels = pytest.mark.parametrize(("criterion", "options"), WITH_LABELS)
every_width_case = pytest.mark.parametrize(("criterion", "options"), WIDTH)


def sample(model: PreTrainedModel, seed: int, tokens: int = 12, labels: int = 5) -> Batch:
    """One sample with as many labels as wanted, so that token and sample means differ."""
    batch = tiny.batch(model, tokens, seed)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :-labels] = -100
    return batch


def samples(model: PreTrainedModel) -> list[Batch]:
    """Four samples of one length with different numbers of labels."""
    return [sample(model, seed, labels=2 + 3 * seed) for seed in range(4)]


def flat(scores: Scores) -> dict[str, Tensor]:
    """All tensors of some scores by name, but for runs that do not fit and layers without units."""
    found: dict[str, Tensor] = {}
    if scores.layer is not None:
        found["layer"] = scores.layer
    if scores.layer_runs is not None:
        found["layer_runs"] = scores.layer_runs[scores.layer_runs.isfinite()]
    for unit in ("kv_group", "neuron", "expert"):
        for index, values in enumerate(scores.of(unit) or ()):
            if len(values):
                found[f"{unit}.{index}"] = values
    return found


def assert_same_scores(actual: Scores, expected: Scores) -> None:
    ours, theirs = flat(actual), flat(expected)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_scores_close(ours[name], theirs[name], share_of(actual.criterion))


def share_of(criterion: str) -> float:
    """How far scores may differ, as a share of the largest."""
    is_eliminated = criterion == "obs"
    return ELIMINATION_SHARE_OF_MAXIMUM if is_eliminated else SCORE_SHARE_OF_MAXIMUM


@pytest.mark.parametrize("model_name", tiered(MODELS))
@every_case
def test_shapes_types_and_names(criterion: str, options: dict[str, Any], model_name: str) -> None:
    model = build(criterion, model_name)
    anatomy = read_anatomy(model)
    scores = score(model, [sample(model, 0)], criterion, **options)
    assert scores.criterion == criterion
    assert options.items() <= dict(scores.options).items()
    assert {unit for unit in UNITS if scores.of(unit) is not None} == set(CRITERIA[criterion].units)
    for values in flat(scores).values():
        assert values.dtype == torch.float32
        assert values.device.type == "cpu"
        assert values.isfinite().all()
        assert not values.requires_grad
    if scores.layer is not None:
        assert scores.layer.shape == (anatomy.num_layers,)
    for unit in UNITS[1:]:
        if scores.of(unit) is not None:
            expected = [(shape.units(unit),) for shape in anatomy.layers]
            assert [tuple(values.shape) for values in scores.of(unit)] == expected


@every_case
def test_units_get_different_scores(criterion: str, options: dict[str, Any]) -> None:
    model = build(criterion, "llava-llama")
    scores = score(model, samples(model), criterion, **options)
    for name, values in flat(scores).items():
        if name != "layer_runs" and criterion != "frequency":  # counts may be equal
            assert values.unique().numel() == values.numel(), name


@every_case
def test_the_same_data_gives_the_same_bits(criterion: str, options: dict[str, Any]) -> None:
    model = build(criterion, "llava-llama")
    first = flat(score(model, samples(model), criterion, **options))
    torch.rand(3)  # nor does the state of the global generator matter
    second = flat(score(build(criterion, "llava-llama"), samples(model), criterion, **options))
    assert all(torch.equal(first[name], second[name]) for name in first)


def num_hooks(model: PreTrainedModel) -> int:
    count = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return count + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


@every_case
def test_the_model_is_left_as_it_was(criterion: str, options: dict[str, Any]) -> None:
    model = build(criterion, "llava-llama").train()
    model.get_submodule(read_anatomy(model).family.vision).requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before, batch = snapshot(model), sample(model, 0)
    kept = {name: value.clone() for name, value in batch.items()}
    logits(model, batch)  # transformers installs hooks of its own at the first call
    hooks = num_hooks(model)
    score(model, [batch], criterion, **options)
    assert_untouched(model, before)
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert num_hooks(model) == hooks
    assert batch.keys() == kept.keys()
    assert all(torch.equal(batch[name], kept[name]) for name in kept)


@pytest.mark.parametrize(
    ("criterion", "options"), [c for c in WITH_DATA if c.values[0] not in EXPERTS_ALONE]
)
def test_a_failing_batch_leaves_the_model_as_it_was(
    criterion: str, options: dict[str, Any]
) -> None:
    model = build(criterion, "llava-llama")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    broken = sample(model, 0)
    broken["pixel_values"] = broken["pixel_values"][:, :1]
    logits(model, sample(model, 0))
    hooks = num_hooks(model)
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        score(model, [sample(model, 0), broken], criterion, **options)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert num_hooks(model) == hooks


@every_case_with_data
@pytest.mark.parametrize("model_name", tiered(["llama", "llava-phi3"]))
def test_how_samples_are_batched_does_not_matter(
    criterion: str, options: dict[str, Any], model_name: str
) -> None:
    model = build(criterion, model_name)
    single = samples(model)
    together = score(model, [joined(single)], criterion, **options)
    one_by_one = score(model, single, criterion, **options)
    mixed = score(model, [joined(single[:3]), single[3]], criterion, **options)
    assert_same_scores(one_by_one, together)
    assert_same_scores(mixed, together)
    assert_same_scores(score(model, iter(single), criterion, **options), together)


@every_case_with_data
def test_the_data_matters(criterion: str, options: dict[str, Any]) -> None:
    model = build(criterion, "llama")
    first = flat(score(model, samples(model)[:1], criterion, **options))
    second = flat(score(model, samples(model)[1:2], criterion, **options))
    for name, values in first.items():
        assert (values - second[name]).abs().max() > 1e-3 * values.abs().max()


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("model_name", tiered(["llama", "phi", "llava-phi3"]))
@every_case_with_data
def test_padding_does_not_count(
    criterion: str, options: dict[str, Any], model_name: str, left: bool
) -> None:
    model = build(criterion, model_name)
    single = [sample(model, seed, tokens=9 + 4 * (seed % 3), labels=3 + seed) for seed in range(3)]
    alone = score(model, single, criterion, **options)
    together = score(model, [padded(single, left)], criterion, **options)
    assert_same_scores(together, alone)


@every_case_with_data
def test_padding_would_count_without_a_mask(criterion: str, options: dict[str, Any]) -> None:
    model = build(criterion, "llama")
    single = [sample(model, seed, tokens=9 + 4 * seed, labels=4) for seed in range(3)]
    batch = padded(single, left=True)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    alone = flat(score(model, single, criterion, **options))
    together = flat(score(model, [batch], criterion, **options))
    assert any(
        (alone[name] - together[name]).abs().max() > 1e-3 * alone[name].abs().max()
        for name in alone
    )


@every_case_with_labels
def test_without_labels_the_whole_text_counts_but_not_its_padding(
    criterion: str, options: dict[str, Any]
) -> None:
    model = build(criterion, "llama")
    single = [sample(model, seed, tokens=9 + 4 * seed) for seed in range(2)]
    whole = [{**one, "labels": one["input_ids"]} for one in single]
    expected = score(model, whole, criterion, **options)
    unlabelled = padded(single)
    del unlabelled["labels"]
    assert_same_scores(score(model, [unlabelled], criterion, **options), expected)


@every_case_with_data
def test_weights_of_one_are_no_weights(criterion: str, options: dict[str, Any]) -> None:
    """Losses then count prompts, too: they are as before where only answers weigh."""
    model = build(criterion, "llava-llama")
    data = samples(model)
    losses = CRITERIA[criterion].capture.backward
    weights = {"image": 1.0, "prompt": 0.0 if losses else 1.0, "answer": 1.0}
    plain = score(model, data, criterion, **options)
    weighted = score(model, data, criterion, token_weights=weights, **options)
    assert weighted.options["token_weights"] == weights
    assert "token_weights" not in plain.options
    ours, theirs = flat(weighted), flat(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@every_case_with_data
def test_without_labels_all_text_weighs_as_prompt(criterion: str, options: dict[str, Any]) -> None:
    model = build(criterion, "llama")
    data = [{**one, "labels": one["input_ids"]} for one in samples(model)]
    unlabelled = [{k: v for k, v in one.items() if k != "labels"} for one in data]
    expected = score(model, data, criterion, **options)
    found = score(model, unlabelled, criterion, token_weights={"prompt": 2.0}, **options)
    if options.get("reduction") != "sum":
        assert_same_scores(found, expected)


@pytest.mark.parametrize(("criterion", "options"), OVER_TOKENS)
@pytest.mark.parametrize("model_name", ["llava-llama", "qwen3_vl"])
def test_a_role_of_weight_zero_is_absent(
    criterion: str, options: dict[str, Any], model_name: str
) -> None:
    """Attention is causal, so that cutting the answers off leaves the other tokens as they are."""
    model = build(criterion, model_name)
    data = [sample(model, seed, labels=2 + 2 * seed) for seed in range(4)]
    cut = []
    for one in data:
        keep = int((one["labels"] == -100).sum())
        long = one["input_ids"].shape
        cut.append({k: v[:, :keep] if v.shape == long else v for k, v in one.items()})
    expected = score(model, cut, criterion, **options)
    found = score(model, data, criterion, token_weights={"answer": 0.0}, **options)
    assert_same_scores(found, expected)
    whole = flat(score(model, data, criterion, **options))
    assert any(not torch.allclose(whole[k], v, rtol=1e-3) for k, v in flat(expected).items())


@every_case_with_data
def test_token_weights_matter(criterion: str, options: dict[str, Any]) -> None:
    if criterion == "angular":  # looks at one token of a sample
        return
    model = build(criterion, "llava-llama")
    data = samples(model)
    one = flat(score(model, data, criterion, token_weights={"prompt": 0.5}, **options))
    two = flat(score(model, data, criterion, token_weights={"prompt": 0.1}, **options))
    assert all((one[k] - two[k]).abs().max() > 1e-3 * one[k].abs().max() for k in one)


def test_bad_token_weights_are_refused() -> None:
    model = tiny.build("llama")
    for name, row in CRITERIA.items():
        if not row.needs_data:
            with pytest.raises(ConfigError, match=f"token_weights: criterion '{name}' reads no"):
                score(model, [], name, token_weights={"image": 0.5})
    for weights in ({"sky": 1.0}, {"image": -1.0}, {"image": math.nan}, {"image": math.inf}):
        with pytest.raises(ConfigError, match=r"token_weights .*image, prompt, answer"):
            score(model, samples(model), "activation", token_weights=weights)
    nothing = {"image": 0.0, "prompt": 0.0, "answer": 0.0}
    with pytest.raises(ConfigError, match="above 0"):
        score(model, samples(model), "activation", token_weights=nothing)
    unlabelled = [{k: v for k, v in one.items() if k != "labels"} for one in samples(model)]
    with pytest.raises(DataError, match="token weight above 0"):
        score(model, unlabelled, "activation", token_weights={"prompt": 0.0})
    with pytest.raises(DataError, match="text token of a weight above 0"):
        score(model, unlabelled, "gate", token_weights={"prompt": 0.0})


@every_case_with_data
def test_embeddings_may_stand_for_tokens(criterion: str, options: dict[str, Any]) -> None:
    model = build(criterion, "llama")
    batch = sample(model, 0)
    embedded = {name: value for name, value in batch.items() if name != "input_ids"}
    embedded["inputs_embeds"] = model.get_input_embeddings()(batch["input_ids"]).detach()
    expected = score(model, [batch], criterion, **options)
    assert_same_scores(score(model, [embedded], criterion, **options), expected)


def permute_units(layer: nn.Module, groups: Tensor, neurons: Tensor, queries: int) -> None:
    """Put the KV groups and neurons of a Llama layer into another order: the same function."""
    attention: Any = layer.get_submodule("self_attn")
    mlp: Any = layer.get_submodule("mlp")

    def rows(linear: nn.Linear, blocks: int, order: Tensor) -> None:
        linear.weight.data = linear.weight.data.view(blocks, -1, linear.in_features)[order].reshape(
            linear.weight.shape
        )

    def columns(linear: nn.Linear, blocks: int, order: Tensor) -> None:
        linear.weight.data = linear.weight.data.view(linear.out_features, blocks, -1)[
            :, order
        ].reshape(linear.weight.shape)

    heads = (groups[:, None] * queries + torch.arange(queries)).flatten()
    rows(attention.q_proj, len(heads), heads)
    rows(attention.k_proj, len(groups), groups)
    rows(attention.v_proj, len(groups), groups)
    columns(attention.o_proj, len(heads), heads)
    rows(mlp.gate_proj, len(neurons), neurons)
    rows(mlp.up_proj, len(neurons), neurons)
    columns(mlp.down_proj, len(neurons), neurons)


@pytest.mark.parametrize("model_name", tiered(["llama", "llava-llama"]))
@pytest.mark.parametrize(
    ("criterion", "options"),
    [c for c in CASES if c.values[0] not in ("random", "spacing", *EXPERTS_ALONE)],
)
def test_permuted_units_have_permuted_scores(
    criterion: str, options: dict[str, Any], model_name: str
) -> None:
    model, permuted = tiny.build(model_name), tiny.build(model_name)
    groups, neurons = torch.tensor([2, 0, 3, 1]), torch.randperm(96)
    permute_units(Parts(permuted).layers[1], groups, neurons, queries=2)
    data = samples(model)
    assert_close(logits(permuted, data[0]), logits(model, data[0]), FORWARD)
    before = score(model, data, criterion, **options)
    after, share = score(permuted, data, criterion, **options), share_of(criterion)
    if before.layer is not None and after.layer is not None:
        assert_scores_close(after.layer, before.layer, share)
    for unit, order in (("kv_group", groups), ("neuron", neurons)):
        if before.of(unit) is not None:
            assert_scores_close(after.of(unit)[1], before.of(unit)[1][order], share)
            assert_scores_close(after.of(unit)[2], before.of(unit)[2], share)


@every_width_case
@pytest.mark.parametrize("dead", [0, 1])
def test_query_heads_fold_into_their_own_kv_group(
    criterion: str, options: dict[str, Any], dead: int
) -> None:
    """Two KV groups of two query heads, one group all zero: it alone must score exactly 0.

    Folded in stripes, the query heads of a dead group would lend each group half of their score.
    """
    torch.manual_seed(0)
    config = tiny.llama(num_attention_heads=4, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for layer in Parts(model).layers:
            attention: Any = layer.get_submodule("self_attn")
            attention.q_proj.weight.view(2, 32, 64)[dead] = 0
            attention.k_proj.weight.view(2, 16, 64)[dead] = 0
            attention.v_proj.weight.view(2, 16, 64)[dead] = 0
            attention.o_proj.weight.view(64, 2, 32)[:, dead] = 0
    scores = score(model, samples(model), criterion, **options)
    assert scores.kv_group is not None
    for values in scores.kv_group:
        assert values[dead] == 0
        assert values[1 - dead] > 0


@every_width_case
@pytest.mark.parametrize("model_name", ["llama", "phi3"])
def test_a_dead_neuron_scores_zero(
    criterion: str, options: dict[str, Any], model_name: str
) -> None:
    model = tiny.build(model_name)
    with torch.no_grad():
        for _, projection, linear in Parts(model).projections():
            if projection.segments[0] == "neuron":
                for block in range(len(projection.segments)):
                    linear.weight.select(projection.dim, block * 96 + 7).zero_()
    scores = score(model, samples(model), criterion, **options)
    assert scores.neuron is not None
    for values in scores.neuron:
        assert values[7] == 0
        assert (values > 0).sum() == 95


@every_case_with_data
@pytest.mark.parametrize("nothing", [[], iter(())], ids=["list", "iterator"])
def test_no_data_is_refused(criterion: str, options: dict[str, Any], nothing: Any) -> None:
    with pytest.raises(DataError, match="no calibration batch"):
        score(build(criterion, "llama"), nothing, criterion, **options)


@pytest.mark.parametrize(("criterion", "options"), [c for c in CASES if c not in WITH_DATA])
def test_no_data_is_needed(criterion: str, options: dict[str, Any]) -> None:
    model = build(criterion, "llama")
    without = flat(score(model, [], criterion, **options))
    given = flat(score(model, samples(model), criterion, **options))
    assert without.keys() == given.keys()
    assert all(torch.equal(without[name], given[name]) for name in given)


@every_case_with_labels
def test_samples_without_labels_are_refused(criterion: str, options: dict[str, Any]) -> None:
    model = build(criterion, "llama")
    batch = joined(samples(model)[:2])
    batch["labels"][1] = -100
    with pytest.raises(DataError, match="no labelled token"):
        score(model, [batch], criterion, **options)
    embedded = {"inputs_embeds": torch.randn(1, 5, 64)}
    with pytest.raises(DataError, match="needs labels"):
        score(model, [embedded], criterion, **options)


@pytest.mark.parametrize(
    ("criterion", "options"), [c for c in CASES if c.values[0] not in ("random", "spacing")]
)
def test_a_broken_weight_is_named(criterion: str, options: dict[str, Any]) -> None:
    model = build(criterion, "llama")
    with torch.no_grad():
        path = "mlp.experts.down_proj" if criterion in EXPERTS_ALONE else "mlp.down_proj.weight"
        Parts(model).layers[2].get_parameter(path)[..., 3, 5] = math.nan
    with pytest.raises(NumericalError, match=r"NaN or infinity"):
        score(model, samples(model), criterion, **options)


def test_an_unknown_criterion_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"'tailor' is not known.*taylor, .*magnitude"):
        score(tiny.build("llama"), [], "tailor")
    with pytest.raises(ConfigError, match="'kl_greedy' was removed: use block_influence"):
        score(tiny.build("llama"), [], "kl_greedy")


@every_case
def test_an_unknown_option_is_refused_with_the_choices(
    criterion: str, options: dict[str, Any]
) -> None:
    known = CRITERIA[criterion].options
    expected = f"'{criterion}' has no option 'colour'. It has: {', '.join(known) or 'none'}"
    with pytest.raises(ConfigError) as refusal:
        score(build(criterion, "llama"), [], criterion, colour="red", **options)
    assert expected in str(refusal.value)
    for option in options:
        with pytest.raises(ConfigError, match=f"{option}='no' must be one of"):
            score(build(criterion, "llama"), [], criterion, **{option: "no"})


def test_random_scores_follow_their_seed() -> None:
    model = tiny.build("llama")
    first, again, other = (flat(score(model, [], "random", seed=seed)) for seed in (1, 1, 2))
    for name in first:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


def test_spacing_removes_layers_far_apart() -> None:
    torch.manual_seed(0)
    config = tiny.llama(num_hidden_layers=9)
    scores = score(AutoModelForCausalLM.from_config(config), [], "spacing").layer
    assert scores is not None
    order = scores.argsort().tolist()
    assert order[0] == 4  # the middle
    assert sorted(order[1:3]) in ([1, 6], [1, 7], [2, 6], [2, 7])
    for count in (2, 3):
        gone = sorted(order[:count])
        assert min(b - a for a, b in itertools.pairwise(gone)) >= 2


def test_the_table_prints_every_row() -> None:
    table = criteria_table()
    for name, row in CRITERIA.items():
        assert f"| `{name}` |" in table
        assert row.paper in table
        assert row.about in table
    assert len(table.splitlines()) == len(CRITERIA) + 2
