"""The models of the default tier have, together, every trait of the tables of families."""

from functools import cache

import pytest

from tests import tiny
from tests.tiers import ARCHETYPES, tiered, traits

TRAITS = cache(traits)


def test_every_trait_has_an_archetype():
    covered = frozenset().union(*map(TRAITS, ARCHETYPES))
    missing = {name: sorted(TRAITS(name) - covered) for name in tiny.CONFIGS}
    assert {name: new for name, new in missing.items() if new} == {}


@pytest.mark.parametrize("name", ARCHETYPES)
def test_an_archetype_is_what_it_stands_for_and_none_is_one_too_many(name):
    assert set(ARCHETYPES[name]) <= TRAITS(name)
    others = frozenset().union(*(TRAITS(other) for other in ARCHETYPES if other != name))
    assert ARCHETYPES[name][0] not in others


def test_cases_of_other_families_are_slow():
    cases = tiered(["phi", "phi3", pytest.param("mllama", id="seen"), ("qwen2", 3)])
    assert [case.values for case in cases] == [("phi",), ("phi3",), ("mllama",), ("qwen2", 3)]
    assert [[mark.name for mark in case.marks] for case in cases] == [[], ["slow"], [], ["slow"]]
    assert [case.id for case in cases] == [None, None, "seen", None]
    assert not any(case.marks for case in tiered([1, 2], lambda number: number < 3))
