"""A narrower residual stream: what is cut, what it means, and that it loads back."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimvlm import cli
from slimvlm.core.errors import ConfigError, DataError, ImpossiblePlanError
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.classes import auto_class, empty_model
from slimvlm.models.families import BACKBONES
from slimvlm.models.parts import family_of, text_config_of
from slimvlm.planning.make import make_plan
from slimvlm.pruning.cut import prune_
from slimvlm.pruning.narrowing import (
    CHANNEL_CRITERIA,
    best_channels,
    narrow_,
    narrowable,
    narrowed_config,
    score_channels,
)
from tests import tiny, tiny_folder
from tests.helpers import assert_untouched, logits, random_scores, snapshot
from tests.tolerances import Tolerance, assert_close

TEXT = ["llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "cohere2"]
SEEING = [
    *("llava-llama", "llava-mistral", "llava-qwen2", "llava-qwen3", "llava-phi", "llava-phi3"),
    *("llava_next", "llava_onevision", "vipllava", "mistral3"),
    *("internvl-qwen2", "internvl-llama", "internvl-phi3", "idefics3", "smolvlm", "qwen3_vl"),
    *("cohere2_vision", "deepseek_vl", "video_llama_3", "perception_lm"),
]
LAYER_NORMS = ["phi", "llava-phi", "cohere2", "cohere2_vision"]
"""Their norms also take the mean away."""
every_model = pytest.mark.parametrize("name", [*TEXT, *SEEING])
KEPT = tuple(i for i in range(64) if i % 8 != 3)
"""56 of 64: a multiple of 8 heads."""
SUMS = Tolerance(torch.float32, 2e-5, 1e-4)

READERS = (
    r"(q|k|v|qkv|gate|up|gate_up)_proj\.weight|fc1\.weight|embed_tokens\.weight|lm_head\.weight"
)
WRITERS = r"(o|down)_proj\.(weight|bias)|(dense|fc2)\.(weight|bias)"
PROJECTORS = (
    r"(projector|aligner)\.linear_?[12]\.|readout\.[02]\.|"
    r"merger.*linear_fc2|connector.*proj\.weight|image_newline"
)
NORMS = r"(input|post_attention)_layernorm\.\w+|model\.(norm|final_layernorm)\.\w+"


@cache
def narrowed(name: str) -> PreTrainedModel:
    """Shared by the tests below, none of which changes it."""
    model = tiny.build(name)
    narrow_(model, KEPT)
    return model


def batch_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {k: v for k, v in tiny.batch(model, 24).items() if k != "labels"}


def test_every_family_that_says_so_is_tried() -> None:
    configs = [tiny.CONFIGS[name]() for name in (*TEXT, *SEEING)]
    assert {config.model_type for config in configs} >= set(narrowable())
    inside = {text_config_of(config).model_type for config in configs}
    assert {name for name, row in BACKBONES.items() if row.can_narrow} == inside


@every_model
def test_a_narrower_model_loads_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = narrowed(name)
    model.save_pretrained(tmp_path)
    loaded, report = auto_class(model.config).from_pretrained(tmp_path, output_loading_info=True)
    assert {kind: found for kind, found in report.items() if found} == {}
    batch = batch_of(model)
    assert torch.equal(logits(loaded.eval(), batch), logits(model, batch))
    assert text_config_of(loaded.config).hidden_size == 56
    assert read_anatomy(loaded) == read_anatomy(model)


@every_model
def test_what_the_configuration_predicts_is_counted(name: str) -> None:
    whole, model = tiny.build(name), narrowed(name)
    predicted = read_anatomy(empty_model(narrowed_config(whole.config, 56)))
    assert predicted == read_anatomy(model)
    assert predicted.total_params == sum(p.numel() for p in model.parameters())
    assert [s.head_dim for s in predicted.layers] == [8] * 4
    assert predicted.vision_params == read_anatomy(whole).vision_params


@every_model
def test_the_cache_changes_no_answer(name: str) -> None:
    model = narrowed(name)
    batch = batch_of(model)
    ways = [
        model.generate(**batch, max_new_tokens=5, do_sample=False, use_cache=use)
        for use in (True, False)
    ]
    assert torch.equal(*ways)


@pytest.mark.parametrize("name", TEXT)
def test_the_weights_are_those_cut_by_hand(name: str) -> None:
    kept = torch.tensor(KEPT)
    found = narrowed(name).state_dict()
    for key, value in tiny.build(name).state_dict().items():
        expected = value
        if re.search(READERS, key):
            expected = value[:, kept]
        elif re.search(WRITERS, key) or re.search(NORMS, key):
            expected = value[kept]
        assert torch.equal(found[key], expected), key


def silence_(model: PreTrainedModel, channels: Sequence[int]) -> None:
    """Let channels be zero at every token, and as many inside a projector."""
    gone = list(channels)
    text = f"{family_of(model.config.model_type).backbone}."
    for key, value in model.named_parameters():
        if key.endswith("embed_tokens.weight"):
            value.data[:, gone] = 0
        elif re.search(WRITERS if key.startswith(text) else PROJECTORS, key):
            value.data[gone] = 0


@pytest.mark.parametrize("name", [name for name in (*TEXT, *SEEING) if name not in LAYER_NORMS])
def test_a_silent_channel_only_counts_in_the_mean(name: str) -> None:
    """RMS norms divide by the mean over channels: with silent ones gone, by a larger one."""
    gone = [i for i in range(64) if i not in KEPT]
    model = tiny.build(name)
    silence_(model, gone)
    batch = batch_of(model)
    expected = logits(model, batch)
    narrow_(model, KEPT)
    assert not torch.allclose(logits(model, batch), expected, atol=0.01)
    backbone: Any = model.get_submodule(family_of(model.config.model_type).backbone)
    for key, module in backbone.named_modules():
        if re.search(r"(input|post_attention)_layernorm$|^norm$", key):
            module.weight.data *= (64 / 56) ** 0.5
            module.variance_epsilon *= 64 / 56
    assert_close(logits(model, batch), expected, SUMS)


def test_tied_heads_stay_tied() -> None:
    config = tiny.llama(tie_word_embeddings=True)
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    narrow_(model, KEPT)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert logits(model, tiny.batch(model)).shape[-1] == 128


@pytest.mark.parametrize("name", ["llama", "llava-qwen2"])
def test_a_narrower_model_is_pruned_like_any_other(name: str, tmp_path: Path) -> None:
    model = tiny.build(name)
    narrow_(model, KEPT)
    shape = read_anatomy(model)
    plan = make_plan(shape, random_scores(shape), 0.3, "both")
    prune_(model, plan)
    assert read_anatomy(model) == plan.after
    model.save_pretrained(tmp_path)
    loaded = auto_class(model.config).from_pretrained(tmp_path).eval()
    batch = batch_of(model)
    assert torch.equal(logits(loaded, batch), logits(model, batch))


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen2_5_vl", "aya_vision", "kosmos2_5"])
def test_other_families_are_refused(name: str) -> None:
    model = tiny.build(name)
    before = snapshot(model)
    with pytest.raises(ImpossiblePlanError, match=r"hidden_size of .* cannot change.*llava"):
        narrow_(model, KEPT)
    assert_untouched(model, before)


def test_sizes_that_cannot_be_are_refused() -> None:
    model = tiny.build("llama")
    before = snapshot(model)
    with pytest.raises(ImpossiblePlanError, match=r"60.*multiple of its 8 heads.*56"):
        narrow_(model, range(60))
    for channels in ([3, 2], [1, 1], [0, 64], []):
        with pytest.raises(ConfigError):
            narrow_(model, channels)
    with pytest.raises(ConfigError, match="at most 64"):
        narrowed_config(model.config, 72)
    assert_untouched(model, before)
    any_size = tiny.build("mistral")
    narrow_(any_size, range(60))
    assert text_config_of(any_size.config).hidden_size == 60


def test_activation_is_the_mean_size_after_the_norms() -> None:
    model = tiny.build("llama")
    batch = tiny.batch(model)
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    seen = [model.model.layers[i].input_layernorm(states[i]) for i in range(4)]
    seen.append(states[-1])  # after the last norm
    middle: list[Tensor] = []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_hook(lambda *call: middle.append(call[2]))
    found = score_channels(model, [batch])
    assert len(middle) == 4
    expected = sum(x.abs().mean((0, 1)) for x in [*seen, *middle])
    assert isinstance(expected, Tensor)
    assert_close(found, expected.detach(), SUMS)


def test_magnitude_is_the_norm_of_all_weights_of_a_channel() -> None:
    model = tiny.build("phi")
    total = torch.zeros(64)
    for key, value in model.named_parameters():
        if re.search(READERS, key):
            total += value.detach().square().sum(0)
        elif re.search(WRITERS, key) or re.search(NORMS, key):
            total += value.detach().reshape(64, -1).square().sum(1)
    assert_close(score_channels(model, criterion="magnitude"), total.sqrt(), SUMS)


@pytest.mark.parametrize("criterion", CHANNEL_CRITERIA)
def test_the_best_channels_stay(criterion: str) -> None:
    model = tiny.build("llava-llama")
    scores = score_channels(model, [tiny.batch(model)], criterion)
    again = score_channels(model, [tiny.batch(model)], criterion)
    assert torch.equal(scores, again)
    kept = best_channels(scores, 40)
    gone = [i for i in range(64) if i not in kept]
    assert len(kept) == 40
    assert list(kept) == sorted(kept)
    assert scores[list(kept)].min() >= scores[gone].max()


def test_scores_need_what_they_say() -> None:
    model = tiny.build("llama")
    with pytest.raises(ConfigError, match="activation, magnitude, random"):
        score_channels(model, criterion="taylor")
    with pytest.raises(DataError):
        score_channels(model, [])


def test_the_command_writes_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tiny_folder.folder("llava"), tmp_path / "narrow"
    width = text_config_of(auto_class_config(source)).hidden_size
    size = width * 3 // 4
    cli.main(["narrow", str(source), "--hidden-size", str(size), "--criterion", "magnitude",
              "--out", str(out)])  # fmt: skip
    assert f"hidden size {size}" in capsys.readouterr().out
    record = json.loads((out / "slimvlm_narrowing.json").read_text())
    assert len(record["channels"]) == size
    assert 0 < record["ratio"] < 1
    assert text_config_of(auto_class_config(out)).hidden_size == size
    with pytest.raises(SystemExit) as end:
        cli.main(["narrow", str(source), "--hidden-size", str(size), "--out", str(tmp_path / "x")])
    assert end.value.code == 2
    assert "'activation' needs --data" in capsys.readouterr().err


def test_a_ratio_counts_the_narrowing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(tiny_folder.folder("llava")), tmp_path / "small"
    whole = read_anatomy(empty_model(auto_class_config(Path(source))))
    size = whole.hidden_size * 3 // 4
    command = ["prune", source, "--criterion", "magnitude", "--hidden-size", str(size)]
    cli.main([*command, "--ratio", "0.4", "--out", str(out)])
    shape = read_anatomy(empty_model(auto_class_config(out)))
    assert shape.hidden_size == size
    assert len(json.loads((out / "slimvlm_narrowing.json").read_text())["channels"]) == size
    removed = 1 - shape.backbone_params / whole.backbone_params
    assert removed == pytest.approx(0.4, abs=0.01)
    assert f"removes {removed:.2%} of the backbone in all" in capsys.readouterr().out
    for wrong, why in (
        (["--ratio", "0.1"], "alone removes .* nothing of ratio 0.1"),
        (["--ratio", "0.4", "--low-memory"], "hidden_size .* low_memory"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main([*command, *wrong, "--out", str(tmp_path / "none")])
        assert end.value.code == 2
        assert re.search(why, capsys.readouterr().err)


def auto_class_config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)
