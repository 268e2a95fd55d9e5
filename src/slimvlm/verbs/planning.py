"""Score the units of a model, and plan which ones to keep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from slimvlm.config import Axis, CalibrationConfig, Dtype, Unit
from slimvlm.errors import ConfigError
from slimvlm.verbs.options import INLINE, Model, check_model, load_model, read_samples
from slimvlm.verbs.printing import note, print_json


def score(
    model: Model,
    out: Path,
    criterion: str = "taylor",
    calibration: Annotated[CalibrationConfig, INLINE] = CalibrationConfig(),
    force: bool = False,
) -> None:
    """Calibrate once: save scores (and the statistics behind them) for later plans.

    Args:
        model: Folder, hub id, or demo.
        out: Scores are written as OUT.json and OUT.safetensors, statistics as
            OUT.statistics.safetensors.
        criterion: How to score; see the table in the README.
        calibration: What the model is shown.
        force: Replace existing files.
    """
    from slimvlm.calibrate import calibration_batches, check_token_weights, collect, scores_from
    from slimvlm.outputs import require_free
    from slimvlm.roles import parse_token_weights
    from slimvlm.scores import criterion_named

    given: dict[str, Any] = {"gradient": calibration.gradient} if criterion == "taylor" else {}
    row = criterion_named(criterion, given)
    asked = calibration.token_weights
    weights = None if asked is None else parse_token_weights(asked)
    if weights is not None:
        check_token_weights(criterion, weights)
    stem = out.with_suffix("") if out.suffix in (".json", ".safetensors") else out
    require_free(Path(f"{stem}.json"), force)
    if row.needs_data and calibration.data is None:
        raise ConfigError(f"criterion {criterion!r} needs --data")
    check_model(model, calibration)
    chosen = [] if calibration.data is None else read_samples(calibration)
    loaded, processor = load_model(model, calibration)
    batches = calibration_batches(processor, chosen) if row.needs_data else ()
    statistics = collect(loaded, batches, criterion, weights, **given)
    result = scores_from(statistics, loaded, criterion, weights, **given)
    stem.parent.mkdir(parents=True, exist_ok=True)
    statistics.save(f"{stem}.statistics.safetensors")
    result.save(stem)
    note(f"{criterion} scores of {', '.join(row.units)} written to {stem}.json")


def plan(
    model: Model,
    out: Path,
    ratio: float | None = None,
    target_params: str | None = None,
    target_memory: str | None = None,
    scores: tuple[Path, ...] = (),
    axis: Axis = "width",
    allocation: Literal["uniform", "protect", "global"] = "uniform",
    units: tuple[Unit, ...] = ("kv_group", "neuron"),
    kv_heads: int | None = None,
    protect: tuple[int, int] = (0, 0),
    round_to: int | None = None,
    dtype: Dtype = "auto",
    force: bool = False,
    json: bool = False,
) -> None:
    """Choose what to keep, from saved scores and a budget. Nothing is pruned.

    Args:
        model: Folder, hub id, or demo.
        out: The plan, a JSON file that can be edited by hand.
        ratio: Share of the backbone's parameters to remove.
        target_params: Instead: parameters of the whole smaller model, such as 5B or 90M.
        target_memory: Instead: memory of its weights, such as 8GiB, in --dtype (bfloat16 for auto).
        scores: Score files of the units to prune. Without any: spacing for layers; magnitude, which
            reads the weights, for widths.
        axis: Remove layers, KV groups and neurons, or both.
        allocation: The same widths in every layer; first and last layers whole; or one ranking of
            the units of all layers. The last two write files with code.
        units: What width may remove.
        kv_heads: KV groups to keep in every layer; neurons give the rest.
        protect: First and last layers to leave whole.
        round_to: Multiple for the number of neurons; default 64, smaller for small models.
        dtype: Data type that --target-memory is counted in.
        force: Replace an existing file.
        json: Print JSON.
    """
    from slimvlm.calibrate import score as score_model
    from slimvlm.checkpoint import anatomy, load
    from slimvlm.outputs import require_free
    from slimvlm.planning import make_plan, make_plan_for_params, ratio_for_params
    from slimvlm.pruning import rehearse
    from slimvlm.values import Scores

    require_free(out, force)
    shape = anatomy(model)
    target = _target_params(ratio, target_params, target_memory, dtype)
    wanted = ratio if ratio is not None else ratio_for_params(shape, target)
    given = [Scores.load(path) for path in scores]
    options: dict[str, Any] = {
        "allocation": allocation,
        "units": units,
        "kv_heads": kv_heads,
        "protect": protect,
        "round_to": round_to,
    }
    if not given:
        criterion = "spacing" if axis == "depth" else "magnitude"
        rehearse(shape, [criterion], wanted, axis, **options)
        note(f"no --scores: using {criterion}")
        given = [score_model(load(model)[0], (), criterion)]
    if ratio is not None:
        made = make_plan(shape, given, ratio, axis, **options)
    else:
        made = make_plan_for_params(shape, given, target, axis, **options)
    out.parent.mkdir(parents=True, exist_ok=True)
    made.save(out)
    if json:
        print_json(_plan_json(made))
    else:
        print(made.summary())


def _plan_json(made: Any) -> dict[str, Any]:
    return {
        "ratio": made.ratio,
        "asked_ratio": made.asked_ratio,
        "backbone_params": made.after.backbone_params,
        "total_params": made.after.total_params,
        "summary": made.summary(),
    }


def _target_params(
    ratio: float | None, target_params: str | None, target_memory: str | None, dtype: str
) -> int:
    """Parameters of the whole smaller model; 0 if a ratio was given instead."""
    from slimvlm.cost import params_for_memory, parse_bytes, parse_count

    given = [value for value in (ratio, target_params, target_memory) if value is not None]
    if len(given) != 1:
        raise ConfigError("plan needs exactly one of --ratio, --target-params, --target-memory")
    if target_params is not None:
        return parse_count(target_params)
    if target_memory is not None:
        counted_in = "bfloat16" if dtype == "auto" else dtype
        return params_for_memory(parse_bytes(target_memory), counted_in)
    return 0
