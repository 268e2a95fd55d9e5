"""Repair in closed form: the best weights for a matrix some of whose inputs were removed.

O output, C input channel, K kept channel, T token. Sums over tokens are enough: `Moments` gathers
them, `refit` solves for the new weights. `repair_` does so in one shot for the matrices that write
to the residual stream, the walk (`slimvlm.pruning.walk`) layer after layer.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimvlm.core.errors import ConfigError, NumericalError
from slimvlm.core.options import AT_LEAST_0
from slimvlm.models.anatomy import read_anatomy, segments, unit_of
from slimvlm.models.devices import with_float64
from slimvlm.models.families import INPUT_COLUMNS, Backbone, Projection
from slimvlm.models.hidden import all_finite
from slimvlm.models.parts import Parts, layer_matrices
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import kept_channels
from slimvlm.pruning.walk.result import LayerReport, MatrixReport, WalkReport
from slimvlm.scoring.moments import BLOCK, Moments
from slimvlm.scoring.unit_scores import Statistics

_MOST_TRIES = 20
_NOISE = 100  # smallest pivot that counts as positive, in machine epsilons times the mean diagonal
_PROBES = 8  # random combinations of outputs by which a solution in float32 is checked


@dataclass(frozen=True)
class Refit:
    """New weights for the kept channels, in float64, and how far they are from the target.

    Errors are ``Σ_t w_t ‖y_t - W_K x_t[K] - b‖²`` as a share of the target's sum of squares (of its
    variance, with a bias).
    """

    weight: Float[Tensor, "O K"]
    bias: Float[Tensor, " O"] | None
    sliced_error: float
    repaired_error: float  # with the new weights and bias


def confirmed(
    new: tuple[Float[Tensor, "O K"], Float[Tensor, " O"] | None],
    weight: Float[Tensor, "O C"],
    bias: Float[Tensor, " O"] | None,
    rows: Iterable[Sequence[Tensor]],
    keep: Int[Tensor, " K"],
) -> tuple[float, float, float]:
    """Return the errors of sliced and of blended weights on validation tokens, and the best share.

    Along ``W_K + s (W' - W_K)``, and the bias likewise, the squared error is a parabola in the
    share ``s``: with ``r`` the residual of the sliced weights and ``c`` the change by the new ones,
    its lowest point is ``Σ_t w_t r_t·c_t / Σ_t w_t ‖c_t‖²``.

    ``rows`` are inputs ``[T, C]``, weights ``[T]`` and, if any, residuals ``[T, O]``.
    """
    whole, removed = weight.detach().clone(), weight.detach().clone()
    removed[:, keep] = 0
    change = torch.zeros_like(whole)
    change[:, keep] = (new[0] - weight[:, keep].to(new[0])).to(change)
    dtype = torch.promote_types(whole.dtype, torch.float32)
    shift = whole.new_zeros((), dtype=dtype)
    if new[1] is not None and bias is not None:
        shift = (new[1] - bias).to(dtype)
    toward = square = sliced = target = whole.new_zeros((), dtype=torch.float64)
    for inputs, weights, *residuals in rows:
        lacking, added, wanted = (inputs @ matrix.T for matrix in (removed, change, whole))
        lacking, added, wanted = lacking.to(dtype), added.to(dtype) + shift, wanted.to(dtype)
        for residual in residuals:
            lacking, wanted = lacking + residual, wanted + residual
        heavy = weights[:, None].to(dtype)
        toward = toward + (heavy * lacking * added).sum(dtype=torch.float64)
        square = square + (heavy * added.square()).sum(dtype=torch.float64)
        sliced = sliced + (heavy * lacking.square()).sum(dtype=torch.float64)
        target = target + (heavy * wanted.square()).sum(dtype=torch.float64)
    along, length, before, whole_square = torch.stack([toward, square, sliced, target]).tolist()
    share = min(max(along / length, 0.0), 1.0) if length > 0 else 0.0
    error = before - 2 * share * along + share**2 * length
    return _share(before, whole_square), _share(error, whole_square), share


def refit(
    weight: Float[Tensor, "O C"],
    bias: Float[Tensor, " O"] | None,
    moments: Moments,
    keep: Int[Tensor, " K"],
    ridge: float,
) -> Refit:
    """Find the best weights on the (sorted) kept channels, near the sliced ones.

    Minimises, over ``W'`` and, where the matrix has a bias, ``b'``,

    ``Σ_t w_t ‖y_t - W' x_t[K] - b'‖² + λ ‖W' - W_K‖²``, ``λ = ridge · mean diag(G_KK)``,

    where ``y_t = W x_t + b`` unless the moments hold residuals. With ``R`` the removed channels and
    ``G`` the Gram matrix, the solution is

    ``W' = W_K + (W_R G_RK + E_K) (G_KK + λ I)⁻¹``,

    with ``E`` the cross moments of the residuals, 0 without. With a bias all moments are centred.
    The ridge pulls towards the sliced weights, so the error on the calibration tokens is never
    above theirs, and where nothing is removed or missing the weights stay as they are, bit for bit.
    It is raised until the system can be solved.

    Reference:
        Meng et al. 2024, OSSCAR, arXiv:2403.12983, without the ridge's aim and the centring.
    """
    if weight.element_size() < 4:  # float32 will do, if it solves to better than what they can hold
        tolerance = torch.finfo(weight.dtype).eps / 8
        found = _refit(weight.float(), bias, moments, keep, ridge, tolerance)
        if found is not None:
            return found
    found = _refit(weight.double(), bias, moments, keep, ridge, math.inf)
    assert found is not None
    return found


def _refit(
    weight: Float[Tensor, "O C"],
    bias: Float[Tensor, " O"] | None,
    moments: Moments,
    keep: Int[Tensor, " K"],
    ridge: float,
    tolerance: float,
) -> Refit | None:
    """Run `refit` in the precision of the weight; None if rounding exceeds the tolerance."""
    centred, dtype = bias is not None, weight.dtype
    is_kept = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    is_kept[keep] = True
    everything, remove = torch.arange(len(is_kept), device=keep.device), (~is_kept).nonzero()[:, 0]
    removed_weight = weight[:, remove]
    lost = removed_weight @ moments.block(remove, keep, centred, dtype)
    lost += moments.cross_block(keep, centred, dtype)
    # the change is ``lost (G_KK + λ I)⁻¹``, by Cholesky in place
    change, penalty, changes = torch.zeros_like(lost), 0.0, bool(lost.any())
    ridge = max(ridge, 10 * torch.finfo(moments.pairs.dtype).eps)
    for _ in range(_MOST_TRIES if changes else 0):
        system = moments.block(keep, keep, centred, dtype).T
        mean = float(system.diagonal().mean())
        penalty = ridge * mean
        system.diagonal().add_(penalty)
        info = torch.empty((), dtype=torch.int32, device=system.device)
        torch.linalg.cholesky_ex(system, out=(system, info))
        if tolerance < math.inf:
            rounding = _NOISE * torch.finfo(system.dtype).eps * mean
            if int(info) != 0 or system.diagonal().square().min() < rounding:
                return None
        if int(info) == 0:
            break
        ridge *= 10
    for start in range(0, len(lost) if changes else 0, BLOCK):
        rows = slice(start, start + BLOCK)
        change[rows] = torch.cholesky_solve(lost[rows].T, system).T
    if tolerance < math.inf and changes:
        drawn = torch.randn(_PROBES, len(lost), generator=torch.Generator().manual_seed(0))
        drawn = drawn.to(lost)
        solved = drawn @ change
        rest = drawn @ lost - moments.image(solved, keep, centred) - penalty * solved
        if torch.cholesky_solve(rest.T, system).norm() > tolerance * solved.norm():
            return None
    whole = moments.square(weight, everything, centred)
    sliced = moments.square(removed_weight, remove, centred)
    repaired = sliced - float((lost * change).sum() + penalty * change.square().sum())
    new_weight = (weight[:, keep] + change).double()
    if bias is None:
        return Refit(new_weight, None, _share(sliced, whole), _share(repaired, whole))
    shift = removed_weight.double() @ moments.total[remove]
    if moments.missing is not None:
        shift += moments.missing
    shift /= moments.count
    sliced += float(moments.count * shift.square().sum())
    new_bias = bias.double() + shift - change.double() @ moments.total[keep] / moments.count
    return Refit(new_weight, new_bias, _share(sliced, whole), _share(repaired, whole))


def _share(error: float, whole: float) -> float:
    """Divide an error by the whole; rounding may have made it negative."""
    return max(error, 0.0) / whole if whole > 0 else 0.0


ATTENTION, MLP, SEAM = "attention", "mlp", "seam"
"""Kinds of repair: of attention outputs, of MLP outputs, of seams of removed layers."""

REPAIRS: dict[str, tuple[str, ...]] = {"none": (), "width": (ATTENTION, MLP), "depth": (SEAM,)}
REPAIRS["both"] = REPAIRS["auto"] = (ATTENTION, MLP, SEAM)
"""Kinds of repair in each form of repair."""

RIDGE = 1e-2  # ridge as a share of the mean diagonal of the Gram matrix; see ``docs/results.md``


@dataclass
class Writer:
    """A matrix that writes to the residual stream."""

    index: int  # the number of its layer in the original model
    projection: Projection
    linear: nn.Linear

    def __post_init__(self) -> None:
        self.name = f"{self.index}.{self.projection.path}"
        self.unit = unit_of(self.projection)  # kind of unit that owns its input channels
        self.kind = ATTENTION if self.unit == "kv_group" else MLP  # of repair, but at a seam

    @property
    def weight(self) -> Tensor:
        """The matrix on the device where it is fitted: the CPU if its own has no float64."""
        return with_float64(self.linear.weight)

    @property
    def bias(self) -> Tensor | None:
        """Its bias on the same device, if it has one."""
        return None if self.linear.bias is None else with_float64(self.linear.bias)

    def parameters(self, weight: Tensor, bias: Tensor | None) -> dict[str, nn.Parameter]:
        """Convert new values to the module's data type; refuse what is not finite in it."""
        made: dict[str, nn.Parameter] = {}
        for part, value in (("weight", weight), ("bias", bias)):
            if value is None:
                continue
            old = getattr(self.linear, part)
            new = value.to(old)
            if not all_finite(new):
                raise NumericalError(f"NaN or infinity in the repaired {part} of layer {self.name}")
            made[part] = nn.Parameter(new, old.requires_grad)
        return made


def writers_of_layer(layer: nn.Module, index: int, row: Backbone) -> Iterator[Writer]:
    """List the writers of one layer in the order of their calls; experts are no modules of one."""
    attention, mlp, _ = layer_matrices(layer, row)
    for matrix in (*attention, *mlp):
        if matrix.projection.dim == INPUT_COLUMNS and isinstance(matrix.owner, nn.Linear):
            yield Writer(index, matrix.projection, matrix.owner)


@torch.no_grad()
def repair_(
    model: PreTrainedModel, plan: Plan, statistics: Statistics, ridge: float = RIDGE
) -> WalkReport:
    """Repair the widths of a pruned model from Gram matrices of the original one, in place.

    Every matrix is fitted to the original inputs, as if only it had been pruned. `slimvlm.walk_` is
    better: it takes each layer's inputs from the pruned layers before it, and it alone can repair
    the seams of removed layers.

    ``model`` was pruned by ``prune_(model, plan)``, ``statistics`` are those of
    ``sv.collect(original, batches, "obs")``, and `slimvlm.pruning.repair.refit` explains ``ridge``.
    The report's errors are those on the statistics. If a new weight is not finite, a
    `NumericalError` is raised and the model does not change.
    """
    if not AT_LEAST_0.holds(ridge):
        raise ConfigError(f"ridge {ridge} must be {AT_LEAST_0.meaning}")
    if not statistics.matrices:
        raise ConfigError("statistics cannot repair: only those of criterion 'obs' can")
    if read_anatomy(model).layers != plan.after.layers:
        raise ConfigError("model: its shape is not the plan's; prune it first")
    fitted: list[tuple[Writer, Refit, dict[str, nn.Parameter]]] = []  # none is set before all are
    for index, layer in zip(plan.layers, Parts(model).layers, strict=True):
        for writer in writers_of_layer(layer, index, plan.before.backbone):
            place, device = (index, writer.projection.path), writer.weight.device
            if place not in statistics.parts:
                raise ConfigError(f"statistics: no {writer.name!r} in them")
            weight, part = statistics.matrices[place], statistics.parts[place]
            whole = segments(writer.projection, plan.before.layers[index])
            channels = sum(units * width for _, _, units, width in whole)
            if weight.shape != (writer.linear.out_features, channels):
                raise ConfigError(f"statistics: {writer.name!r} is of another model")
            keep = kept_channels(plan, index, writer.projection).to(device)
            if len(keep) < channels:
                sums = (part.gram.to(device), part.total.to(device), part.count.to(device))
                found = refit(weight.to(device), writer.bias, Moments(*sums), keep, ridge)
                fitted.append((writer, found, writer.parameters(found.weight, found.bias)))
    layers: dict[int, dict[str, MatrixReport]] = {}
    for writer, found, parameters in fitted:
        writer.linear._parameters.update(parameters)
        row = MatrixReport(writer.kind, found.sliced_error, found.repaired_error, 1.0)
        layers.setdefault(writer.index, {})[writer.projection.path] = row
    return WalkReport([LayerReport(index, refits) for index, refits in layers.items()])
