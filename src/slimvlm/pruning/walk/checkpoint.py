"""`walk_checkpoint`: the walk for checkpoints that do not fit in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimvlm.core.files import require_free
from slimvlm.core.progress import Say, silent
from slimvlm.core.requests import digest
from slimvlm.models.anatomy import LAYER_UNITS, read_anatomy
from slimvlm.models.load import device_named, digest_of_tensors
from slimvlm.planning.plan import Plan
from slimvlm.pruning.walk.distil import LocalSteps
from slimvlm.pruning.walk.layer import Steps
from slimvlm.pruning.walk.result import Walked
from slimvlm.pruning.walk.walk import plans_for, split_batches, walk_batches
from slimvlm.pruning.write_checkpoint import prune_checkpoint
from slimvlm.pruning.writers import RIDGE
from slimvlm.scoring.batches import Batch, TokenWeights
from slimvlm.scoring.criteria import DEFAULT_CRITERIA
from slimvlm.scoring.layerwise.checkpoint import open_checkpoint
from slimvlm.scoring.layerwise.score import score_by_layer
from slimvlm.scoring.layerwise.stores import Scratch, scratch_folder
from slimvlm.scoring.unit_scores import Scores


def walk_checkpoint(
    model: str | Path,
    batches: Iterable[Batch],
    out: str | Path,
    ratio: float | None = None,
    axis: str = "width",
    *,
    plan: Plan | None = None,
    scores: Scores | Sequence[Scores] = (),
    allocation: str = "balanced",
    repair: str = "auto",
    held_out: Iterable[Batch] | None = None,
    local_steps: int = 0,
    token_weights: TokenWeights | None = None,
    ridge: float = RIDGE,
    dtype: str = "auto",
    scratch: str | Path | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    say: Say = silent,
    device: str | torch.device | None = None,
    **options: Any,
) -> Walked:
    """`slimvlm.walk_` and `slimvlm.save` for a checkpoint that does not fit in memory.

    One decoder layer is in memory at a time, read from the safetensors files; on a GPU, it travels
    there. Hidden states between layers are kept where they fit (see `walk_`), new weights in a
    scratch folder; a run that was killed goes on after the last whole layer when it is started
    again with the same ``scratch``.

    Args:
        model: Folder, hub id or ``demo``; weights as safetensors.
        batches: As for `walk_`.
        out: The new folder.
        ratio: As for `walk_`.
        axis: As for `walk_`.
        plan: As for `walk_`.
        scores: As for `walk_`.
        allocation: As for `walk_`.
        repair: As for `walk_`.
        held_out: As for `walk_`.
        local_steps: As for `walk_`.
        token_weights: As for `walk_`.
        ridge: As for `walk_`.
        dtype: Data type of the weights; ``auto`` as stored.
        scratch: Folder for states; by default a temporary one, which cannot be resumed.
        force: Whether an existing folder may be replaced.
        trust_remote_code: Run code that lies in the checkpoint.
        say: Receives a line on where hidden states are kept.
        device: Where layers run; by default the accelerator if there is one, else the CPU.
        **options: Further arguments of `make_plan`.

    Returns:
        The plan and the report.

    Raises:
        SlimError: As `walk_`, `slimvlm.score_checkpoint` and `slimvlm.prune_checkpoint` do.
    """
    require_free(out, force)
    place = device_named(device)
    steps = Steps(repair=repair, ridge=ridge, local=LocalSteps(count=local_steps))
    fitted, judges = split_batches(list(batches), held_out, steps)
    given = [scores] if isinstance(scores, Scores) else list(scores)
    opened = open_checkpoint(model, dtype, trust_remote_code)
    with scratch_folder(scratch) as folder:
        noted = {
            **opened.identity,
            "batches": digest([digest_of_tensors(batch) for batch in (*fitted, *judges)]),
            "asked": repr((ratio, axis, plan, allocation, token_weights, options)),
            "scores": [digest_of_tensors(dict(_tensors_of(scores))) for scores in given],
            "steps": asdict(steps),
        }
        Scratch(folder).keep_if_same("request.json", noted)
        if plan is not None:
            plans, chooses = [plan], False
        else:

            def score_layers() -> list[Scores]:
                asked: dict[str, Any] = {DEFAULT_CRITERIA["depth"][0]: {}}
                at = folder / "scoring"
                return score_by_layer(opened, fitted, asked, token_weights, at, say, device)

            shape = read_anatomy(opened.model)
            plans, chooses = plans_for(
                shape, given, ratio, axis, allocation, score_layers, **options
            )
        how = (plans, chooses, fitted, judges, steps, token_weights, Scratch(folder / "walk"))
        walked = walk_batches(opened, place, *how, say=say)
        prune_checkpoint(
            model,
            walked.plan,
            out,
            dtype,
            force,
            trust_remote_code=trust_remote_code,
            weights=walked.weights,
        )
    return walked


def _tensors_of(scores: Scores) -> Iterator[tuple[str, Tensor]]:
    """All numbers of some scores, by name."""
    if scores.layer is not None:
        yield "layer", scores.layer
    for unit in LAYER_UNITS:
        for index, values in enumerate(scores.of(unit) or ()):
            yield f"{unit}.{index}", values
