"""Score a model, or plan from scores: one stage alone, from a model's folder to files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimvlm.core.checked import part_of
from slimvlm.core.errors import ConfigError
from slimvlm.core.files import require_free
from slimvlm.core.options import (
    CalibrationConfig,
    MemoryOptions,
    PlanConfig,
    PruneConfig,
    WidthOptions,
)
from slimvlm.core.progress import Say
from slimvlm.models.cost import params_for_memory, parse_bytes, parse_count
from slimvlm.models.load import anatomy, check_models, device_named, load, load_processor
from slimvlm.planning.make import make_plan, make_plan_for_params
from slimvlm.planning.plan import Plan
from slimvlm.runs.request import (
    Request,
    check_options,
    criterion_options,
    pretended_scores,
    scored_by,
    token_weights_of,
)
from slimvlm.runs.stages import Calibration, calibrate, load_original, read_split
from slimvlm.runs.tokens import vocabulary_for
from slimvlm.scoring.criteria import CRITERIA, CRITERIA_WITHOUT_DATA
from slimvlm.scoring.layerwise import score as on_disk
from slimvlm.scoring.layerwise.checkpoint import LazyCheckpoint, open_checkpoint
from slimvlm.scoring.score_model import (
    check_token_weights,
    collect,
    scores_from,
)
from slimvlm.scoring.score_model import score as score_model
from slimvlm.scoring.unit_scores import Scores


def score(
    model: str,
    config: CalibrationConfig,
    criterion: str,
    out: Path,
    memory: MemoryOptions = MemoryOptions(),
    force: bool = False,
    say: Say = print,
) -> Scores:
    """Score a model by one criterion and save what comes out, as the verb ``score`` does.

    Gram matrices can be larger than the model: they are no statistics to keep.

    Raises:
        SlimError: For anything that the user can mend; found before weights are read.
    """
    request = Request(model=model, prune=PruneConfig(criterion=(criterion,), **vars(config)))
    check_options(request.prune)
    row, stem = CRITERIA[criterion], _stem(out)
    if (weights := token_weights_of(request.prune)) is not None:
        check_token_weights(criterion, weights)
    keeps = not memory.low_memory and row.capture.layer_bytes is None
    for suffix in ("json", "safetensors", *(["statistics.safetensors"] if keeps else [])):
        require_free(Path(f"{stem}.{suffix}"), force)
    check_models(config, model)
    samples = read_split(request, say).calibration
    stem.parent.mkdir(parents=True, exist_ok=True)
    if memory.low_memory:
        opened = open_checkpoint(model, config.dtype, config.trust_remote_code)
        processor = load_processor(str(opened.folder), opened.model.config)
        calibration = Calibration(processor, samples, hold_out=False)
        folder = memory.scratch_beside(stem)
        (scores,) = scores_on_disk(request, opened, calibration, folder, say)
    else:
        loaded, processor = load_original(request)
        calibration = Calibration(processor, samples, hold_out=False)
        if keeps:
            scores = _scored_with_statistics(request, loaded, calibration, stem)
        else:
            scores = calibrate(request, loaded, calibration)[criterion]
    scores.save(stem)
    say(f"{criterion} scores of {', '.join(row.units)} written to {stem}.json")
    return scores


def _stem(out: Path) -> Path:
    return out.with_suffix("") if out.suffix in (".json", ".safetensors") else out


def _scored_with_statistics(
    request: Request, model: Any, calibration: Calibration, stem: Path
) -> Scores:
    (criterion,) = request.prune.criterion
    batches = calibration.fitted if CRITERIA[criterion].needs_data else ()
    options = criterion_options(request.prune, criterion)
    statistics = collect(model, batches, criterion, **options)
    statistics.save(f"{stem}.statistics.safetensors")
    return scores_from(statistics, model, criterion, **options)


def scores_on_disk(
    request: Request, opened: LazyCheckpoint, calibration: Calibration, scratch: Path, say: Say
) -> list[Scores]:
    """`slimvlm.runs.stages.calibrate` with one layer in memory at a time."""
    config = request.prune
    asked = []
    for name in scored_by(config):
        options = criterion_options(config, name)
        options.pop("token_weights", None)
        asked.append(on_disk.CriterionRequest(name, options))
    if not asked:
        return []
    batches = calibration.fitted if any(each.needs_data for each in asked) else ()
    weights = token_weights_of(config)
    return on_disk.score_requests(opened, batches, asked, weights, scratch, say, config.device)


def plan(
    model: str,
    config: PlanConfig,
    out: Path,
    scores: Sequence[Path] = (),
    *,
    force: bool = False,
    say: Say = print,
) -> Plan:
    """Make a plan from scores that are there already and write it, as the verb ``plan`` does.

    Raises:
        SlimError: For anything that the user can mend, such as a target that cannot be met.
    """
    require_free(out, force)
    device_named(config.device)
    shape, target = anatomy(model), _target_params(config)
    given = [Scores.load(path) for path in scores]
    options = {
        **vars(part_of(config, WidthOptions)),
        **{"axis": config.axis, "allocation": config.allocation, "kv_heads": config.kv_heads},
        "experts": config.experts,
    }
    if config.loses_tokens:
        chosen = vocabulary_for(model, config, ())
        say(chosen.line())
        options["tokens"] = chosen.tokens

    def planned(scores: Sequence[Scores]) -> Plan:
        if target is not None:
            return make_plan_for_params(shape, scores, target, **options)
        return make_plan(shape, scores, config.ratio or 0.0, **options)

    if not given:
        of_layers, of_others = CRITERIA_WITHOUT_DATA
        criteria = [of_layers] if config.axis == "depth" else [of_others]
        if config.experts and config.axis == "depth":
            criteria.append(of_others)
        rehearsed = planned([pretended_scores(shape, [name]) for name in criteria])
        if not config.loses_tokens or rehearsed.cuts_layers:
            say(f"no --scores: using {' and '.join(criteria)}")
            loaded = load(model, device=config.device)[0]
            given = [score_model(loaded, (), name) for name in criteria]
    made = planned(given)
    out.parent.mkdir(parents=True, exist_ok=True)
    made.save(out)
    return made


def _target_params(config: PlanConfig) -> int | None:
    """Parameters of the whole smaller model; None if a ratio was given instead.

    Raises:
        ConfigError: Unless exactly one of the three is given.
    """
    given = (config.ratio, config.target_params, config.target_memory)
    if config.goes_first and not any(value is not None for value in given):
        return None
    if sum(value is not None for value in given) != 1:
        raise ConfigError("plan needs exactly one of --ratio, --target-params, --target-memory")
    if config.target_params is not None:
        return parse_count(config.target_params)
    if config.target_memory is not None:
        counted_in = "bfloat16" if config.dtype == "auto" else config.dtype
        return params_for_memory(parse_bytes(config.target_memory), counted_in)
    return None
