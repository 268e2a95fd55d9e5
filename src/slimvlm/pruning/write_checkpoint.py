"""Write the pruned checkpoint tensor by tensor, cut out of the original's files."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from slimvlm.core.errors import ReloadError
from slimvlm.core.files import mark_checkpoint, new_folder, require_free
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.classes import empty_model
from slimvlm.models.files import write_weights
from slimvlm.models.load import load_processor
from slimvlm.planning.plan import Plan
from slimvlm.pruning.card import CardFacts
from slimvlm.pruning.cut import Cut, cuts_of, prune_
from slimvlm.pruning.layout import lay_out
from slimvlm.pruning.save import write_beside_weights
from slimvlm.pruning.tokens import trimmed_processor
from slimvlm.pruning.walk.result import Weights
from slimvlm.scoring.layerwise.checkpoint import LazyCheckpoint, open_checkpoint

SHARD_BYTES = 10**9
"""Largest weight file: what is in memory while it is written."""
_COMPARED = 24


def prune_checkpoint(
    model: str | Path,
    plan: Plan,
    out: str | Path,
    dtype: str = "auto",
    force: bool = False,
    allow_uneven: bool = False,
    trust_remote_code: bool = False,
    weights: Weights = MappingProxyType({}),
    describe: Callable[[Path], str] | None = None,
) -> None:
    """`slimvlm.prune_` and `slimvlm.save` for a checkpoint that does not fit in memory.

    Each tensor is cut out of the original's safetensors files when its turn to be written comes, so
    that one weight file of the new checkpoint (1 GB) is in memory at a time. The folder is the same
    as `slimvlm.save` writes, in more files. It is read back before it takes its name: every
    name and shape is compared with the configuration, some tensors bit by bit.

    Args:
        model: Folder, hub id or ``demo``; weights as safetensors.
        plan: Made for this model's anatomy.
        out: The new folder.
        dtype: Data type to write; ``auto`` as stored.
        force: Whether an existing folder may be replaced.
        allow_uneven: As for `slimvlm.prune_`.
        trust_remote_code: Run code that lies in the checkpoint.
        weights: Parameters that are no slices of the original's, as a walk gives them.
        describe: Looks at the written files, and returns what the model card says was kept.

    Raises:
        ConfigError: If the folder exists, the plan is for another model, or files cannot be read.
        ImpossiblePlanError: If the configuration class cannot express the shape.
        ReloadError: If what was written does not read back.
        NumericalError: If a weight is NaN or infinite, or becomes so in the data type.
    """
    require_free(out, force)
    checkpoint = open_checkpoint(model, dtype, trust_remote_code)
    processor = load_processor(str(checkpoint.folder), checkpoint.model.config, trust_remote_code)
    processor = trimmed_processor(processor, plan)
    smaller = _smaller(checkpoint, plan, allow_uneven)
    kept = _KeptWeights(checkpoint, smaller, plan, weights)
    with new_folder(out, force) as folder:
        write_weights(smaller, kept, folder, SHARD_BYTES)
        lay_out(folder, smaller.config)
        _check(folder, dtype, kept)
        facts = CardFacts(
            base=checkpoint.model.config._name_or_path,
            name=Path(out).name,
            held_out="" if describe is None else describe(folder),
        )
        write_beside_weights(folder, smaller, processor, plan, facts)
        mark_checkpoint(folder)


def _smaller(checkpoint: LazyCheckpoint, plan: Plan, allow_uneven: bool) -> PreTrainedModel:
    """The pruned model without weights, as `prune_` makes it."""
    model = empty_model(checkpoint.model.config, checkpoint.model.dtype)
    model._weight_conversions = checkpoint.model._weight_conversions
    if (checkpoint.folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    prune_(model, plan, allow_uneven)
    return model


class _KeptWeights(Mapping[str, Tensor]):
    """The pruned model's parameters by name, cut when asked for."""

    def __init__(
        self, checkpoint: LazyCheckpoint, smaller: PreTrainedModel, plan: Plan, weights: Weights
    ) -> None:
        self.checkpoint, self.plan, self.weights = checkpoint, plan, weights
        self.names = list(smaller.state_dict())
        names = {id(module): name for name, module in checkpoint.model.named_modules()}
        self.cuts: dict[str, list[Cut]] = defaultdict(list)
        for cut in cuts_of(checkpoint.model, plan):
            self.cuts[f"{names[id(cut.owner)]}.{cut.name}"].append(cut)
        self.layers = f"{plan.before.family.backbone}.layers"

    def __getitem__(self, name: str) -> Tensor:
        match = re.fullmatch(rf"{re.escape(self.layers)}\.(\d+)\.(.+)", name)
        if match is None:
            return self._cut(name)
        place = self.plan.layers[int(match[1])], match[2]
        if place in self.weights:
            return self.weights[place].to(self.checkpoint.model.dtype)
        return self._cut(f"{self.layers}.{place[0]}.{place[1]}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def _cut(self, original: str) -> Tensor:
        tensor: Tensor = self.checkpoint.weights[original]
        for cut in self.cuts.get(original, ()):
            tensor = tensor.index_select(cut.dim, cut.keep)
        return tensor


def _check(folder: Path, dtype: str, kept: _KeptWeights) -> None:
    """Read a written folder back: all names and shapes, and the bits of some tensors.

    Raises:
        ReloadError: If anything is missing, left over or different.
    """
    again = open_checkpoint(folder, dtype)
    if again.unused:
        raise ReloadError(f"{str(folder)!r} holds weights that nothing reads: {again.unused[:3]}")
    found, planned = read_anatomy(again.model), kept.plan.after
    if (found.layers, found.backbone_params) != (planned.layers, planned.backbone_params):
        raise ReloadError(f"{str(folder)!r} has other shapes than the plan says")
    chosen = random.Random(0).sample(kept.names, min(_COMPARED, len(kept.names)))
    for name in chosen:
        if not torch.equal(again.weights[name], kept[name]):
            raise ReloadError(f"{str(folder)!r}: {name!r} reads back differently")
