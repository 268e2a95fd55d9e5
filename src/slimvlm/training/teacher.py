"""Share the student's frozen weights and encoded images with its teacher.

A pruned student is its teacher with layers and units missing. So the teacher can read the
student's frozen weights and needs memory for the missing ones alone. Adapters are apart from the
student's weights, and the teacher never sees them. The vision tower runs once for both.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from slimvlm.models.anatomy import channels_of, read_anatomy, segments, unit_of
from slimvlm.models.families import INPUT_COLUMNS, OUTPUT_ROWS
from slimvlm.models.hidden import evaluating, frozen, is_sharded, replaced_forward
from slimvlm.models.parts import Parts
from slimvlm.planning.plan import Plan
from slimvlm.training.trainer import plain_model


@dataclass(frozen=True)
class Sharing:
    """Count how much of a teacher is the student's memory."""

    shared_params: int
    own_params: int  # pruned, or trainable in the student, or different
    differing: tuple[str, ...] = ()  # teacher's tensors, frozen in the student with other values


class Joined(nn.Module):
    """A projection in two parts: units that the student kept, and those that were removed.

    A projection into units (``sizes`` has both numbers of channels of each segment) joins the
    outputs of both parts segment by segment, which merely permutes the teacher's units: the
    projection out of them reads the same order, ``y = W_kept x_kept + W_removed x_removed + b``.
    """

    def __init__(
        self,
        kept: nn.Linear,
        removed: nn.Linear,
        bias: nn.Parameter | None = None,
        sizes: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__()
        self.kept, self.removed, self.bias = kept, removed, bias
        self._sizes = [list(both) for both in zip(*sizes, strict=True)]

    def forward(self, inputs: Float[Tensor, "*B D"]) -> Float[Tensor, "*B U"]:
        """Multiply by both parts, and join or add the outputs."""
        if not self._sizes:
            kept, removed = inputs.split([self.kept.in_features, self.removed.in_features], -1)
            of_kept = F.linear(kept, self.kept.weight, self.bias)
            return of_kept + F.linear(removed, self.removed.weight)
        outputs = (self.kept(inputs), self.removed(inputs))
        parts = (out.split(sizes, -1) for out, sizes in zip(outputs, self._sizes, strict=True))
        return torch.cat([part for pair in zip(*parts, strict=True) for part in pair], -1)


@contextmanager
def teaching(
    teacher: PreTrainedModel,
    model: PreTrainedModel,
    trained: Any,
    plan: Plan | None,
    device: torch.device,
    through_students_projector: bool,
) -> Iterator[str]:
    """Prepare a teacher on a device, by `share_` if there is a plan; yield a line on its memory."""
    with evaluating(teacher), frozen(teacher), ExitStack() as stack:
        if is_sharded(model):
            yield "separate, sharded"
            return
        told = "separate"
        if plan is not None:
            sharing = share_(teacher, trained, plan)
            stack.callback(nn.Module.to, teacher, "meta")
            share = sharing.shared_params / (sharing.shared_params + sharing.own_params)
            told = f"the teacher shares {share:.0%} of its weights with the model"
            if sharing.differing:
                first, *others = sharing.differing
                more = f" and {len(others)} more" * bool(others)
                told += f"; copied are {first!r}{more}, which differ"
        teacher.to(device)  # type: ignore[arg-type]
        stack.enter_context(seeing_once(model, teacher, through_students_projector))
        yield told


def plan_fits(plan: Plan, model: PreTrainedModel, teacher: PreTrainedModel) -> bool:
    """Check that a plan is for the teacher's shapes and leaves the model's."""
    pairs = ((teacher, plan.before), (model, plan.after))
    shapes = ((read_anatomy(whole), expected) for whole, expected in pairs)
    return all((a.hidden_size, a.layers) == (b.hidden_size, b.layers) for a, b in shapes)


@torch.no_grad()
def share_(teacher: PreTrainedModel, trained: Any, plan: Plan) -> Sharing:
    """Let a teacher read the student's weights where they are frozen and equal, value by value."""
    student = plain_model(trained)
    as_read = {parameter.data_ptr() for parameter in teacher.parameters()}
    family, ours = plan.before.family, dict[str, Tensor]()
    prefix = f"{family.backbone}.layers."
    for name, parameter in student.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:  # under the name that it has in the teacher
            name = name.replace(".base_layer.", ".")
            if name.startswith(prefix):
                index, _, rest = name.removeprefix(prefix).partition(".")
                name = f"{prefix}{plan.layers[int(index)]}.{rest}"
            ours[name] = parameter.data
    differing = list(_share_cut_matrices(teacher, plan, ours))
    # rows of tokens stay the teacher's own where the student has fewer of them
    apart = () if plan.tokens is None else (f"{family.backbone}.embed_tokens.", f"{family.head}.")
    for name, parameter in teacher.named_parameters():
        if name in ours and not name.startswith(apart):
            if equal_tensors(parameter, ours[name]):
                parameter.data = ours[name]
            else:
                differing.append(name)
    teacher.requires_grad_(False).to(student.device)  # type: ignore[arg-type]
    memory = {parameter.data_ptr() for parameter in student.parameters()}
    own = [p for p in teacher.parameters() if p.data_ptr() not in memory]
    for parameter in own:
        if parameter.data_ptr() in as_read:  # one tensor of a mapped file would keep all its pages
            parameter.data = parameter.data.clone()
    own_params = sum(parameter.numel() for parameter in own)
    total = sum(parameter.numel() for parameter in teacher.parameters())
    return Sharing(total - own_params, own_params, tuple(differing))


def _share_cut_matrices(
    teacher: PreTrainedModel, plan: Plan, ours: dict[str, Tensor]
) -> Iterator[str]:
    """Divide or reorder what a plan cuts; yield frozen matrices of the student that differ."""
    for index, projection, linear in list(Parts(teacher).projections()):
        if index not in plan.layers:
            continue
        dim, shape, device = projection.dim, plan.before.layers[index], linear.weight.device
        units = plan.kept(unit_of(projection))[index]
        lost = sorted({*range(shape.block(projection.segments[0])[0])} - {*units})
        kept, removed = (
            channels_of(projection, shape, some)
            .to(device)
            .split([len(some) * width for *_, width in segments(projection, shape)])
            for some in (units, lost)
        )
        if not any(len(part) for part in removed):
            continue
        keep, rest = torch.cat(kept), torch.cat(removed)
        path = f"{plan.before.family.backbone}.layers.{index}.{projection.path}"
        weight = ours.pop(f"{path}.weight", None)
        bias = ours.pop(f"{path}.bias", None) if dim == OUTPUT_ROWS else None
        their_bias = linear.bias if dim == OUTPUT_ROWS else None
        if (
            weight is not None
            and equal_tensors(linear.weight.index_select(dim, keep), weight)
            and (bias is None) == (their_bias is None)
            and (bias is None or equal_tensors(linear.bias[keep], bias))
        ):
            others = linear.weight.index_select(dim, rest).to(weight.device)
            if dim == INPUT_COLUMNS:
                joined = Joined(_frozen(weight), _frozen(others), linear.bias)
            else:
                rest_bias = None if bias is None else linear.bias[rest].to(weight.device)
                sizes = [(len(k), len(r)) for k, r in zip(kept, removed, strict=True)]
                parts = (_frozen(weight, bias), _frozen(others, rest_bias))
                joined = Joined(*parts, sizes=sizes)
            teacher.set_submodule(path, joined)
            continue
        order = torch.cat([part for pair in zip(kept, removed, strict=True) for part in pair])
        linear.weight.data = linear.weight.index_select(dim, order)
        if their_bias is not None:
            linear.bias.data = linear.bias[order]
        if weight is not None:
            yield path


def equal_tensors(theirs: Tensor, ours: Tensor) -> bool:
    """Compare shape, data type and values of two tensors, which may be on different devices."""
    same_kind = theirs.shape == ours.shape and theirs.dtype == ours.dtype
    return same_kind and torch.equal(theirs.to(ours.device), ours)


def _frozen(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


@contextmanager
def seeing_once(
    model: PreTrainedModel, teacher: PreTrainedModel, through_students_projector: bool = False
) -> Iterator[None]:
    """Run equal vision towers for the student alone, and give the teacher its outputs."""
    family = Parts(model).family
    ours, theirs = (
        {
            name: parameter
            for name, parameter in whole.named_parameters()
            if name.startswith(f"{family.vision}.") and not name.startswith(family.projector)
        }
        for whole in (model, teacher)
    )
    are_same = list(ours) == list(theirs) and all(
        not ours[name].requires_grad and equal_tensors(theirs[name], ours[name]) for name in ours
    )
    with ExitStack() as stack:
        if family.vision is not None and are_same:
            # modules of the teacher to skip, each after the student's in its place, if any; the
            # outputs of a tower's blocks are read where a projector inside it reads them
            whole = model.get_submodule(family.vision), teacher.get_submodule(family.vision)
            pairs: list[tuple[Any, nn.Module]] = [whole]
            if family.projector[0].startswith(f"{family.vision}."):
                blocks, theirs_of = (getattr(tower, "blocks", ()) for tower in whole)
                deep = getattr(model.config.vision_config, "deepstack_visual_indexes", ())
                read = {len(blocks) - 1, *deep}
                both = enumerate(zip(blocks, theirs_of, strict=True))
                pairs = [(block if i in read else None, other) for i, (block, other) in both]
            for source, target in pairs:
                _replay_(stack, model, source, target)
        for path in family.projector if through_students_projector else ():
            parent, _, name = path.rpartition(".")
            owner = teacher.get_submodule(parent)
            stack.callback(setattr, owner, name, getattr(owner, name, None))
            setattr(owner, name, getattr(model.get_submodule(parent), name, None))
        yield


def _replay_(
    stack: ExitStack, model: PreTrainedModel, source: nn.Module | None, target: nn.Module
) -> None:
    """Let ``target`` return the outputs of ``source``, call by call; without one, its input."""
    outputs: deque[Any] = deque()
    forward: Callable[..., Any] = lambda hidden, *args, **kwargs: hidden  # noqa: E731
    if source is not None:
        forward = lambda *args, **kwargs: outputs.popleft()  # noqa: E731
        stack.enter_context(source.register_forward_hook(lambda *call: outputs.append(call[2])))
        # the backward pass may have run the source again, for gradient checkpointing
        clear = model.base_model.register_forward_pre_hook(lambda *call: outputs.clear())
        stack.enter_context(clear)
    stack.enter_context(replaced_forward(target, forward))
