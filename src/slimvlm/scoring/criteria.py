"""The table of criteria: the units they score, the data they need, and their papers.

A criterion is one function and one row. ``docs/add-a-criterion.md`` walks through adding one.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slimvlm.core.errors import ConfigError
from slimvlm.data.roles import require_token_weights
from slimvlm.models.anatomy import LAYER_UNITS, WIDTH_UNITS, Anatomy
from slimvlm.models.devices import weight_of, with_float64
from slimvlm.models.parts import Parts, layer_matrices
from slimvlm.scoring import forward, gradients
from slimvlm.scoring.batches import Batch
from slimvlm.scoring.obs import score_obs
from slimvlm.scoring.unit_scores import Place, Statistics, Values, per_layer, per_unit


def capture_weights(model: nn.Module, batches: Iterable[Batch], p: int = 1) -> Statistics:
    """Sum ``|w|^p`` by channel of each matrix and by expert; no p-th root, as in LLM-Pruner."""
    parts: dict[Place, Tensor] = {}
    view = Parts(model)
    for index, matrix in view.matrices():
        values = weight_of(matrix.owner, matrix.name).float().abs().pow(p)
        others = [dim for dim in range(-values.ndim, 0) if dim != matrix.projection.axis]
        sums = with_float64(values).sum(others, dtype=torch.float64)
        parts[index, matrix.projection.path] = sums.cpu()
    for index, layer in enumerate(view.layers):
        of_experts = []
        for entry in layer_matrices(layer, view.row)[2]:
            values = with_float64(weight_of(entry.owner, entry.name).float().abs().pow(p))
            of_experts.append(values.reshape(entry.width, -1).sum(1, dtype=torch.float64))
        if of_experts:
            parts[index, "expert"] = torch.stack(of_experts).sum(0).cpu()
    return Statistics(parts=parts)


def score_magnitude(statistics: Statistics, anatomy: Anatomy, reduction: str = "mean") -> Values:
    """Size of the weights of each unit; layers by the mean over their matrices' weights.

    Experts are compared within a layer, by the sum over all that they own. ``reduction`` is the
    ``mean`` over the unit's matrices as LLM-Pruner's scripts have it, or the ``sum``.
    """
    counts = [
        max(sum(s.units(u) * getattr(s, f"{u}_params") for u in WIDTH_UNITS), 1)
        for s in anatomy.layers
    ]
    layer = per_layer(statistics.parts, anatomy) / torch.tensor(counts, dtype=torch.float64)
    return {**per_unit(statistics.parts, anatomy, reduction), "layer": layer}


def score_spacing(statistics: Statistics, anatomy: Anatomy) -> Values:
    """Place removed layers as far apart as possible, whatever their number.

    Layers are taken in farthest-point order: the next one is farthest from all removed so far
    and from both ends. Ties go to the later layer.
    """
    L = anatomy.num_layers
    distance = torch.minimum(torch.arange(L) + 1, L - torch.arange(L)).double()
    scores = torch.zeros(L)
    for rank in range(L):
        chosen = L - 1 - int(distance.flip(0).argmax())
        scores[chosen] = rank
        distance = torch.minimum(distance, (torch.arange(L) - chosen).abs().double())
        distance[chosen] = -1
    return {"layer": scores}


def score_random(statistics: Statistics, anatomy: Anatomy, seed: int = 0) -> Values:
    """Draw uniform random scores: the floor that every other criterion has to beat."""
    generator = torch.Generator().manual_seed(seed)
    drawn: Values = {"layer": torch.rand(anatomy.num_layers, generator=generator)}
    for unit in LAYER_UNITS:
        for index, shape in enumerate(anatomy.layers):
            drawn[index, unit] = torch.rand(shape.units(unit), generator=generator)
    return drawn


@dataclass(frozen=True)
class Capture:
    """How statistics are collected, and the cost of it.

    The function is ``(model, batches, token_weights, **options) -> Statistics``; where no data is
    read, without ``token_weights``.
    """

    function: Callable[..., Statistics]
    options: tuple[str, ...] = ()  # those of a criterion that the function takes
    passes: int = 1  # cost of a sample in forward passes of the model; 0 if no data is read
    sees: Literal["nothing", "layer", "model"] = "layer"  # at a time, beyond shapes
    backward: bool = False  # whether it computes gradients of a loss
    # statistics are large, so that the function takes a few ``layers`` at a time
    is_divided: bool = False


NOTHING = Capture(lambda model, batches: Statistics(), sees="nothing", passes=0)
WEIGHTS = Capture(capture_weights, ("p",), passes=0)
INFLUENCES = Capture(forward.capture_influences)
ANGLES = Capture(forward.capture_angles, sees="model")
ACTIVATIONS = Capture(forward.capture_activations)
MOMENTS = Capture(forward.capture_moments)
GRAMS = Capture(forward.capture_grams, is_divided=True)
GATES = Capture(gradients.capture_gates, passes=3, sees="model", backward=True)
GRADIENTS = Capture(gradients.capture_gradients, ("order", "gradient"), 3, "model", backward=True)
ROUTING = Capture(forward.capture_routing, passes=2)


@dataclass(frozen=True)
class Criterion:
    """One way to score units."""

    units: tuple[str, ...]
    capture: Capture
    function: Callable[..., Values]  # (statistics, anatomy, **options) -> values of units
    paper: str  # title and arXiv id
    about: str  # one line for tables
    # with their allowed values, or None for any; the function takes those that no capture names
    options: Mapping[str, tuple[Any, ...] | None] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)  # the capture's, set by the criterion
    from_request: tuple[str, ...] = ()  # those of `CalibrationConfig` of the same name

    @property
    def needs_data(self) -> bool:
        """Whether calibration batches are needed."""
        return self.capture.passes > 0


_LLM_PRUNER = "LLM-Pruner, arXiv:2305.11627"

CRITERIA: dict[str, Criterion] = {
    "block_influence": Criterion(
        ("layer",), INFLUENCES, forward.score_block_influence, "ShortGPT, arXiv:2403.03853",
        "1 - mean cosine between a layer's input and output",
        options={"reduction": ("mean", "sum"), "last_layer": ("prenorm", "postnorm")}),
    "angular": Criterion(
        ("layer",), ANGLES, forward.score_angular, "Gromov et al., arXiv:2403.17887",
        "the run of layers whose input and output are closest in angle"),
    "spacing": Criterion(
        ("layer",), NOTHING, score_spacing, "compared in arXiv:2603.20275",
        "removed layers as far apart as possible"),
    "taylor": Criterion(
        ("layer", *WIDTH_UNITS), GRADIENTS,
        lambda found, anatomy: {
            **per_unit(found.parts, anatomy), "layer": per_layer(found.parts, anatomy)},
        _LLM_PRUNER,
        "first order: |weight x gradient| summed over the unit",
        options={"gradient": ("batch", "per_sample")}, fixed={"order": "first"},
        from_request=("gradient",)),
    "taylor_second": Criterion(
        WIDTH_UNITS, GRADIENTS, lambda found, anatomy: per_unit(found.parts, anatomy), _LLM_PRUNER,
        "second order: weight² x mean squared gradient", fixed={"order": "second"}),
    "taylor_mix": Criterion(
        WIDTH_UNITS, GRADIENTS, lambda found, anatomy: per_unit(found.parts, anatomy), _LLM_PRUNER,
        "first and second order together", fixed={"order": "mix"}),
    "gate": Criterion(
        WIDTH_UNITS, GATES, lambda found, anatomy: dict(found.parts),
        "Michel et al., arXiv:1905.10650",
        "gradient of a switch on each unit; no weight gradients"),
    "activation": Criterion(
        WIDTH_UNITS, ACTIVATIONS, lambda found, anatomy: dict(found.parts),
        "Minitron, arXiv:2407.14679", "mean size of a unit's output"),
    "wanda": Criterion(
        WIDTH_UNITS, MOMENTS, forward.score_wanda, "Wanda, arXiv:2306.11695",
        "|weight| x size of its input, over the columns that read the unit"),
    "flap": Criterion(
        WIDTH_UNITS, MOMENTS, forward.score_flap, "FLAP, arXiv:2312.11983",
        "variance of the unit's output x squared weights that read it"),
    "obs": Criterion(
        WIDTH_UNITS, GRAMS, score_obs,
        "after SlimGPT, arXiv:2412.18110 and OSSCAR, arXiv:2403.12983",
        "squared error when the unit goes and the others are refitted, one after another"),
    "reap": Criterion(
        ("expert",), ROUTING, forward.score_reap, "REAP, arXiv:2510.13999",
        "mean size of what the expert adds to the tokens that take it"),
    "frequency": Criterion(
        ("expert",), ROUTING,
        lambda found, anatomy: {at: count / found.weight for at, (count, _) in found.parts.items()},
        "baseline in REAP, arXiv:2510.13999",
        "share of the tokens that take the expert"),
    "magnitude": Criterion(
        ("layer", *LAYER_UNITS), WEIGHTS, score_magnitude, _LLM_PRUNER,
        "size of the weights, l1 or l2", options={"reduction": ("mean", "sum"), "p": (1, 2)}),
    "random": Criterion(
        ("layer", *LAYER_UNITS), NOTHING, score_random, "baseline", "chance",
        options={"seed": None}, from_request=("seed",)),
}  # fmt: skip

DEFAULT_CRITERIA: dict[str, tuple[str, ...]] = {
    "depth": ("block_influence",),
    "width": ("obs",),
    "both": ("block_influence", "obs"),
}
"""Chosen by measurement; see "What stays without training" in ``docs/results.md``."""

EXPERT_CRITERION = "reap"
"""The default for experts: best on large mixtures in its paper.

