"""The battery that every row of the table of criteria passes, whatever its options."""

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from slimvlm.core.errors import ConfigError, DataError
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.parts import Parts
from slimvlm.scoring.criteria import CRITERIA
from slimvlm.scoring.score_model import score
from tests import tiny
from tests.handmade import assert_equal, assert_untouched, joined, logits, padded, snapshot
from tests.tiers import tiered
from tests.tolerances import assert_scores_close, share_of

UNITS = ("layer", "kv_group", "neuron", "expert")
MODELS = ("llama", "llava-llama", "internvl-qwen2", "llava-phi", "llava-phi3", "qwen3_vl")


class Case(NamedTuple):
    """A criterion with a value for each of its options."""

    name: str
    options: dict[str, Any]

    @property
    def row(self):
        return CRITERIA[self.name]

    def build(self, model_name):
        """A tiny model; one with experts instead where a criterion is about nothing else."""
        if self.row.units == ("expert",):
            sees = tiny.is_multimodal(tiny.CONFIGS[model_name]())
            return tiny.build("qwen3_vl_moe" if sees else "qwen3_moe")
        return tiny.build(model_name)

    def score(self, model, data, **others):
        return score(model, data, self.name, **self.options, **others)

    def flat(self, model, data, **others):
        return flat(self.score(model, data, **others))


def _cases():
    for name, row in CRITERIA.items():
        choices = {k: v for k, v in row.options.items() if isinstance(v, tuple)}
        for values in itertools.product(*choices.values()):
            yield Case(name, dict(zip(choices, values, strict=True)))


CASES = list(_cases())


def every(cases):
    """Parameters; by default one of each way to collect, with the first of its options."""
    first = {case.name: case for case in reversed(CASES) if case.name not in COLLECTED_ALIKE}
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(
                case,
                id="-".join([case.name, *map(str, case.options.values())]),
                marks=[] if case is first.get(case.name) else pytest.mark.slow,
            )
            for case in cases
        ],
    )


WITH_DATA = [case for case in CASES if case.row.needs_data]
WITH_LABELS = [case for case in CASES if case.row.capture.backward]
EXPERTS_ALONE = [case for case in CASES if case.row.units == ("expert",)]
COLLECTED_ALIKE = ("angular", "taylor_second", "wanda", "flap", "frequency")
"""Criteria that read what another one reads."""
UNSEEING = [case for case in CASES if case.name in ("random", "spacing")]

every_case = every(CASES)
every_case_with_data = every(WITH_DATA)
every_width_case = every(c for c in CASES if "neuron" in c.row.units and c not in UNSEEING)


def sample(model, seed, tokens=12, labels=5):
    """One sample with as many labels as wanted, so that token and sample means differ."""
    batch = tiny.batch(model, tokens, seed)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :-labels] = -100
    return batch


def samples(model):
    """Four samples of one length with different numbers of labels."""
    return [sample(model, seed, labels=2 + 3 * seed) for seed in range(4)]


def flat(scores):
    """All tensors of some scores by name, but for runs that do not fit and layers without units."""
    found = scores.tensors()
    if "layer_runs" in found:
        found["layer_runs"] = found["layer_runs"][found["layer_runs"].isfinite()]
    return {name: values for name, values in found.items() if len(values)}


def assert_same_scores(actual, expected):
    ours, theirs = flat(actual), flat(expected)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_scores_close(ours[name], theirs[name], share_of(actual.criterion))


@pytest.mark.parametrize("model_name", tiered(MODELS))
@every_case
def test_shapes_types_and_names(case, model_name):
    model = case.build(model_name)
    anatomy = read_anatomy(model)
    scores = case.score(model, [sample(model, 0)])
    assert scores.criterion == case.name
    assert case.options.items() <= dict(scores.options).items()
    assert {unit for unit in UNITS if scores.of(unit) is not None} == set(case.row.units)
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
def test_the_same_data_gives_the_same_bits_and_units_different_scores(case):
    model = case.build("llava-llama")
    first = case.flat(model, samples(model))
    for name, values in first.items():
        if name != "layer_runs" and case.name != "frequency":  # counts may be equal
            assert values.unique().numel() == values.numel(), name
    torch.rand(3)  # nor does the state of the global generator matter
    second = case.flat(case.build("llava-llama"), samples(model))
    assert_equal(second, first)


