"""Run the vision tower once for student and teacher."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from slimvlm.models.hidden import replaced_forward
from slimvlm.models.parts import Parts
from slimvlm.training.teacher import equal_tensors


@contextmanager
def seeing_once(
    model: PreTrainedModel, teacher: PreTrainedModel, through_students_projector: bool = False
) -> Iterator[None]:
    """Run the vision tower for the student alone, and give the teacher its outputs.

    Each forward pass of the teacher must follow one of the student on the same batch. Where the
    towers differ, both run. ``through_students_projector`` lets the teacher use the student's
    projector, as the study's LLaVA and Bunny trainers do.
    """
    family = Parts(model).family
    with ExitStack() as stack:
        if family.vision is not None and _same_tower(model, teacher):
            for source, target in _tower_pairs(model, teacher):
                stack.enter_context(_replayed(model, source, target))
        for path in family.projector if through_students_projector else ():
            parent, _, name = path.rpartition(".")
            owner = teacher.get_submodule(parent)
            stack.callback(setattr, owner, name, getattr(owner, name, None))
            setattr(owner, name, getattr(model.get_submodule(parent), name, None))
        yield


def _same_tower(model: PreTrainedModel, teacher: PreTrainedModel) -> bool:
    """Check that both towers, but for projectors inside them, hold the same frozen values."""
    family = Parts(model).family
    ours, theirs = (
        {
            name: parameter
            for name, parameter in whole.named_parameters()
            if name.startswith(f"{family.vision}.") and not name.startswith(family.projector)
        }
        for whole in (model, teacher)
    )
    return list(ours) == list(theirs) and all(
        not ours[name].requires_grad and equal_tensors(theirs[name], ours[name]) for name in ours
    )


def _tower_pairs(
    model: PreTrainedModel, teacher: PreTrainedModel
) -> Iterator[tuple[nn.Module | None, nn.Module]]:
    """List the teacher's modules to skip: (the student's module, the teacher's in its place).

    The whole tower. If a projector sits inside it, the tower's blocks: the last one and those with
    a deepstack projector have a counterpart, the outputs of the others are never read.
    """
    family = Parts(model).family
    assert family.vision is not None
    ours, theirs = model.get_submodule(family.vision), teacher.get_submodule(family.vision)
    if not family.projector[0].startswith(f"{family.vision}."):
        yield ours, theirs
        return
    if not hasattr(ours, "blocks"):
        return
    blocks: Any = ours.get_submodule("blocks")
    read = {len(blocks) - 1, *getattr(model.config.vision_config, "deepstack_visual_indexes", ())}
    for index, block in enumerate(theirs.get_submodule("blocks").children()):
        yield (blocks[index] if index in read else None), block


@contextmanager
def _replayed(
    model: PreTrainedModel, source: nn.Module | None, target: nn.Module
) -> Iterator[None]:
    """Let ``target`` give the outputs of ``source``, call by call, or else its input."""
    if source is None:
        with replaced_forward(target, lambda hidden, *args, **kwargs: hidden):
            yield
        return
    outputs: deque[Any] = deque()
    handles = [
        source.register_forward_hook(lambda *call: outputs.append(call[2])),
        # the backward pass may have run the source again, for gradient checkpointing
        model.base_model.register_forward_pre_hook(lambda *call: outputs.clear()),
    ]
    try:
        with replaced_forward(target, lambda *args, **kwargs: outputs.popleft()):
            yield
    finally:
        for handle in handles:
            handle.remove()