On our tiny one it is not; see "Fewer experts" in ``docs/results.md``.
"""

EXPERT_NEURON_CRITERION = "activation"  # for widths with experts, whose neurons no walk chooses


def criterion_named(
    name: str, options: Mapping[str, Any], token_weights: Mapping[str, float] | None = None
) -> Criterion:
    """Look a criterion up; check its options and weights of tokens, which need data to weigh."""
    if name not in CRITERIA:
        raise ConfigError(f"criterion {name!r} is not known. Choose from: {', '.join(CRITERIA)}")
    known = CRITERIA[name].options
    for option, value in options.items():
        if option not in known:
            raise ConfigError(
                f"criterion {name!r} has no option {option!r}. It has: {', '.join(known) or 'none'}"
            )
        allowed = known[option]
        if allowed is not None and value not in allowed:
            choices = ", ".join(map(str, allowed))
            raise ConfigError(f"criterion {name!r}: {option}={value!r} must be one of: {choices}")
    if token_weights is not None:
        if not CRITERIA[name].needs_data:
            raise ConfigError(f"token_weights: criterion {name!r} reads no data to weigh")
        require_token_weights(token_weights)
    return CRITERIA[name]


def require_low_memory(
    name: str, options: Mapping[str, Any] = {}, token_weights: Mapping[str, float] | None = None
) -> Criterion:
    """Look up a criterion that can be computed with one layer in memory at a time."""
    row = criterion_named(name, options, token_weights)
    if row.capture.sees == "model":
        by_layer = {n: each for n, each in CRITERIA.items() if each.capture.sees == "layer"}
        others = [n for n, e in by_layer.items() if e.needs_data and {*row.units} & {*e.units}]
        told = f"criterion {name!r} needs the whole model in memory; with low memory use"
        raise ConfigError(f"{told} {', '.join(others)}")
    return row
