"""From a request to a plan, and from a plan to a smaller model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from slimvlm.core.errors import ConfigError
from slimvlm.core.options import Axis, DataConfig, PruneConfig
from slimvlm.core.progress import progress
from slimvlm.data.read import load_samples
from slimvlm.data.roles import parse_token_weights
from slimvlm.data.samples import Sample
from slimvlm.models.anatomy import Anatomy, read_anatomy
from slimvlm.models.load import anatomy as anatomy_of
from slimvlm.models.load import load_config, load_processor, resolve
from slimvlm.planning.make import make_plan
from slimvlm.planning.plan import Plan
from slimvlm.planning.search import search_plan
from slimvlm.planning.steps import plan_in_steps
from slimvlm.pruning.cut import prune_
from slimvlm.pruning.low_memory.opened import open_checkpoint
from slimvlm.pruning.low_memory.score import Request, score_opened
from slimvlm.pruning.narrowing import Narrowing, narrow_to_
from slimvlm.pruning.repair import RepairReport, prune_and_repair_
from slimvlm.runs.recipes import recipe_for
from slimvlm.scoring.criteria import CRITERIA, DEFAULT_CRITERIA, criterion_named
from slimvlm.scoring.score_model import calibration_batches, score
from slimvlm.scoring.statistics import Statistics
from slimvlm.scoring.unit_scores import Scores
from slimvlm.scoring.without_data import score_random

HELD_OUT_EVERY = 4
"""Every so manyth calibration sample judges plans and repairs instead of making them."""

_BATCH = 4
_LEVELS = {"balanced": "uniform", "search": "layer"}

Say = Callable[[str], None]


@dataclass
class Calibration:
    """The calibration samples of a request as model inputs, encoded when first needed."""

    config: PruneConfig
    processor: Any
    samples: Sequence[Sample]

    @cached_property
    def fitted(self) -> list[dict[str, Any]]:
        """Batches that scores and repairs come from."""
        samples = self._shown
        if self.config.needs_held_out and len(samples) >= HELD_OUT_EVERY:
            samples = [s for i, s in enumerate(samples, 1) if i % HELD_OUT_EVERY]
        return list(calibration_batches(self.processor, samples, _BATCH, "encode"))

    @cached_property
    def held_out(self) -> list[dict[str, Any]]:
        """Batches that judge; of fewer than four samples all."""
        samples = self._shown
        if len(samples) >= HELD_OUT_EVERY:
            samples = samples[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        return list(calibration_batches(self.processor, samples, _BATCH, "encode held-out"))

    @property
    def _shown(self) -> list[Sample]:
        return list(self.samples[: self.config.samples])


def axis_of(config: PruneConfig) -> Axis:
    """The axis, by the study's chart if none was given."""
    return config.axis or recipe_for(ratio_of(config), config.trains).axis


def ratio_of(config: PruneConfig) -> float:
    """The ratio.

    Raises:
        ConfigError: If there is none.
    """
    if config.ratio is None:
        raise ConfigError("ratio: say which share of the backbone to remove")
    return config.ratio


def criteria_of(config: PruneConfig) -> tuple[str, ...]:
    """The criteria; without data, ones that need none."""
    if config.criterion:
        return config.criterion
    if config.data is None:
        return ("spacing", "magnitude")
    return DEFAULT_CRITERIA[axis_of(config)]


def check_request(model: str | PreTrainedConfig, config: PruneConfig, say: Say) -> None:
    """Find every mistake that can be found without weights and data.

    Args:
        model: Folder, hub id, ``demo`` or a configuration.
        config: The request.
        say: Receives notes.

    Raises:
        SlimError: If an option or the ratio cannot work for this model.
    """
    check_options(config)
    rehearse_request(anatomy_of(model), config)
    if config.data is None:
        say(f"no data: scoring by {' and '.join(criteria_of(config))}")


