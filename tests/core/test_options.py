"""Options say what is wrong with them, by name."""

from pathlib import Path

import jaxtyping
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from slimvlm.core.documents import asked, built
from slimvlm.core.errors import ConfigError, SlimError
from slimvlm.core.options import LOSS_NAMES, CompressConfig, PruneConfig, RecoverConfig, parse_loss

TABLE = yaml.safe_load(Path(__file__).with_name("options.yaml").read_text())


@pytest.mark.parametrize(("expression", "weights"), TABLE["losses"])
def test_a_loss_is_a_weighted_sum(expression, weights):
    assert parse_loss(expression) == pytest.approx(weights)


@pytest.mark.parametrize(("expression", "named"), TABLE["bad_losses"])
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
    (kind, *row)
    for kind, name in ((RecoverConfig, "recovery"), (PruneConfig, "pruning"))
    for row in TABLE[name].items()
]


@pytest.mark.parametrize(("kind", "field", "values"), BAD)
def test_a_bad_option_is_named(kind, field, values, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for a user
    for value in values:
        value = tuple(value) if isinstance(value, list) else value
        with pytest.raises(ConfigError) as refusal:
            kind(**{field: value})
        assert str(refusal.value).startswith(field)
        assert str(value) in str(refusal.value)
        assert isinstance(refusal.value, SlimError)
        if kind is PruneConfig:
            assert str(refusal.value).startswith(f"{field} {value!r} must be")


HUGE = "trainer", "logging_steps", 10**400, "must be a number above 0"


@pytest.mark.parametrize(("field", "key", "value", "why"), [*TABLE["passed_on"], HUGE])
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
