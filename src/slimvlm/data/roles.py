"""Assign a role to each token of a batch: image, prompt, answer or padding. B batch, T token."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedConfig

from slimvlm.core.errors import ConfigError, raised_as

IGNORE = -100

ROLES = ("image", "prompt", "answer")
TOKEN_FIELD = re.compile(
    r"\w*token_(id|ids|index)|image_patch_id|(begin_)?suppress_tokens|(bad|force)_words_ids"
)
"""Names of the fields of configurations and modules that hold token ids."""
_PLACEHOLDER = re.compile(
    r"(image|video|audio)_(token|patch)_(id|index)|visual_indicator_token_ids"
)


def token_fields(config: Any, prefix: str = "") -> Iterator[tuple[Any, str, str, Any]]:
    """Yield owner, path, name and value of every field of a configuration that holds token ids."""
    for name, value in vars(config).items() if config is not None else ():
        if isinstance(value, PreTrainedConfig):
            yield from token_fields(value, f"{prefix}{name}.")
        elif TOKEN_FIELD.fullmatch(name) and value is not None:
            yield config, f"{prefix}{name}", name, value


def token_numbers(value: Any) -> Iterator[int]:
    """Yield the token ids in the value of such a field."""
    if isinstance(value, list | tuple):
        for each in value:
            yield from token_numbers(each)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def parse_token_weights(text: str) -> dict[str, float]:
    """Read ``image=0.1,prompt=1,answer=1``; roles that are not named weigh 1."""
    terms = [term.partition("=") for term in text.split(",")]
    with raised_as(ConfigError, ValueError, f"token_weights {text!r} must be like image=0.1"):
        weights = {role.strip(): float(value) for role, _, value in terms}
    if len(weights) < len(terms):
        raise ConfigError(f"token_weights {text!r} names a role twice")
    require_token_weights(weights)
    return weights


def require_token_weights(weights: Mapping[str, float]) -> None:
    """Refuse unknown roles, weights below 0 or infinite, and 0 for all roles."""
    for role, weight in weights.items():
        if role not in ROLES or not 0 <= weight < float("inf"):
            known = f"must be one of {', '.join(ROLES)} with a weight of 0 or more"
            raise ConfigError(f"token_weights {role}={weight} {known}")
    if not any(weights.get(role, 1.0) for role in ROLES):
        raise ConfigError(f"token_weights {dict(weights)}: one role needs a weight above 0")


def role_masks(config: Any, batch: Mapping[str, Any]) -> dict[str, Bool[Tensor, "B T"]]:
    """Find the positions of each role; in ``inputs_embeds`` all but answers is prompt."""
    valid = valid_tokens(batch).bool()
    labels: Tensor | None = batch.get("labels")
    nowhere = torch.zeros_like(valid)
    answer = nowhere if labels is None else (labels.to(valid.device) != IGNORE) & valid
    image = nowhere
    if "input_ids" in batch:
        fields = [value for *_, name, value in token_fields(config) if _PLACEHOLDER.fullmatch(name)]
        wanted = torch.tensor(list(token_numbers(fields)), dtype=torch.long)
        image = torch.isin(batch["input_ids"], wanted.to(valid.device))
        if "image_embeds_position_mask" in batch:  # Kosmos 2.5's are no tokens of their own
            image = image | (batch["image_embeds_position_mask"] > 0)
        image = image & valid & ~answer
    return {"image": image, "prompt": valid & ~answer & ~image, "answer": answer}


def token_weights(
    config: Any, batch: Mapping[str, Any], weights: Mapping[str, float] | None = None
) -> Float[Tensor, "B T"]:
    """Return the weight of every position by its role, 1 for roles not named, 0 for padding."""
    if not weights:
        return valid_tokens(batch).float()
    require_token_weights(weights)
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