def check_options(config: PruneConfig) -> None:
    """Find every mistake that neither a model nor data is needed for.

    Raises:
        ConfigError: If an option is unknown or needs data that is not given.
    """
    rows = {name: criterion_named(name, {}) for name in criteria_of(config)}
    data_bound = [name for name, row in rows.items() if row.needs_data]
    if data_bound and config.data is None:
        raise ConfigError(f"criterion {data_bound[0]!r} needs --data")
    if config.token_weights is not None:
        parse_token_weights(config.token_weights)
        if not data_bound:
            raise ConfigError(f"token_weights {config.token_weights!r}: no criterion reads data")
    if config.data is None:
        for name, free in (("repair", ("none", "auto")), ("steps", (1,))):
            if getattr(config, name) not in free:
                raise ConfigError(f"{name} {getattr(config, name)!r} needs --data")
        if config.allocation == "search":
            raise ConfigError("allocation 'search' needs --data")


def rehearse_request(anatomy: Anatomy, config: PruneConfig) -> None:
    """Find out whether a model of this shape can be pruned as asked.

    Raises:
        SlimError: What `make_plan` would raise after the weights were read and scored.
    """
    rehearse(
        anatomy,
        criteria_of(config),
        ratio_of(config),
        axis_of(config),
        allocation=config.allocation if config.allocation not in _LEVELS else "uniform",
        **_plan_options(config),
    )


def rehearse(
    anatomy: Anatomy, criteria: Iterable[str], ratio: float, axis: str, **options: Any
) -> None:
    """Find out whether a plan is possible, with random scores in place of real ones.

    Raises:
        SlimError: What `make_plan` would raise after the weights were read and scored.
    """
    pretended = score_random(Statistics(), anatomy)
    units = {unit for name in criteria for unit in CRITERIA[name].units}
    scores = Scores(", ".join(criteria), **{unit: pretended.of(unit) for unit in units})
    make_plan(anatomy, scores, ratio, axis, **options)


def choose_plan(
    config: PruneConfig,
    model: PreTrainedModel,
    calibration: Calibration,
    say: Say,
    folder: Path | None = None,
    given: Sequence[Scores] | None = None,
) -> Plan:
    """Score a loaded model and make the plan.

    Args:
        config: The request.
        model: The model.
        calibration: Its calibration data.
        say: Receives what a search found.
        folder: Where to keep the scores and the state of a search, if anywhere.
        given: Scores by the request's criteria, if they are known already.
    """
    ratio, axis = ratio_of(config), axis_of(config)
    options = _plan_options(config)
    allocation = config.allocation
    if allocation == "balanced" and (axis == "depth" or config.data is None):
        allocation = "uniform"
    if config.steps > 1:
        criteria = {name: _criterion_options(config, name) for name in criteria_of(config)}
        options["allocation"] = "uniform" if allocation in _LEVELS else allocation
        return plan_in_steps(
            model, calibration.fitted, criteria, ratio, axis, config.steps, **options
        )
    given = given or _scores(config, model, calibration, folder)
    if allocation not in _LEVELS:
        return make_plan(read_anatomy(model), given, ratio, axis, allocation, **options)
    found = search_plan(
        model,
        given,
        calibration.held_out,
        ratio,
        axis,
        level=_LEVELS[allocation],
        passes=config.search_passes,
        state_file=None if folder is None else folder / "search.json",
        **options,
    )
    say(f"search: {len(found.trials)} plans measured, least divergence {found.divergence:.4f}")
    return found.plan


def check_low_memory(config: PruneConfig) -> None:
    """Refuse what needs the whole model in memory.

    Raises:
        ConfigError: If the request does.
    """
    free: dict[str, tuple[object, ...]] = {
        "repair": ("none",),
        "steps": (1,),
        "pad": (False,),
        "compat": (False,),
        "allocation": ("uniform", "balanced", "protect", "global"),
    }
    for name, allowed in free.items():
        if getattr(config, name) not in allowed:
            choices = " or ".join(str(value) for value in allowed)
            raise ConfigError(f"{name} {getattr(config, name)!r}: low_memory can only do {choices}")
    for name in criteria_of(config) if config.ratio is not None else ():
        Request(name)


