"""A narrower residual stream: the same channels go from everything that reads or writes them.

Without a KV group or a neuron a model computes what it computes with that unit at zero. A channel
of the residual stream is no such unit: every norm divides by the mean over channels, so that a
model without a channel differs from one in which it is zero. No mask means the same, hence there is
no plan for it. Channels go first, and the narrower model is scored and pruned like any other.

D hidden.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from slimvlm.core.errors import ConfigError, ImpossiblePlanError
from slimvlm.core.files import write_text
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.classes import empty_model, require_full_precision
from slimvlm.models.families import BACKBONES, FAMILIES, INPUT_COLUMNS, Family
from slimvlm.models.parts import (
    backbone_of,
    decoder_layers,
    family_of,
    final_norm,
    matrices,
    text_config_of,
)
from slimvlm.pruning.cut import keep_channels_
from slimvlm.scoring.batches import BackbonePass, Batch, TokenWeights
from slimvlm.scoring.statistics import require_finite

CHANNEL_CRITERIA = ("activation", "magnitude", "random")
"""How channels can be scored."""

NARROWING_FILE = "slimvlm_narrowing.json"

_Part = tuple[Any, str, int]
"""A module, the name of its parameter, and the dimension along which channels lie."""


@dataclass(frozen=True)
class Narrowing:
    """What was done to the residual stream.

    Attributes:
        criterion: What channels were scored by.
        ratio: Share of the backbone's parameters that went.
        channels: The original indices of the channels that stayed, ascending.
    """

    criterion: str
    ratio: float
    channels: tuple[int, ...]

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint's folder, as ``slimvlm_narrowing.json``."""
        write_text(folder / NARROWING_FILE, json.dumps(asdict(self)) + "\n")

    def summary(self) -> str:
        """One line."""
        return f"hidden size {len(self.channels)}: removes {self.ratio:.2%} of the backbone"


@torch.no_grad()
def score_channels(
    model: PreTrainedModel,
    batches: Iterable[Batch] = (),
    criterion: str = "activation",
    token_weights: TokenWeights | None = None,
    seed: int = 0,
) -> Float[Tensor, " D"]:
    """How much each channel of the residual stream matters; higher = keep.

    ``activation``: ``Σ_norms mean_t |norm(x_t)_d|``, over the norms of all decoder layers and the
    last one. ``magnitude``: the L2 norm of all weights that read or write the channel. ``random``.

    Args:
        model: The model.
        batches: Model inputs, for ``activation``.
        criterion: One of `CHANNEL_CRITERIA`.
        token_weights: Weight of each token by its role, as for `slimvlm.score`.
        seed: For ``random``.

    Raises:
        ConfigError: If the criterion is unknown.
        DataError: If ``activation`` is given no batch.
        NumericalError: If a norm gives NaN or infinity.

    Reference:
        Muralidharan et al. 2024, Compact Language Models via Pruning and Knowledge Distillation
        (Minitron), arXiv:2407.14679, Sec. 2.2, with the mean absolute value over all tokens.
    """
    if criterion not in CHANNEL_CRITERIA:
        raise ConfigError(f"criterion {criterion!r} must be one of: {', '.join(CHANNEL_CRITERIA)}")
    width = text_config_of(model.config).hidden_size
    if criterion == "random":
        return torch.rand(width, generator=torch.Generator().manual_seed(seed))
    if criterion == "activation":
        return _mean_activations(model, batches, token_weights)
    total = torch.zeros(width, dtype=torch.float64)
    for owner, name, dim in _parts(model):
        weight = getattr(owner, name).detach().double().movedim(dim, 0)
        total += weight.reshape(width, -1).square().sum(1).cpu()
    return total.sqrt().float()


def best_channels(scores: Float[Tensor, " D"], hidden_size: int) -> tuple[int, ...]:
    """The indices of the highest scores, ascending; of equal ones the later stay."""
    order = torch.argsort(scores, stable=True).tolist()
    return tuple(sorted(order[len(order) - hidden_size :]))


def narrowed_config(config: PreTrainedConfig, hidden_size: int) -> PreTrainedConfig:
    """The configuration of the model with a narrower residual stream; the given one is left alone.

    Args:
        config: Of the whole model.
        hidden_size: Channels to keep.

    Raises:
        ConfigError: If the number is out of range.
        ImpossiblePlanError: If the configuration class cannot express it, or the family is not
            known to load with another hidden size.
    """
    _require_narrowable(config, hidden_size)
    new = copy.deepcopy(config)
    _set_hidden_size(new, hidden_size)
    try:
        return type(config).from_dict(new.to_dict())
    except (StrictDataclassError, ValueError) as error:
        why = str(error).strip().splitlines()[-1]
        raise ImpossiblePlanError(
            f"hidden_size {hidden_size}: {config.model_type!r} cannot be configured with it ({why})"
        ) from error


