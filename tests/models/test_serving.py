"""Rules of serving engines: what breaks in production is said before."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from slimvlm.core.errors import ConfigError
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.cost import slow_widths
from slimvlm.models.serving import ENGINES, RULES, TENSOR_PARALLEL, check
from tests import tiny


def shaped(family="llama", neurons=256, kv_heads=4, hidden=64):
    """A tiny model's anatomy with other counts in its layers."""
    shape = read_anatomy(tiny.build(family))
    widths = [neurons] * shape.num_layers if isinstance(neurons, int) else list(neurons)
    layers = [
        replace(layer, intermediate_size=width, num_kv_heads=kv_heads)
        for layer, width in zip(shape.layers, widths, strict=True)
    ]
    return replace(shape.with_layers(layers), hidden_size=hidden)


def broken(shape, target, is_quantized=False):
    """Rules that do not hold, and what that means."""
    found = check(shape, [target], is_quantized)
    return {f.rule: f.level for f in found if f.level != "ok"}


def test_a_plain_even_llama_is_ok_where_it_was_run_and_only_there():
    assert broken(shaped(hidden=256), "vllm") == {}
    assert all(not f.advice and f.seen for f in check(shaped(hidden=256), ["vllm"]))
    for target in ("sglang", "mlx", "tp=2"):
        assert set(broken(shaped(hidden=256), target).values()) == {"unknown"}


TABLE = yaml.safe_load(Path(__file__).with_name("serving.yaml").read_text())


@pytest.mark.parametrize(("changes", "target", "rule", "level"), TABLE)
def test_rules_and_the_shapes_that_break_them(changes, target, rule, level):
    shape = shaped(**changes)
    assert broken(shape, target).get(rule) in ((level,) if level else (None, "unknown"))
    assert all(f.advice for f in check(shape, [target]) if f.level in ("warn", "fail"))


def test_every_rule_can_break_quantised_weights_and_slow_widths_are_told():
    assert {t for rule in RULES for t in rule.targets} == {*ENGINES, TENSOR_PARALLEL}
    assert all(rule.advice and rule.level != "ok" for rule in RULES)
    assert broken(shaped(), "gguf", is_quantized=True)["unquantised"] == "fail"
    assert broken(shaped(), "vllm", is_quantized=True)["quantised weights"] == "warn"
    assert slow_widths(shaped(neurons=128)) == []
    (off_tiles,) = slow_widths(shaped(neurons=96))
    assert off_tiles.startswith("96 neurons: no multiple of 64, the tile of matrix kernels")
    (off_rows,) = slow_widths(shaped(neurons=77))
    assert off_rows.startswith("77 neurons: rows end off a 16-byte boundary")


@pytest.mark.parametrize("target", ["ollama", "tp", "tp=0", "tp=x"])
def test_an_unknown_target_is_refused(target):
    with pytest.raises(
        ConfigError, match=r"check .* of: vllm, sglang, gguf, openvino, onnx, mlx, tp=N"
    ):
        check(shaped(), [target])
