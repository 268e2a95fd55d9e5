"""Walk a vision tower, over the pictures of the calibration data. B picture, P patch, D hidden."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimvlm.core.errors import DataError
from slimvlm.core.progress import Say, silent
from slimvlm.data.roles import role_masks
from slimvlm.models.anatomy import Anatomy, read_anatomy
from slimvlm.models.hidden import as_inputs, evaluating, frozen, replaced_forward
from slimvlm.models.load import sharing_copy
from slimvlm.models.parts import Parts, tower_path
from slimvlm.planning.make import is_open
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import narrow_tower_config_, prune_tower_, reader_of, tower_of
from slimvlm.pruning.walk.engine import Steps, Walk, WalkConfig, relative_error, steps_for
from slimvlm.pruning.walk.result import Walked, assign_
from slimvlm.pruning.walk.streams import PREFIX, Streams
from slimvlm.scoring.batches import Batch, forward_backbone
from slimvlm.scoring.layerwise import Arguments, Live, Source
from slimvlm.scoring.stores import Memory, Scratch, Store


@dataclass(frozen=True)
class TowerSource:
    """The vision tower of a model that is in memory or in files."""

    whole: Source

    @property
    def model(self) -> PreTrainedModel:
        """The tower itself."""
        found: PreTrainedModel = tower_of(self.whole.model)
        return found

    def loaded(self, part: int | str, device: torch.device) -> AbstractContextManager[None]:
        """Give a layer of the tower its values inside."""
        parts = Parts(self.model)
        steps = (tower_path(self.whole.model.config), parts.family.backbone, parts.row.layers)
        return self.whole.loaded(".".join([*filter(None, steps), f"{part}."]), device)


@dataclass
class TowerStreams(Streams):
    """The hidden states of a tower's patches; each of its calls has a place."""

    source: TowerSource  # type: ignore[assignment]
    unread: int = 0  # last layers that nobody reads
    what = "vision tower"
    judges = False  # the whole model does

    def __post_init__(self) -> None:
        super().__post_init__()
        self.layers = self.layers[: len(self.layers) - self.unread]

    @torch.no_grad()
    def embed_all(self, fitted: Sequence[Batch], held_out: Sequence[Batch]) -> None:
        """Record the inputs of the first layer for all batches, and the weights of patches."""
        noted: list[tuple[int, Tensor, Arguments]] = []
        whole, count, ends = self.source.whole, 0, list[int]()
        self.weights = []

        def note(index: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            noted.append((index, hidden_states, (args, kwargs)))
            return torch.zeros_like(hidden_states)

        with whole.loaded("before", self.device), ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                stack.enter_context(replaced_forward(layer, partial(note, index)))
            for layer in Parts(whole.model).layers:
                skipped = replaced_forward(layer, lambda hidden_states, *_, **__: hidden_states)
                stack.enter_context(skipped)
            for batch in [*fitted, *held_out]:
                noted.clear()
                forward_backbone(whole.model, as_inputs(whole.model, batch))
                starts = [place for place, (index, *_) in enumerate(noted) if index == 0]
                for start, end in pairwise([*starts, len(noted)]):
                    _, hidden, arguments = noted[start]
                    valid = valid_patches(hidden, arguments)
                    self._write(count, "", {"attention_mask": valid}, noted[start:end])
                    self.weights.append(valid.flatten().float())
                    count += 1
                ends.append(count)
        if not fitted or not ends[len(fitted) - 1]:
            raise DataError("tower_ratio needs images, and no calibration sample has one")
        self.places, first = range(count), ends[len(fitted) - 1]
        self.fitted, self.held_out = self.places[:first], self.places[first:]
        self.layers_run = set(range(len(self.layers)))


def valid_patches(hidden: Tensor, arguments: Arguments) -> Tensor:
    """Return ``[B, P]``: the patches that any other attends to, all without an attention mask."""
    args, kwargs = arguments
    patches = hidden.shape[-2]
    for given in (*args, kwargs.get("attention_mask")):
        if isinstance(given, Tensor) and given.shape == hidden.shape[:2]:
            return given.long()
        if isinstance(given, Tensor) and given.ndim == 4 and given.shape[-1] == patches:
            seen = given if given.dtype == torch.bool else given == 0
            return seen.flatten(1, -2).any(1).long()
    return torch.ones(hidden.shape[:-1], dtype=torch.long, device=hidden.device).view(-1, patches)


def with_tower(source: Source, tower: Walked) -> Source:
    """Return a model with a smaller tower; it shares all other weights with the original."""
    model, plan = source.model, tower.plan
    small = sharing_copy(model)
    prune_tower_(small, plan)
    narrow_tower_config_(small.config, plan)
    layers = Parts(tower_of(small)).layers
    for (index, path), value in tower.weights.items():
        assign_(layers[plan.layers.index(index)], path, value)
    if isinstance(source, Live):
        return Live(small)
    everything = replace(Plan.everything(read_anatomy(model)), tower=plan)
    return replace(source, model=small, reader=reader_of(source, everything, {}, tower.weights))


def joined(walked: Walked, tower: Walked | None, before: Anatomy) -> Walked:
    """Join the walks of a tower and of the decoder behind it into that of the original."""
    if tower is None:
        return walked
    return replace(walked, plan=replace(walked.plan, before=before, tower=tower.plan), tower=tower)


def walk_tower(
    source: Source,
    plan: Plan,
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    steps: Steps,
    device: torch.device,
    results: Store,
    say: Say = silent,
    steps_open: bool = False,
) -> Walked:
    """Walk the vision tower of a model, which does not change.

    Each layer's neurons are chosen by OBS, unless a criterion or a person chose them. The
    layer is cut, its last matrix refitted and, with local steps, the layer trained towards the
    original's hidden states. Padded patches weigh 0. With ``repair="auto"`` the new weights are
    dropped if the whole model's answers to the validation batches have a larger loss than with
    plain slices. With ``steps_open`` the number of local steps is that of `steps_for`.
    """
    model, cpu = source.model, torch.device("cpu")
    chooses = is_open(plan)
    read = range(plan.before.num_layers - plan.before.unread)
    layers = tuple(index for index in plan.layers if index in read)  # the others change nothing
    neurons = tuple(k if i in layers else () for i, k in enumerate(plan.neurons))
    plan = replace(plan, layers=layers, neurons=neurons)
    if plan.layers == (*read,) and plan.after.mlp_widths == plan.before.mlp_widths:
        return Walked(plan)  # only what nobody reads goes
    # masks of flex_attention, which are no tensors, stay on the device
    is_flex = model.config._attn_implementation == "flex_attention"
    states: Store = Memory() if is_flex and isinstance(source, Live) else Memory(cpu)
    if isinstance(results, Scratch):
        states = states if isinstance(source, Live) else Scratch(results.folder / "tower-states")
        results = Scratch(results.folder / "tower")
    else:
        results = Memory(cpu)
    with evaluating(model), frozen(model):
        streams = TowerStreams(TowerSource(source), states, device, None, plan.before.unread)
        streams.embed_all(batches, held_out)
        say(f"vision tower: {sum(map(len, streams.weights)):,} patches")
        if steps_open:
            steps = replace(steps, count=steps_for(plan, len(streams.fitted)))
        config = WalkConfig([plan], chooses, batches, held_out, steps)
        walked = Walk(streams, results, config).run()
        if chooses:
            walked = replace(walked, plan=replace(walked.plan, criteria={"neuron": "obs"}))
        if steps.repair != "auto" or not held_out or not walked.weights:
            return walked
        judge = partial(_judged, held_out=held_out, device=device)
        _, whole = judge(source, measure=False)
        tried = (replace(walked, weights={}), walked)
        (sliced, _), (loss, _) = found = [judge(with_tower(source, each)) for each in tried]
    errors = [_projector_error(states, whole, source, held_out) for _, states in found]
    told = f"projector's output: error {errors[0]:.2%} -> {errors[1]:.2%} on validation images"
    notes = (*walked.report.notes, told)
    report = replace(walked.report, loss_sliced=sliced, loss=min(loss, sliced), notes=notes)
    if loss <= sliced:
        return replace(walked, report=report)
    dropped = f"validation loss {loss:.4f} with new weights of the tower: they were dropped"
    report = replace(report, layers=(), notes=(*notes, dropped))
    return replace(walked, report=report, weights={})


def _judged(
    source: Source, held_out: Sequence[Batch], device: torch.device, measure: bool = True
) -> tuple[float, list[Tensor]]:
    """Return the loss of a model's answers, and the inputs of its decoder."""
    store = Memory() if isinstance(source, Live) else Memory(torch.device("cpu"))
    streams = Streams(source, store, device, None)
    streams.embed_all([], held_out)
    entering = [streams.state(PREFIX, 0, place).cpu() for place in streams.places]
    depth = len(streams.layers)
    for index in range(depth if measure else 0):
        with source.loaded(index, device):
            streams.pass_on(PREFIX, index, index + 1, streams.places)
        streams.store.drop(f"{PREFIX}-{index}")
    return streams.answer_loss(PREFIX, depth) if measure else 0.0, entering


def _projector_error(
    states: Sequence[Tensor], whole: Sequence[Tensor], source: Source, batches: Sequence[Batch]
) -> float:
    """Return the mean `relative_error` of image tokens as the decoder reads them."""
    errors = list[float]()
    for ours, theirs, batch in zip(states, whole, batches, strict=True):
        shown = role_masks(source.model.config, batch)["image"].flatten().float().cpu()
        if shown.any():
            errors.append(float(relative_error(ours, theirs, shown)))
    return fmean(errors or [0.0])
