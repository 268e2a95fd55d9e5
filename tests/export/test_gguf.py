"""The language backbone alone, and what llama.cpp cannot run of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

from slimvlm.core.errors import ConfigError
from slimvlm.export.gguf import backbone_alone, export_gguf
from slimvlm.models.anatomy import read_anatomy
from slimvlm.pruning.cut import prune_
from tests import tiny
from tests.handmade import logits, plan_by_hand


@pytest.mark.parametrize("family", ["llava-llama", "internvl-phi3", "smolvlm", "llava_onevision"])
def test_the_backbone_alone_says_what_the_whole_model_says_about_text(
    family: str, tmp_path: Path
) -> None:
    model = tiny.build(family)
    prune_(model, plan_by_hand(read_anatomy(model), layers=(0, 2), neurons=range(50)))
    backbone_alone(model).save_pretrained(tmp_path)
    alone = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = {"input_ids": torch.randint(32, 64, (1, 9))}
    assert torch.equal(logits(alone, batch), logits(model, batch))


def test_what_llama_cpp_cannot_run_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    model = tiny.build("phi")
    prune_(model, plan_by_hand(read_anatomy(model), neurons=range(64)))
    model.config.save_pretrained(tmp_path / "model")  # no weights at all
    with pytest.raises(ConfigError, match=r"gguf: MLP width: 64 neurons. .* prune layers only"):
        export_gguf(tmp_path / "model", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
