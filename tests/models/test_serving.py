"""Rules of serving engines: what breaks in production is said before."""

from dataclasses import replace

import pytest

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


@pytest.mark.parametrize(
    ("shape", "target", "rule", "level"),
    [
        (shaped(neurons=(256, 128, 128, 128)), "vllm", "even layers", "fail"),
        (shaped(neurons=(256, 128, 128, 128)), "gguf", "even layers", "fail"),
        (shaped("qwen2", kv_heads=2), "vllm", "head_dim", "fail"),
        (shaped("internvl-qwen2", kv_heads=2), "vllm", "head_dim", "fail"),
        (shaped("phi", kv_heads=4), "sglang", "head_dim", "fail"),
        (shaped("llava-llama", kv_heads=2), "mlx", "head_dim", "fail"),
        (shaped("llava_next", kv_heads=2), "mlx", "head_dim", "fail"),
        (shaped("llava-llama"), "mlx", "pictures", "fail"),
        (shaped("phi3", kv_heads=2), "gguf", "head_dim", "fail"),
        (shaped("phi", neurons=128, kv_heads=8), "gguf", "MLP width", "fail"),
        (shaped("phi", kv_heads=8), "vllm", "model class", "warn"),
        (shaped("internvl-qwen2"), "sglang", "model class", "warn"),
        (shaped("llava-llama"), "gguf", "vision tower", "warn"),
        (shaped(kv_heads=3), "tp=2", "KV heads", "fail"),
        (shaped(kv_heads=3), "tp=4", "query heads", "fail"),
        (shaped(neurons=255), "tp=2", "MLP width", "fail"),
        (shaped(neurons=192), "tp=2", "MLP share", "warn"),
        (shaped(neurons=130), "vllm", "MLP rows", "warn"),
        (shaped(neurons=192), "sglang", "MLP width", "warn"),
        (shaped(neurons=200), "gguf", "block formats", "warn"),
        (shaped(neurons=160), "gguf", "K formats", "warn"),
        # rules that do not apply
        (shaped("llama", kv_heads=2), "vllm", "head_dim", None),
        (shaped("qwen2", kv_heads=2), "sglang", "head_dim", None),
        (shaped("phi", kv_heads=4), "vllm", "head_dim", None),
        (shaped("llama", kv_heads=2), "gguf", "head_dim", None),
        (shaped(kv_heads=1), "tp=2", "KV heads", None),
    ],
)
def test_rules_and_the_shapes_that_break_them(shape, target, rule, level):
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
