"""Score a model, or plan from scores: one stage alone, from a model's folder to files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slimvlm.core.errors import ConfigError
from slimvlm.core.files import require_free
from slimvlm.core.options import (
    CalibrationConfig,
    MemoryOptions,
    PlanConfig,
    PruneConfig,
)
from slimvlm.core.progress import Say
from slimvlm.models.cost import params_of_target
from slimvlm.models.load import anatomy, check_models, device_named, load_processor
from slimvlm.planning.make import make_plan, make_plan_for_params
from slimvlm.planning.plan import Plan
from slimvlm.runs.request import (
    Request,
    check_options,
    criterion_options,
    dummy_scores,
    resolved,
    scored_by,
    token_weights_of,
    vocabulary_for,
)
from slimvlm.runs.stages import Calibration, calibrate, load_original, read_split
from slimvlm.scoring.criteria import CRITERIA, require_low_memory
from slimvlm.scoring.layerwise.checkpoint import LazyCheckpoint, open_checkpoint
from slimvlm.scoring.score_model import check_token_weights, score_by_layer
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
    """Score a model by one criterion, as the verb ``score`` does; save the scores."""
    request = Request(model=model, prune=PruneConfig(criterion=(criterion,), **vars(config)))
    check_options(request.prune)
    if memory.low_memory:
        require_low_memory(criterion)
    if (weights := token_weights_of(request.prune)) is not None:
        check_token_weights(criterion, weights)
    stem = out.with_suffix("") if out.suffix in (".json", ".safetensors") else out
    for suffix in ("json", "safetensors"):
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
        scores = calibrate(request, loaded, calibration)[criterion]
    scores.save(stem)
    say(f"{criterion} scores of {', '.join(CRITERIA[criterion].units)} written to {stem}.json")
    return scores


def scores_on_disk(
    request: Request, opened: LazyCheckpoint, calibration: Calibration, scratch: Path, say: Say
) -> list[Scores]:
    """Score like `slimvlm.runs.stages.calibrate`, with one layer in memory at a time."""
    config = request.prune
    asked = {name: criterion_options(config, name) for name in scored_by(config)}
    if not asked:
        return []
    for options in asked.values():
        options.pop("token_weights", None)
    batches = calibration.fitted if any(CRITERIA[name].needs_data for name in asked) else ()
    weights = token_weights_of(config)
    return score_by_layer(opened, batches, asked, weights, scratch, say, config.device)


def plan(
    model: str,
    config: PlanConfig,
    out: Path,
    scores: Sequence[Path] = (),
    *,
    force: bool = False,
    say: Say = print,
) -> Plan:
    """Make and write a plan, as the verb ``plan`` does; score on the demo's data without scores."""
    require_free(out, force)
    device_named(config.device)
    shape, target = anatomy(model), _target_params(config)
    given = [Scores.load(path) for path in scores]
    options = {
        **config.of_widths,
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
        ratio = (config.ratio or 0.0) if target is None else 0.5  # any ratio: 0 needs fewer scores
        wanted = PruneConfig(data="demo", ratio=ratio, axis=config.axis, experts=config.experts)
        criteria = resolved(Request(model=model, prune=wanted), shape=shape).prune.criterion
        dry = planned([dummy_scores(shape, [name]) for name in criteria])
        if not config.loses_tokens or dry.cuts_layers:
            say(f"no --scores: using {' and '.join(criteria)} on the demo's conversations")
            wanted = PruneConfig(
                data="demo", too_long="cut", criterion=criteria, device=config.device
            )
            request = Request(model=model, prune=wanted)
            samples = read_split(request, say).calibration
            loaded, processor = load_original(request)
            scored = calibrate(request, loaded, Calibration(processor, samples, hold_out=False))
            given = list(scored.values())
    made = planned(given)
    out.parent.mkdir(parents=True, exist_ok=True)
    made.save(out)
    return made


def _target_params(config: PlanConfig) -> int | None:
    """Return the parameters of the smaller model, None with a ratio; refuse two targets or none."""
    given = (config.ratio, config.target_params, config.target_memory)
    if config.tokens_first and not any(value is not None for value in given):
        return None
    if sum(value is not None for value in given) != 1:
        raise ConfigError("plan needs exactly one of --ratio, --target-params, --target-memory")
    counted_in = "bfloat16" if config.dtype == "auto" else config.dtype
    return params_of_target(config.target_params, config.target_memory, counted_in)
