"""Verbs, options and names of an earlier version are refused with what to use instead."""

import pytest

import slimvlm as sv
from slimvlm import cli


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
    ],
)
def test_a_removed_verb_or_option_is_named(command, instead, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(command.split())
    assert stop.value.code == 2
    assert f"slimvlm: {instead}" in capsys.readouterr().err


def test_an_option_that_one_verb_lost_stays_with_another(capsys):
    with pytest.raises(SystemExit):
        cli.main(["study", "nowhere.yaml", "--out", "out", "--engine", "local"])
    assert "was removed" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["push", "verify"])
def test_a_removed_name_is_named(name):
    with pytest.raises(AttributeError, match=f"slimvlm.{name} was removed: "):
        getattr(sv, name)
