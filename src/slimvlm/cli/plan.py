"""Score the units of a model, and plan which ones to keep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from slimvlm.cli.options import INLINE, Model, check_model, load_model, read_samples
from slimvlm.cli.printing import note, print_json
from slimvlm.core.errors import ConfigError
from slimvlm.core.options import Axis, CalibrationConfig, Dtype, Unit

if TYPE_CHECKING:
    from slimvlm.data.samples import Sample
    from slimvlm.planning.plan import Plan
    from slimvlm.pruning.low_memory.score import Request
    from slimvlm.scoring.unit_scores import Scores


def score(
    model: Model,
    out: Path,
    criterion: str = "taylor",
    calibration: Annotated[CalibrationConfig, INLINE] = CalibrationConfig(),
    low_memory: bool = False,
    scratch: Path | None = None,
    force: bool = False,
) -> None:
    """Calibrate once: save scores (and the statistics behind them) for later plans.

    Args:
        model: Folder, hub id, or demo.
        out: Scores are written as OUT.json and OUT.safetensors, statistics as
            OUT.statistics.safetensors (not with --low-memory).
        criterion: How to score; see the table in the README.
        calibration: What the model is shown.
        low_memory: For models larger than the memory: one layer is read at a time and activations
            lie on disk. A stopped run goes on where it was when the same command is given again.
        scratch: Folder for these activations; by default beside OUT.
        force: Replace existing files.
    """
    from slimvlm.core.files import require_free
    from slimvlm.data.roles import parse_token_weights
    from slimvlm.pruning.low_memory.score import Request
    from slimvlm.scoring.criteria import criterion_named
    from slimvlm.scoring.score_model import (
        calibration_batches,
        check_token_weights,
        collect,
        scores_from,
    )

    row = criterion_named(criterion, {})
    given = row.requested(calibration)
    if low_memory:
        Request(criterion, given)
    asked = calibration.token_weights
    weights = None if asked is None else parse_token_weights(asked)
    if weights is not None:
        check_token_weights(criterion, weights)
    stem = out.with_suffix("") if out.suffix in (".json", ".safetensors") else out
    written = ("json", "safetensors", *(() if low_memory else ("statistics.safetensors",)))
    for suffix in written:
        require_free(Path(f"{stem}.{suffix}"), force)
    if row.needs_data and calibration.data is None:
        raise ConfigError(f"criterion {criterion!r} needs --data")
    check_model(model, calibration)
    chosen = read_samples(calibration, model)
    stem.parent.mkdir(parents=True, exist_ok=True)
    if low_memory:
        folder = scratch or stem.with_name(f".{stem.name}.scratch")
        result = _low_memory_scores(model, calibration, Request(criterion, given), chosen, folder)
    else:
        loaded, processor = load_model(model, calibration)
        batches = calibration_batches(processor, chosen) if row.needs_data else ()
        statistics = collect(loaded, batches, criterion, weights, **given)
        result = scores_from(statistics, loaded, criterion, weights, **given)
        statistics.save(f"{stem}.statistics.safetensors")
    result.save(stem)
    note(f"{criterion} scores of {', '.join(row.units)} written to {stem}.json")


def _low_memory_scores(
    model: str,
    calibration: CalibrationConfig,
    request: Request,
    samples: list[Sample],
    scratch: Path,
) -> Scores:
    from slimvlm.data.roles import parse_token_weights
    from slimvlm.models.load import load_processor
    from slimvlm.pruning.low_memory.opened import open_checkpoint
    from slimvlm.pruning.low_memory.score import score_opened
    from slimvlm.scoring.score_model import calibration_batches

    asked, trusted = calibration.token_weights, calibration.trust_remote_code
    opened = open_checkpoint(model, calibration.dtype, trusted)
    processor = load_processor(str(opened.folder), opened.model.config, trusted)
    batches = calibration_batches(processor, samples, description="embed") if samples else ()
    weights = None if asked is None else parse_token_weights(asked)
    return score_opened(opened, batches, [request], weights, scratch, note)[0]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How small the model has to become."""

    ratio: float | None = None
    """Share of the backbone's parameters to remove."""
    target_params: str | None = None
    """Instead: parameters of the whole smaller model, such as 5B or 90M."""
    target_memory: str | None = None
    """Instead: memory of its weights, such as 8GiB, in --dtype (bfloat16 for auto)."""
    dtype: Dtype = "auto"
    """Data type that --target-memory is counted in."""

    def params(self) -> int:
        """Parameters of the whole smaller model; 0 if a ratio was given instead.

        Raises:
            ConfigError: Unless exactly one of the three is given.
        """
        from slimvlm.models.cost import params_for_memory, parse_bytes, parse_count

        given = (self.ratio, self.target_params, self.target_memory)
        if sum(value is not None for value in given) != 1:
            raise ConfigError("plan needs exactly one of --ratio, --target-params, --target-memory")
        if self.target_params is not None:
            return parse_count(self.target_params)
        if self.target_memory is not None:
            counted_in = "bfloat16" if self.dtype == "auto" else self.dtype
            return params_for_memory(parse_bytes(self.target_memory), counted_in)
        return 0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What may go."""

    allocation: Literal["uniform", "protect", "global"] = "uniform"
    """The same widths in every layer; first and last layers whole; or one ranking of the units of
    all layers. The last two write files with code."""
    units: tuple[Unit, ...] = ("kv_group", "neuron")
    """What width may remove."""
    kv_heads: int | None = None
    """KV groups to keep in every layer; neurons give the rest."""
    protect: tuple[int, int] = (0, 0)
    """First and last layers to leave whole."""
    round_to: int | None = None
    """Multiple for the number of neurons; default 128, smaller for small models."""


def plan(
    model: Model,
    out: Path,
    budget: Annotated[Budget, INLINE] = Budget(),
    scores: tuple[Path, ...] = (),
    axis: Axis = "width",
    choice: Annotated[Choice, INLINE] = Choice(),
    force: bool = False,
    json: bool = False,
) -> None:
    """Choose what to keep, from saved scores and a budget. Nothing is pruned.

    Args:
        model: Folder, hub id, or demo.
        out: The plan, a JSON file that can be edited by hand.
        budget: How small the model has to become.
        scores: Score files of the units to prune. Without any: spacing for layers; magnitude, which
            reads the weights, for widths.
        axis: Remove layers, KV groups and neurons, or both.
        choice: What may go.
        force: Replace an existing file.
        json: Print JSON.
    """
    from slimvlm.core.files import require_free
    from slimvlm.models.load import anatomy, load
    from slimvlm.planning.make import make_plan, make_plan_for_params, ratio_for_params
    from slimvlm.runs.stages import rehearse
    from slimvlm.scoring.score_model import score as score_model
    from slimvlm.scoring.unit_scores import Scores

    require_free(out, force)
    shape = anatomy(model)
    target, options = budget.params(), vars(choice)
    given = [Scores.load(path) for path in scores]
    if not given:
        criterion = "spacing" if axis == "depth" else "magnitude"
        wanted = budget.ratio if budget.ratio is not None else ratio_for_params(shape, target)
        rehearse(shape, [criterion], wanted, axis, **options)
        note(f"no --scores: using {criterion}")
        given = [score_model(load(model)[0], (), criterion)]
    if budget.ratio is not None:
        made = make_plan(shape, given, budget.ratio, axis, **options)
    else:
        made = make_plan_for_params(shape, given, target, axis, **options)
    out.parent.mkdir(parents=True, exist_ok=True)
    made.save(out)
    if json:
        print_json(_plan_json(made))
    else:
        print(made.summary())


def _plan_json(made: Plan) -> dict[str, Any]:
    return {
        "ratio": made.ratio,
        "asked_ratio": made.asked_ratio,
        "backbone_params": made.after.backbone_params,
        "total_params": made.after.total_params,
        "summary": made.summary(),
    }
