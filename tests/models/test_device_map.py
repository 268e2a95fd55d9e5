"""Calibration of a model whose weights accelerate has spread over devices and disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from slimvlm.models.hidden import head_of, hidden_states
from slimvlm.models.losses import token_cross_entropy
from slimvlm.scoring.score_model import score
from tests import tiny
from tests.tolerances import LOSS, assert_close, assert_scores_close

CASES: list[dict[str, Any]] = [
    {"criterion": "taylor", "gradient": "per_sample"},
    {"criterion": "taylor_mix"},
    {"criterion": "gate"},
    {"criterion": "activation"},
    {"criterion": "wanda"},
    {"criterion": "magnitude"},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["criterion"])
def test_weights_on_disk_give_the_same_scores(case: dict[str, Any], tmp_path: Path) -> None:
    model = tiny.build("llama")
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map={**places, "lm_head": "disk"},
        offload_folder=tmp_path / "offload",
        dtype=torch.float32,
    )
    assert spread.model.layers[1].mlp.up_proj.weight.is_meta
    batches = [tiny.batch(model, 12, 0), tiny.batch(model, 15, 1)]
    expected, found = score(model, batches, **case), score(spread, batches, **case)
    for unit in ("kv_group", "neuron"):
        for ours, theirs in zip(found.of(unit), expected.of(unit), strict=True):
            assert_scores_close(ours, theirs)


@pytest.mark.parametrize("name", ["gemma2", "llava-gemma2", "paligemma", "smolvlm"])
def test_the_loss_without_logits_is_that_of_the_models_logits(name: str) -> None:
    model = tiny.build(name)
    model.config.get_text_config().final_logit_softcapping = 0.5
    batch = tiny.batch(model)
    labels = batch.pop("labels")
    (hidden,) = hidden_states(model, batch)
    leaves = [hidden.detach().requires_grad_() for _ in range(2)]
    ours = token_cross_entropy(leaves[0], head_of(model), labels)
    theirs = of_logits(head_of(model)(leaves[1]), labels)
    assert_close(ours, theirs, LOSS)
    assert_close(ours, of_logits(model(**batch).logits, labels), LOSS)
    weights = torch.rand(ours.shape, generator=torch.Generator().manual_seed(0))
    for losses in (ours, theirs):
        (losses * weights).sum().backward()
    gradients = [leaf.grad for leaf in leaves]
    assert_close(*gradients, LOSS)  # type: ignore[arg-type]


def of_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each next token, from logits that all exist at once."""
    return F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
