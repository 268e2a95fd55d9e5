"""The rules: complete, in order, each with its source; curves give what was measured."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimvlm.core.errors import ConfigError
from slimvlm.core.options import RecoverConfig, parse_loss
from slimvlm.runs.chart import Curve, chart_row, expected, rules, subject_of

ROOT = Path(__file__).parents[2]


@given(st.floats(0, 0.999), st.booleans())
def test_every_ratio_has_a_recipe(ratio, has_data):
    recipe = chart_row(ratio, has_data)
    assert ratio <= recipe.up_to
    assert recipe.source
    assert recipe.why
    parse_loss(recipe.loss)
    assert (recipe.train is None) == (not has_data)
    if recipe.train is not None:
        RecoverConfig(train=recipe.train, loss=recipe.loss)


def test_the_chart_is_the_studys_and_subjects_are_told_by_their_shape():
    for ratio, chart in {
        0.15: ("depth", "projector", "sft"),
        0.30: ("depth", "lora", "sft+hidden"),
        0.45: ("width", "lora", "sft+hidden"),
        0.60: ("width", "lora", "sft+hidden"),
    }.items():
        recipe, without = chart_row(ratio, True), chart_row(ratio, False)
        assert (recipe.axis, recipe.train, recipe.loss) == chart
        assert (without.axis, without.train) == ("width", None)
    for ratio in (-0.1, 1.0, 1.2, math.nan):  # the message must be ours, not an iterator's
        with pytest.raises(ConfigError, match="ratio"):
            chart_row(ratio, True)
    llava = {"model_type": "llava", "text_type": "llama", "hidden_size": 4096, "num_layers": 32}
    assert subject_of(llava) == "LLaVA-1.5-7B"
    assert subject_of({**llava, "num_layers": 20}) is None


def test_curves_are_sound_and_about_known_models():
    assert len(rules().retention) > 20
    for row in rules().retention:
        assert row.source
        page, _, section = row.source.partition(", ")
        if page.startswith("docs/"):  # a heading, or bold words, of that page
            assert section.partition(", without")[0] in (ROOT / page).read_text().lower()
        assert row.model in rules().subjects
        if row.train is not None:
            RecoverConfig(train=row.train, loss=row.loss)
    for row in rules().retention:
        assert all(0 < ratio < 1 and 0 < value <= 101 for ratio, value in row.values.items())
    few, *_, all_of_it = rules().fractions  # little data is enough up to a ratio
    assert few.up_to < 0.6 <= all_of_it.up_to
    assert few.fraction < all_of_it.fraction == 1


def test_curves_are_straight_between_silent_outside_and_the_first_row_counts():
    row = Curve(model="m", axis="width", values={0.2: 80.0, 0.4: 60.0}, source="s")
    values = [row.at(ratio) for ratio in (0.1, 0.18, 0.2, 0.4, 0.42, 0.5)]
    assert values == [None, 80, 80, 60, 60, None]
    assert row.at(0.3) == pytest.approx(70)
    rows = expected("width", "lora", "sft+hidden", 0.6, ours=False)
    found = {row.model: (value, row.source) for row, value in rows}
    assert found["LLaVA-1.5-7B"] == (78.13, "arXiv:2604.24380, Table 5")
    assert found["Bunny-3B"][0] == pytest.approx(83.86)
    full, lora = (expected("depth", train, "sft+hidden", 0.3, False) for train in ("full", "lora"))
    assert [value for _, value in full] == [value for _, value in lora]
    assert any(row.ours for row, _ in expected("width", "full", "kl+cosine", 0.3))
    assert not any(row.ours for row, _ in full)