@torch.no_grad()
def narrow_(model: PreTrainedModel, channels: Sequence[int]) -> None:
    """Keep some channels of the residual stream, in place: embedding, layers, norms and head.

    The projector writes the kept channels. Where its inner width is the hidden size, too (LLaVA,
    InternVL), as many inner channels stay, those with the largest product of the norms of the
    weights that write and read them. ``head_dim`` stays and is written out.

    A narrower model is another function than the original with these channels at zero, since norms
    divide by the mean over channels; recover it. The new configuration is checked before any weight
    is touched.

    Args:
        model: A transformers model.
        channels: Sorted indices of the channels to keep, such as `best_channels` gives.

    Raises:
        ConfigError: If the channels are not sorted, unique and in range, or weights are quantised.
        ImpossiblePlanError: If the family cannot have this hidden size.
    """
    require_full_precision(model.config, "narrowed")
    config, width = model.config, text_config_of(model.config).hidden_size
    in_range = all(0 <= channel < width for channel in channels)
    if not in_range or list(channels) != sorted(set(channels)):
        raise ConfigError(f"channels must be sorted, unique and below {width}")
    new = narrowed_config(config, len(channels))
    parts, inner = list(_parts(model)), _inner_parts(model)
    _require_shapes(model, [*parts, *inner], new)
    is_tied = _is_tied(model)
    if inner:
        lesser = _kept_inside(model, len(channels))
        for part in inner:
            keep_channels_(*part, lesser)
    for part in parts:
        keep_channels_(*part, torch.tensor(channels))
    head: Any = model.get_submodule(family_of(config.model_type).head)
    if is_tied:
        head.weight = _embedding(model).weight
        head.in_features = len(channels)
    for module in model.get_submodule(family_of(config.model_type).backbone).modules():
        if vars(module).get("hidden_size") == width:
            setattr(module, "hidden_size", len(channels))  # noqa: B010
    _set_hidden_size(config, len(channels))


def narrow_to_(
    model: PreTrainedModel,
    hidden_size: int,
    batches: Iterable[Batch] = (),
    criterion: str = "activation",
    token_weights: TokenWeights | None = None,
    seed: int = 0,
) -> Narrowing:
    """Score the channels and keep the best, in place.

    Args:
        model: A transformers model.
        hidden_size: Channels to keep.
        batches: As for `score_channels`, like the other arguments.
        criterion: One of `CHANNEL_CRITERIA`.
        token_weights: Weight of each token by its role.
        seed: For ``random``.

    Raises:
        SlimError: As `score_channels` and `narrow_`; the size is checked before anything is scored.
    """
    ratio = narrowing_ratio(model.config, hidden_size)
    scores = score_channels(model, batches, criterion, token_weights, seed)
    channels = best_channels(scores, hidden_size)
    narrow_(model, channels)
    return Narrowing(criterion, ratio, channels)


def narrowing_ratio(config: PreTrainedConfig, hidden_size: int) -> float:
    """Share of the backbone's parameters that goes with a smaller hidden size.

    Raises:
        SlimError: If the model cannot have it, as `narrowed_config`.
    """
    narrow = narrowed_config(config, hidden_size)
    whole, rest = (read_anatomy(empty_model(c)).backbone_params for c in (config, narrow))
    return (whole - rest) / whole


def narrowable() -> list[str]:
    """The model types whose residual stream can be narrowed, if their language model's can."""
    return sorted(name for name, family in FAMILIES.items() if _knows_writers(name, family))


def _knows_writers(name: str, family: Family) -> bool:
    return bool(family.residual_writers) or (name in BACKBONES and BACKBONES[name].can_narrow)


def _require_narrowable(config: Any, hidden_size: int) -> None:
    row, text_config = backbone_of(config), text_config_of(config)
    if not row.can_narrow or not _knows_writers(config.model_type, family_of(config.model_type)):
        texts = ", ".join(sorted(name for name, row in BACKBONES.items() if row.can_narrow))
        raise ImpossiblePlanError(
            f"hidden_size of {text_config.model_type!r} in {config.model_type!r} cannot change; it "
            f"can for the language models {texts} in {', '.join(narrowable())}"
        )
    width, heads = text_config.hidden_size, text_config.num_attention_heads
    if not 1 <= hidden_size <= width:
        raise ConfigError(f"hidden_size {hidden_size} must be at least 1 and at most {width}")
    if row.head_rule == "divides_hidden_size" and hidden_size % heads:
        lower = hidden_size // heads * heads
        near = ", ".join(str(size) for size in (lower, lower + heads) if 0 < size < width)
        raise ImpossiblePlanError(
            f"hidden_size {hidden_size}: {text_config.model_type!r} needs a multiple of its "
            f"{heads} heads, such as {near}"
        )


