"""Checkpoints of a shape with random bfloat16 weights, for benchmarks of size and speed."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from slimvlm.models.load import empty_model


def write_random(config: PreTrainedConfig, out: Path) -> int:
    """Write a checkpoint, a shard at a time; shards that are there stay.

    Returns:
        Bytes of its weights.
    """
    model = empty_model(config, torch.bfloat16)
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    split = split_torch_state_dict_into_shards(state, max_shard_size="1GB")
    out.mkdir(parents=True, exist_ok=True)
    for number, (file, names) in enumerate(split.filename_to_tensors.items()):
        if (out / file).exists():
            continue
        generator = torch.Generator().manual_seed(number)
        tensors = {name: _random(state[name], generator) for name in names}
        save_file(tensors, out / f"{file}.partial", {"format": "pt"})
        (out / f"{file}.partial").rename(out / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(out)
    return sum(t.numel() * t.element_size() for t in state.values())


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    """A matrix around 0; vectors (norms, biases) do not matter here."""
    if like.ndim == 1:
        return torch.ones(like.shape, dtype=torch.bfloat16)
    return torch.empty(like.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