def traces(model):
    """What scoring might leave behind: flags and gradients of parameters, hooks."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    hooks += sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())
    return hooks, {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}


@every_case
def test_the_model_is_left_as_it_was(case):
    model = case.build("llava-llama").train()
    model.get_submodule(read_anatomy(model).family.vision).requires_grad_(False)
    before, batch = snapshot(model), sample(model, 0)
    kept = {name: value.clone() for name, value in batch.items()}
    logits(model, batch)  # transformers installs hooks of its own at the first call
    found = traces(model)
    case.score(model, [batch])
    assert_untouched(model, before)
    assert model.training
    assert traces(model) == found
    assert_equal(batch, kept)
    if case.row.needs_data and case not in EXPERTS_ALONE:  # likewise after a batch that fails
        broken = {**batch, "pixel_values": batch["pixel_values"][:, :1]}
        with pytest.raises(RuntimeError, match="to have 3 channels"):
            case.score(model, [batch, broken])
        assert traces(model) == found


@pytest.mark.parametrize(
    "model_name", tiered(["llama", "phi", "llava-phi3"], lambda name: name == "llava-phi3")
)
@every_case_with_data
def test_how_samples_are_batched_and_padded_does_not_matter(case, model_name):
    model = case.build(model_name)
    single = samples(model)
    together = case.score(model, [joined(single)])
    for data in (single, [joined(single[:3]), single[3]], iter(single)):
        assert_same_scores(case.score(model, data), together)
    single = [sample(model, seed, tokens=9 + 4 * (seed % 3), labels=3 + seed) for seed in range(3)]
    alone = case.score(model, single)
    for left in (False, True):
        assert_same_scores(case.score(model, [padded(single, left)]), alone)


@every_case_with_data
def test_the_data_matters_and_embeddings_may_stand_for_tokens(case):
    model = case.build("llama")
    first = case.flat(model, samples(model)[:1])
    second = case.flat(model, samples(model)[1:2])
    for name, values in first.items():
        assert (values - second[name]).abs().max() > 1e-3 * values.abs().max()
    batch = sample(model, 0)
    embedded = {name: value for name, value in batch.items() if name != "input_ids"}
    embedded["inputs_embeds"] = model.get_input_embeddings()(batch["input_ids"]).detach()
    expected = case.score(model, [batch])
    assert_same_scores(case.score(model, [embedded]), expected)


@every_case_with_data
def test_without_labels_the_whole_text_counts_as_prompt_but_not_its_padding(case):
    model = case.build("llama")
    data = [{**one, "labels": one["input_ids"]} for one in samples(model)]
    unlabelled = [{k: v for k, v in one.items() if k != "labels"} for one in data]
    expected = case.score(model, data)
    found = case.score(model, unlabelled, token_weights={"prompt": 2.0})
    if case.options.get("reduction") != "sum":
        assert_same_scores(found, expected)
    if case in WITH_LABELS:
        single = [sample(model, seed, tokens=9 + 4 * seed) for seed in range(2)]
        expected = case.score(model, [{**one, "labels": one["input_ids"]} for one in single])
        del (together := padded(single))["labels"]
        assert_same_scores(case.score(model, [together]), expected)


@every_case_with_data
def test_weights_of_one_are_no_weights_and_others_matter(case):
    """Losses then count prompts, too: they are as before where only answers weigh."""
    model = case.build("llava-llama")
    data = samples(model)
    losses = case.row.capture.backward
    weights = {"image": 1.0, "prompt": 0.0 if losses else 1.0, "answer": 1.0}
    plain = case.score(model, data)
    weighted = case.score(model, data, token_weights=weights)
    assert weighted.options["token_weights"] == weights
    assert "token_weights" not in plain.options
    assert_equal(flat(weighted), flat(plain))
    if case.name != "angular":  # looks at one token of a sample
        one, two = (case.flat(model, data, token_weights={"prompt": w}) for w in (0.5, 0.1))
        assert all((one[k] - two[k]).abs().max() > 1e-3 * one[k].abs().max() for k in one)


@every(c for c in WITH_DATA if c not in WITH_LABELS and c.name != "angular")
@pytest.mark.parametrize("model_name", tiered(["llava-llama", "qwen3_vl"]))
def test_a_role_of_weight_zero_is_absent(case, model_name):
    """Attention is causal, so that cutting the answers off leaves the other tokens as they are."""
    model = case.build(model_name)
    data = [sample(model, seed, labels=2 + 2 * seed) for seed in range(4)]
    cut = []
    for one in data:
        keep = int((one["labels"] == -100).sum())
        long = one["input_ids"].shape
        cut.append({k: v[:, :keep] if v.shape == long else v for k, v in one.items()})
    expected = case.score(model, cut)
    found = case.score(model, data, token_weights={"answer": 0.0})
    assert_same_scores(found, expected)
    whole = case.flat(model, data)
    assert any(not torch.allclose(whole[k], v, rtol=1e-3) for k, v in flat(expected).items())


def test_bad_token_weights_are_refused():
    model = tiny.build("llama")
    for name, row in CRITERIA.items():
        if not row.needs_data:
            with pytest.raises(ConfigError, match=f"token_weights: criterion '{name}' reads no"):
                score(model, [], name, token_weights={"image": 0.5})
    with pytest.raises(ConfigError, match=r"token_weights .*image, prompt, answer"):
        score(model, samples(model), "activation", token_weights={"sky": 1.0})
    unlabelled = [{k: v for k, v in one.items() if k != "labels"} for one in samples(model)]
    with pytest.raises(DataError, match="token weight above 0"):
        score(model, unlabelled, "activation", token_weights={"prompt": 0.0})
    with pytest.raises(DataError, match="text token of a weight above 0"):
        score(model, unlabelled, "gate", token_weights={"prompt": 0.0})


@every_width_case
@pytest.mark.parametrize("dead", [0, 1])
def test_query_heads_fold_into_their_own_kv_group(case, dead):
    """Two KV groups of two query heads, one group all zero: it alone must score exactly 0.

    Folded in stripes, the query heads of a dead group would lend each group half of their score.
    """
    torch.manual_seed(0)
    config = tiny.llama(num_attention_heads=4, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for layer in Parts(model).layers:
            attention = layer.get_submodule("self_attn")
            attention.q_proj.weight.view(2, 32, 64)[dead] = 0
            attention.k_proj.weight.view(2, 16, 64)[dead] = 0
            attention.v_proj.weight.view(2, 16, 64)[dead] = 0
            attention.o_proj.weight.view(64, 2, 32)[:, dead] = 0
    scores = case.score(model, samples(model))
    for values in scores.kv_group:
        assert values[dead] == 0
        assert values[1 - dead] > 0


@every_width_case
@pytest.mark.parametrize("model_name", ["llama", "phi3"])
def test_a_dead_neuron_scores_zero(case, model_name):
    model = tiny.build(model_name)
    with torch.no_grad():
        for _, projection, linear in Parts(model).projections():
            if projection.segments[0] == "neuron":
                for block in range(len(projection.segments)):
                    linear.weight.select(projection.dim, block * 96 + 7).zero_()
    scores = case.score(model, samples(model))
    for values in scores.neuron:
        assert values[7] == 0
        assert (values > 0).sum() == 95


@every_case_with_data
def test_no_data_is_refused_nor_are_samples_without_labels_taken(case):
    model = case.build("llama")
    with pytest.raises(DataError, match="no calibration batch"):
        case.score(model, iter(()))
    if case not in WITH_LABELS:
        return
    batch = joined(samples(model)[:2])
    batch["labels"][1] = -100
    with pytest.raises(DataError, match="no labelled token"):
        case.score(model, [batch])
    embedded = {"inputs_embeds": torch.randn(1, 5, 64)}
    with pytest.raises(DataError, match="needs labels"):
        case.score(model, [embedded])


def test_random_scores_follow_their_seed_and_an_unknown_criterion_is_refused():
    model = tiny.build("llama")
    first, again, other = (flat(score(model, [], "random", seed=seed)) for seed in (1, 1, 2))
    for name in first:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
    with pytest.raises(ConfigError, match=r"'tailor' is not known.*taylor, .*magnitude"):
        score(model, [], "tailor")


@every_case
def test_an_unknown_option_is_refused_with_the_choices(case):
    known = case.row.options
    expected = f"'{case.name}' has no option 'colour'. It has: {', '.join(known) or 'none'}"
    with pytest.raises(ConfigError) as refusal:
        case.score(case.build("llama"), [], colour="red")
    assert expected in str(refusal.value)
    for option in case.options:
        with pytest.raises(ConfigError, match=f"{option}='no' must be one of"):
            score(case.build("llama"), [], case.name, **{option: "no"})


def test_spacing_removes_layers_far_apart():
    torch.manual_seed(0)
    config = tiny.llama(num_hidden_layers=9)
    scores = score(AutoModelForCausalLM.from_config(config), [], "spacing").layer
    order = scores.argsort().tolist()
    assert order[0] == 4  # the middle
    assert sorted(order[1:3]) in ([1, 6], [1, 7], [2, 6], [2, 7])
    for count in (2, 3):
        gone = sorted(order[:count])
        assert min(b - a for a, b in itertools.pairwise(gone)) >= 2
