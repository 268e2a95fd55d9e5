"""Options say what is wrong with them, by name."""

import jaxtyping
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimvlm.core.documents import asked, built
from slimvlm.core.errors import ConfigError, SlimError
from slimvlm.core.options import LOSS_NAMES, CompressConfig, PruneConfig, RecoverConfig, parse_loss


@pytest.mark.parametrize(
    ("expression", "weights"),
    [
        ("sft", {"sft": 1}),
        ("sft+hidden", {"sft": 0.5, "hidden": 0.5}),
        ("0.7*sft+0.3*hidden", {"sft": 0.7, "hidden": 0.3}),
        (" 0.7 * sft + hidden ", {"sft": 0.7, "hidden": 0.3}),
        ("sft+hidden+kl", {"sft": 1 / 3, "hidden": 1 / 3, "kl": 1 / 3}),
        ("0.5*sft+kl+rkl", {"sft": 0.5, "kl": 0.25, "rkl": 0.25}),
        ("sft+cosine+jsd", {"sft": 1 / 3, "cosine": 1 / 3, "jsd": 1 / 3}),
        ("2*hidden", {"hidden": 2}),
        ("1e-2*sft", {"sft": 0.01}),
    ],
)
def test_a_loss_is_a_weighted_sum(expression, weights):
    assert parse_loss(expression) == pytest.approx(weights)


@pytest.mark.parametrize(
    ("expression", "named"),
    [
        ("", "''"),
        ("sft+", "''"),
        ("sft+sft", "'sft'"),
        ("sft+l2", "'l2'"),
        ("sft-hidden", "'sft-hidden'"),
        ("-1*sft", "'-1*sft'"),
        ("x*sft", "'x*sft'"),
        ("0*sft+hidden", "weight above 0"),
        ("1.0*sft+hidden", "'hidden' needs a weight; the others"),
        ("0.8*sft+0.4*kl+hidden", "'hidden' needs a weight; the others"),
        ("SFT", "'SFT'"),
    ],
)
def test_a_bad_loss_is_quoted(expression, named):
    with pytest.raises(ConfigError) as refusal:
        parse_loss(expression)
    assert named in str(refusal.value)
    assert str(refusal.value).startswith(f"loss {expression!r}")


@given(st.lists(st.sampled_from(LOSS_NAMES), min_size=1, unique=True))
def test_terms_without_weight_share_one(names):
    weights = parse_loss("+".join(names))
    assert list(weights) == names
    assert sum(weights.values()) == pytest.approx(1)
    assert len({round(weight, 9) for weight in weights.values()}) == 1


BAD = [
    (RecoverConfig, "train", ("tower",)),
    (RecoverConfig, "loss", ("mse",)),
    (RecoverConfig, "fraction", (0.0, 1.5, float("nan"))),
    (RecoverConfig, "epochs", (0.0,)),
    (RecoverConfig, "max_steps", (0,)),
    (RecoverConfig, "learning_rate", (-1e-4, float("nan"), float("inf"))),
    (RecoverConfig, "batch_size", (0,)),
    (RecoverConfig, "gradient_accumulation", (0,)),
    (RecoverConfig, "lora_rank", (0,)),
    (RecoverConfig, "temperature", (0.0, -1.0)),
    (RecoverConfig, "seed", (-1, 2**32)),
    (PruneConfig, "axis", ("length",)),
    (PruneConfig, "gradient", ("mean",)),
    (PruneConfig, "allocation", ("fair",)),
    (PruneConfig, "repair", ("all",)),
    (PruneConfig, "dtype", ("int3",)),
    (PruneConfig, "samples", (0,)),
    (PruneConfig, "units", ((), ("layer",))),
]


@pytest.mark.parametrize(("kind", "field", "values"), BAD)
def test_a_bad_option_is_named(kind, field, values, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for a user
    for value in values:
        with pytest.raises(ConfigError) as refusal:
            kind(**{field: value})
        assert str(refusal.value).startswith(field)
        assert str(value) in str(refusal.value)
        assert isinstance(refusal.value, SlimError)
        if kind is PruneConfig:
            assert str(refusal.value).startswith(f"{field} {value!r} must be")


@pytest.mark.parametrize(
    ("field", "key", "value", "why"),
    [
        ("trainer", "weight_dekay", 0.1, "cannot be given. Known: weight_decay"),
        ("trainer", "output_dir", "elsewhere", "cannot be given"),
        ("trainer", "deepspeed", {}, "cannot be given"),
        ("trainer", "torch_compile_backend", "evil", "cannot be given"),
        ("trainer", "adam_beta1", 2.0, "must be a number at least 0 and below 1"),
        ("trainer", "logging_steps", 10**400, "must be a number above 0"),
        ("trainer", "weight_decay", True, "must be a number"),
        ("trainer", "optim", "evil", "must be one of: adamw_torch"),
        ("lora", "r", 8, "cannot be given. Known: lora_alpha"),
        ("lora", "target_modules", "[", "must be names, or a regular"),
        ("lora", "rank_pattern", {"q_proj": 10_000_000}, "cannot be given"),
        ("trainer", "weight_decay", "1e-2", "must be a number"),  # as YAML reads it
    ],
)
def test_keys_that_cannot_be_passed_on_are_named(field, key, value, why):
    with pytest.raises(ConfigError) as refusal:
        RecoverConfig(**{field: {key: value}})
    assert str(refusal.value).startswith(f"{field}: {key} {repr(value)[:100]}")
    assert why in str(refusal.value)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ConfigError, match=rf"{field}.*3"):
        built(RecoverConfig, {field: 3})


def test_what_is_passed_on_counts():
    decays, plain = RecoverConfig(trainer={"weight_decay": 0.1}), RecoverConfig()
    assert decays != plain
    assert len({decays, plain, RecoverConfig(trainer={"weight_decay": 0.1})}) == 2
    assert asked(decays)["trainer"] == {"weight_decay": 0.1}
    assert "trainer" not in asked(plain)
    assert built(RecoverConfig, asked(RecoverConfig())) == RecoverConfig()


def test_the_defaults_are_the_study_s_and_an_adapter_is_only_kept_where_there_is_one():
    with pytest.raises(ConfigError, match="keep_adapter True needs train 'lora', not 'full'"):
        RecoverConfig(train="full", keep_adapter=True)
    kept = RecoverConfig(train="lora", keep_adapter=True)
    with pytest.raises(ConfigError, match="keep_adapter True: compress writes merged weights"):
        CompressConfig(recover=kept)
    config = RecoverConfig()
    assert config.loss_weights == {"sft": 0.5, "hidden": 0.5}
    assert config.temperature == 2.0
    assert [RecoverConfig(fraction=value).fraction for value in (0.01, 1.0)] == [0.01, 1.0]
