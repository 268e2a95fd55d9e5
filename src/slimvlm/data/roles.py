"""Assign a role to each token of a batch: image, prompt, answer or padding. B batch, T token."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from slimvlm.core.errors import ConfigError

IGNORE = -100

ROLES = ("image", "prompt", "answer")
_IMAGE_TOKEN_FIELDS = ("image_token_id", "image_token_index", "video_token_id")


def parse_token_weights(text: str) -> dict[str, float]:
    """Read ``image=0.1,prompt=1,answer=1``; roles that are not named weigh 1."""
    weights: dict[str, float] = {}
    for term in text.split(","):
        role, _, value = (part.strip() for part in term.partition("="))
        try:
            weight = float(value)
        except ValueError:
            weight = -1.0
        if role not in ROLES or role in weights or not 0 <= weight < float("inf"):
            raise ConfigError(
                f"token_weights {text!r}: term {term.strip()!r} must be one of {', '.join(ROLES)}, "
                "once, with a weight of 0 or more, such as image=0.1"
            )
        weights[role] = weight
    if not any(weights.get(role, 1.0) for role in ROLES):
        raise ConfigError(f"token_weights {text!r}: one role at least needs a weight above 0")
    return weights


def role_masks(config: Any, batch: Mapping[str, Any]) -> dict[str, Bool[Tensor, "B T"]]:
    """Find the positions of each role; in ``inputs_embeds`` all but answers is prompt."""
    valid = valid_tokens(batch).bool()
    labels: Tensor | None = batch.get("labels")
    nowhere = torch.zeros_like(valid)
    answer = nowhere if labels is None else (labels.to(valid.device) != IGNORE) & valid
    image = nowhere
    if "input_ids" in batch:
        ids = [getattr(config, name, None) for name in _IMAGE_TOKEN_FIELDS]
        wanted = torch.tensor([i for i in ids if i is not None], dtype=torch.long)
        image = torch.isin(batch["input_ids"], wanted.to(valid.device)) & valid & ~answer
    return {"image": image, "prompt": valid & ~answer & ~image, "answer": answer}


def token_weights(
    config: Any, batch: Mapping[str, Any], weights: Mapping[str, float] | None = None
) -> Float[Tensor, "B T"]:
    """Return the weight of every position by its role, 1 for roles not named, 0 for padding."""
    unknown = set(weights or ()) - set(ROLES)
    if unknown:
        raise ConfigError(f"token role {unknown.pop()!r} must be one of: {', '.join(ROLES)}")
    if not weights:
        return valid_tokens(batch).float()
    masks = role_masks(config, batch)
    return torch.stack([masks[r].float() * weights.get(r, 1.0) for r in ROLES]).sum(0)


def predicts_label(labels: Tensor) -> Bool[Tensor, "B T"]:
    """Return the positions that predict a label: one before each."""
    predicts = torch.zeros_like(labels, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != IGNORE
    return predicts


def valid_tokens(batch: Mapping[str, Any]) -> Tensor:
    """Return the attention mask, or ones."""
    mask: Tensor | None = batch.get("attention_mask")
    if mask is not None:
        return mask
    tokens: Tensor = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"]
    return torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