def plan_with_low_memory(
    config: PruneConfig, model: str, samples: Sequence[Sample], scratch: Path, say: Say
) -> Plan:
    """Score a checkpoint that does not fit in memory and make the plan.

    Widths are the same in every layer unless ``protect`` or ``global`` is asked for: measuring
    plans, as ``balanced`` does, needs the whole model.

    Args:
        config: The request, checked by `check_low_memory`.
        model: Folder, hub id or ``demo``.
        samples: The calibration samples.
        scratch: Folder for activations between layers.
        say: Receives the size of that folder.
    """
    opened = open_checkpoint(model, config.dtype, config.trust_remote_code)
    processor = load_processor(str(opened.folder), opened.model.config, config.trust_remote_code)
    requests = []
    for name in criteria_of(config):
        options = _criterion_options(config, name)
        options.pop("token_weights", None)
        requests.append(Request(name, options))
    batches: Iterable[Any] = ()
    if any(CRITERIA[request.criterion].needs_data for request in requests):
        batches = calibration_batches(processor, samples, description="embed")
    scores = score_opened(opened, batches, requests, _token_weights(config), scratch, say)
    allocation = "uniform" if config.allocation in _LEVELS else config.allocation
    return make_plan(
        read_anatomy(opened.model),
        scores,
        ratio_of(config),
        axis_of(config),
        allocation,
        **_plan_options(config),
    )


def cut_(
    config: PruneConfig, model: PreTrainedModel, plan: Plan, calibration: Calibration
) -> RepairReport | None:
    """Prune a model in place, with the repair that the request asks for; none without data."""
    if config.repair == "none" or config.data is None:
        prune_(model, plan)
        return None
    return prune_and_repair_(
        model,
        plan,
        calibration.fitted,
        config.repair,
        token_weights=_token_weights(config),
        held_out=calibration.held_out if config.repair == "auto" else None,
    )


def narrow_first_(model: PreTrainedModel, hidden_size: int, calibration: Calibration) -> Narrowing:
    """Narrow a model's residual stream in place, by its weights if the request has no data."""
    config = calibration.config
    if config.data is None:
        return narrow_to_(model, hidden_size, criterion="magnitude")
    weights = _token_weights(config)
    return narrow_to_(model, hidden_size, calibration.fitted, token_weights=weights)


def score_by(
    config: PruneConfig, model: PreTrainedModel, calibration: Calibration, criterion: str
) -> Scores:
    """Scores by one of the request's criteria."""
    batches: Any = ()
    if CRITERIA[criterion].needs_data:
        batches = progress(calibration.fitted, criterion)
    return score(model, batches, criterion, **_criterion_options(config, criterion))


def _scores(
    config: PruneConfig, model: PreTrainedModel, calibration: Calibration, folder: Path | None
) -> list[Scores]:
    given = []
    for name in criteria_of(config):
        scores = score_by(config, model, calibration, name)
        if folder is not None:
            scores.save(folder / name)
        given.append(scores)
    return given


def _criterion_options(config: PruneConfig, criterion: str) -> dict[str, Any]:
    options = CRITERIA[criterion].requested(config)
    if CRITERIA[criterion].needs_data and config.token_weights is not None:
        options["token_weights"] = _token_weights(config)
    return options


def _token_weights(config: PruneConfig) -> dict[str, float] | None:
    return None if config.token_weights is None else parse_token_weights(config.token_weights)


def _plan_options(config: PruneConfig) -> dict[str, Any]:
    return {"protect": config.protect, "round_to": config.round_to, "units": config.units}


def samples_for(
    model: str | Path, source: DataConfig, limit: int | None, warn: Callable[[str], None]
) -> list[Sample]:
    """The conversations that options name, as far as a model can read them.

    Args:
        model: Folder, hub id or ``demo``; only its processor is read.
        source: The options; without ``data`` there is no sample.
        limit: Read only the first so many good samples.
        warn: Receives one line for each row that was skipped.

    Raises:
        SlimError: As `load_samples` does.
    """
    if source.data is None:
        return []
    trusted = source.trust_remote_code
    processor = load_processor(resolve(model), load_config(model, trusted), trusted)
    return load_samples(
        source.data, source.images, limit, source.max_bad, warn, processor, source.max_length
    )