def _set_hidden_size(config: Any, hidden_size: int) -> None:
    text_config = text_config_of(config)
    head_dim = getattr(text_config, "head_dim", None)
    text_config.head_dim = head_dim or text_config.hidden_size // text_config.num_attention_heads
    text_config.hidden_size = hidden_size
    for path in family_of(config.model_type).hidden_fields:
        part, _, name = path.partition(".")
        setattr(getattr(config, part), name, hidden_size)


def _mean_activations(
    model: PreTrainedModel, batches: Iterable[Batch], token_weights: TokenWeights | None
) -> Float[Tensor, " D"]:
    seen = BackbonePass()
    total = torch.zeros(text_config_of(model.config).hidden_size, dtype=torch.float64)

    def on_norm(module: nn.Module, args: Any, output: Tensor) -> None:
        values = output.float().abs().flatten(0, -2)
        require_finite(values, "the output of a norm")
        total.add_((values * seen.row_weights(values)).sum(0, dtype=torch.float64).cpu())

    handles = [norm.register_forward_hook(on_norm) for norm in _norms(model)]
    try:
        seen.run(model, batches, token_weights)
    finally:
        for handle in handles:
            handle.remove()
    return (total / seen.weight).float()


def _norms(model: PreTrainedModel) -> list[nn.Module]:
    """The norms that read the whole residual stream."""
    width = text_config_of(model.config).hidden_size
    children = [child for layer in decoder_layers(model) for child in layer.children()]
    is_norm = [{p.shape for p in child.parameters()} == {(width,)} for child in children]
    return [*(c for c, yes in zip(children, is_norm, strict=True) if yes), final_norm(model)]


def _parts(model: PreTrainedModel) -> Iterator[_Part]:
    """Every parameter along a dimension of which the channels lie, a tied one once."""
    yield _embedding(model), "weight", 1
    if not _is_tied(model):
        yield model.get_submodule(family_of(model.config.model_type).head), "weight", 1
    for norm in _norms(model):
        yield from ((norm, name, 0) for name, _ in norm.named_parameters())
    for _, matrix in matrices(model):
        writes = matrix.projection.dim == INPUT_COLUMNS
        yield matrix.owner, matrix.name, 0 if writes else 1
        if writes and matrix.bias is not None:
            yield matrix.owner, "bias", 0
    for pattern in family_of(model.config.model_type).residual_writers:
        for name, _ in model.named_parameters():
            if fnmatchcase(name, pattern):
                owner, _, parameter = name.rpartition(".")
                yield model.get_submodule(owner), parameter, 0


def _inner_parts(model: PreTrainedModel) -> list[_Part]:
    """The parameters inside a projector whose inner width is the hidden size."""
    paths = family_of(model.config.model_type).inner_projector
    if paths is None:
        return []
    first, second = map(model.get_submodule, paths)
    biases: list[_Part] = [] if first.bias is None else [(first, "bias", 0)]
    return [(first, "weight", 0), *biases, (second, "weight", 1)]


def _kept_inside(model: PreTrainedModel, count: int) -> Tensor:
    """The inner channels of a projector that carry most."""
    (first, *_), *_, (second, *_) = _inner_parts(model)
    written, read = first.weight.float().norm(dim=1), second.weight.float().norm(dim=0)
    return torch.tensor(best_channels((written * read).cpu(), count))


def _require_shapes(model: PreTrainedModel, parts: Sequence[_Part], config: Any) -> None:
    """What will be cut must be what the new configuration builds.

    Raises:
        ImpossiblePlanError: If a parameter would have another shape.
    """
    count = text_config_of(config).hidden_size
    dims: dict[int, list[int]] = {}
    for owner, name, dim in parts:
        dims.setdefault(id(getattr(owner, name)), []).append(dim)
    expected = {name: p.shape for name, p in empty_model(config).named_parameters()}
    for name, parameter in model.named_parameters():
        shape = list(parameter.shape)
        for dim in dims.get(id(parameter), []):
            shape[dim] = count
        if shape != list(expected[name]):
            raise ImpossiblePlanError(
                f"hidden_size {count}: {name!r} of {config.model_type!r} would have shape {shape}, "
                f"but the configuration builds {list(expected[name])}"
            )


def _embedding(model: PreTrainedModel) -> Any:
    text_model = model.get_submodule(family_of(model.config.model_type).backbone)
    return text_model.get_submodule("embed_tokens")


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_submodule(family_of(model.config.model_type).head)
    return head.weight is _embedding(model).weight
