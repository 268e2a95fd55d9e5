"""Verbs, options and names of an earlier version are refused with what to use instead."""

import pytest

import slimvlm as sv
from tests.handmade import refused


@pytest.mark.parametrize(
    ("command", "instead"),
    [
        ("cache-teacher demo", "cache-teacher was removed: a teacher in memory shares"),
        ("recover demo --kd-on text", "--kd-on was removed: the loss decides"),
        ("recover demo --samples 3", "--samples was removed: --fraction or --max-steps"),
        ("push run OWNER/NAME", "push was removed: hf upload"),
        ("verify run", "verify was removed: every checkpoint is read back"),
        ("bench demo --engine vllm", "--engine was removed: time engines with"),
        ("export demo --check vllm --run", "--run was removed: serve the checkpoint"),
        ("study nowhere.yaml --out out --engine local", "study 'nowhere.yaml'"),  # has it still
    ],
)
def test_a_removed_verb_or_option_is_named(command, instead):
    told = refused(*command.split())
    assert told.startswith(f"slimvlm: {instead}")
    assert ("was removed" in told) == ("study" not in command)


@pytest.mark.parametrize("name", ["push", "verify"])
def test_a_removed_name_is_named(name):
    with pytest.raises(AttributeError, match=f"slimvlm.{name} was removed: "):
        getattr(sv, name)
