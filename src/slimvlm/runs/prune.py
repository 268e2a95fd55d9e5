"""Write a smaller checkpoint, from a plan or a request, in memory or layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from slimvlm.core.errors import ConfigError
from slimvlm.core.files import require_free
from slimvlm.core.options import CalibrationConfig, LoadConfig, MemoryOptions, PruneConfig
from slimvlm.data.samples import Sample
from slimvlm.models.cost import WIDTH_MULTIPLE
from slimvlm.models.load import anatomy, check_models, load_config
from slimvlm.planning.plan import Plan
from slimvlm.pruning.card import CardFacts
from slimvlm.pruning.compat import require_known
from slimvlm.pruning.low_memory import score as on_disk
from slimvlm.pruning.low_memory.cut import prune_checkpoint
from slimvlm.pruning.narrowing import Narrowing, narrow_to_, narrowed_config, narrowing_ratio
from slimvlm.pruning.repair import RepairReport
from slimvlm.pruning.save import save
from slimvlm.runs import stages
from slimvlm.runs.request import (
    Request,
    Say,
    check_options,
    check_request,
    criteria_of,
    ranked_plan,
    ratio_of,
    resolved,
    token_weights_of,
)
from slimvlm.runs.score import scores_on_disk
from slimvlm.runs.stages import Calibration, read_split
from slimvlm.scoring.score_model import calibration_batches

_NEEDS_WHOLE_MODEL: dict[str, tuple[object, ...]] = {
    "repair": ("none", "auto"),
    "steps": (1,),
    "pad": (False,),
    "compat": (False,),
    "allocation": (None, "uniform", "balanced", "protect", "global"),
}
"""What low memory can do, of options that may need the whole model in memory."""


@dataclass(frozen=True)
class Pruned:
    """What `prune` did.

    Attributes:
        plan: What stays.
        repair: How the rest was repaired, if it was.
        narrowing: Which channels of the residual stream went before, if any did.
    """

    plan: Plan
    repair: RepairReport | None = None
    narrowing: Narrowing | None = None

    def summary(self) -> str:
        """A line for each part."""
        lines = [self.plan.summary()]
        if self.narrowing is not None:
            total = 1 - (1 - self.narrowing.ratio) * (1 - self.plan.ratio)
            lines.insert(
                0,
                f"removes {total:.2%} of the backbone in all; {self.narrowing.summary()}, and of "
                "the rest:",
            )
        if self.plan.needs_retype:
            kind = self.plan.after.text_type
            lines.append(f"language model written as {kind!r}, which computes the same")
        if self.repair is not None:
            lines.append(self.repair.summary())
        return "\n".join(lines)


def prune(
    model: str,
    config: PruneConfig,
    out: Path,
    *,
    plan_file: Path | None = None,
    hidden_size: int | None = None,
    memory: MemoryOptions = MemoryOptions(),
    force: bool = False,
    say: Say = print,
) -> Pruned:
    """Write a smaller checkpoint, as the verb ``prune`` does.

    Raises:
        SlimError: For anything that the user can mend; found before weights are read.
    """
    require_free(out, force)
    if (plan_file is None) == (config.ratio is None):
        raise ConfigError("prune needs either --ratio or --plan")
    if hidden_size is not None and (plan_file is not None or memory.low_memory):
        raise ConfigError(f"hidden_size {hidden_size} needs --ratio, and cannot have low_memory")
    if memory.low_memory:
        check_low_memory(config)
    given = None if plan_file is None else Plan.load(plan_file)
    source: str | PreTrainedConfig = model
    if hidden_size is not None:
        source, config = _rest_after_narrowing(model, config, hidden_size, say)
    request = resolved(Request(model=model, prune=config), say, memory.low_memory)
    config = request.prune
    if given is None:
        check_request(request, anatomy(source), say)
    else:
        check_options(config)
    check_models(config, model)
    reads = given is None or config.repair != "none"
    samples = read_split(request, say).calibration if reads else ()
    if config.compat:
        check_compat(model, config, say)
    if memory.low_memory:
        folder = memory.scratch_beside(out)
        chosen = given or _planned_on_disk(request, samples, folder, say)
        trusted = config.trust_remote_code
        prune_checkpoint(model, chosen, out, config.dtype, force, trust_remote_code=trusted)
        return Pruned(chosen)
    return _pruned_in_memory(request, given, hidden_size, samples, out, force, say)


def check_low_memory(config: PruneConfig) -> None:
    """Refuse what needs the whole model in memory.

    Raises:
        ConfigError: If the request does.
    """
    for name, allowed in _NEEDS_WHOLE_MODEL.items():
        if getattr(config, name) not in allowed:
            choices = " or ".join(str(value) for value in allowed if value is not None)
            raise ConfigError(f"{name} {getattr(config, name)!r}: low_memory can only do {choices}")
    for name in criteria_of(config) if config.ratio is not None else ():
        on_disk.Request(name)


def _planned_on_disk(request: Request, samples: Sequence[Sample], scratch: Path, say: Say) -> Plan:
    config = request.prune
    shape, scores = scores_on_disk(request, samples, scratch, say)
    return ranked_plan(config, shape, scores)


def _pruned_in_memory(
    request: Request,
    given: Plan | None,
    hidden_size: int | None,
    samples: Sequence[Sample],
    out: Path,
    force: bool,
    say: Say,
) -> Pruned:
    config = request.prune
    loaded, processor = stages.load_original(request)
    calibration = Calibration(processor, samples, request.hold_out)
    narrowing = None if hidden_size is None else narrow_(request, loaded, hidden_size, calibration)
    if (chosen := given) is None:
        scores = stages.calibrate(request, loaded, calibration)
        chosen = stages.plan(request, loaded, calibration, list(scores.values()), say)
    repair = stages.prune_(request, loaded, chosen, calibration)
    also = None if narrowing is None else narrowing.save
    save(loaded, processor, out, chosen, force, config.pad, also, compat=config.compat)
    return Pruned(chosen, repair, narrowing)


def check_compat(model: str, options: LoadConfig, say: Say) -> None:
    """Refuse a model that no older transformers is known to read; says which versions do."""
    versions = require_known(load_config(model, options.trust_remote_code))
    say(f"compat: also for transformers {' and '.join(versions)}")


def narrow(
    model: str,
    config: CalibrationConfig,
    out: Path,
    hidden_size: int,
    criterion: str = "activation",
    *,
    force: bool = False,
    say: Say = print,
) -> Narrowing:
    """Write a checkpoint whose hidden states have fewer channels, as the verb ``narrow`` does.

    Raises:
        SlimError: For anything that the user can mend; found before weights are read.
    """
    require_free(out, force)
    narrowing_ratio(load_config(model, config.trust_remote_code), hidden_size)
    needs_data = criterion == "activation"
    if needs_data and config.data is None:
        raise ConfigError("criterion 'activation' needs --data")
    request = Request(model=model, prune=PruneConfig(**vars(config)))
    samples = read_split(request, say).calibration if needs_data else ()
    weights = token_weights_of(request.prune)
    _advise_width(hidden_size, say)
    loaded, processor = stages.load_original(request)
    batches = calibration_batches(processor, samples, 4, "channels") if needs_data else ()
    done = narrow_to_(loaded, hidden_size, batches, criterion, weights, config.seed)
    command = f"slimvlm narrow {model} --hidden-size {hidden_size} --criterion {criterion}"
    facts = CardFacts(base=loaded.config._name_or_path, name=out.name, command=command)
    save(loaded, processor, out, force=force, also=done.save, facts=facts)
    return done


def narrow_(
    request: Request, model: PreTrainedModel, hidden_size: int, calibration: Calibration
) -> Narrowing:
    """Narrow a model's residual stream in place, by its weights if the request has no data."""
    if request.prune.data is None:
        return narrow_to_(model, hidden_size, criterion="magnitude")
    weights = token_weights_of(request.prune)
    return narrow_to_(model, hidden_size, calibration.fitted, token_weights=weights)


def _rest_after_narrowing(
    model: str, config: PruneConfig, hidden_size: int, say: Say
) -> tuple[PreTrainedConfig, PruneConfig]:
    """The narrower model's configuration, and a request for what is then left to remove."""
    whole, ratio = load_config(model, config.trust_remote_code), ratio_of(config)
    gone = narrowing_ratio(whole, hidden_size)
    if gone >= ratio:
        raise ConfigError(
            f"hidden_size {hidden_size} alone removes {gone:.1%} of the backbone, which leaves "
            f"nothing of ratio {ratio:g} for other units; narrow does that alone"
        )
    _advise_width(hidden_size, say)
    rest = 1 - (1 - ratio) / (1 - gone)
    return narrowed_config(whole, hidden_size), replace(config, ratio=rest)


def _advise_width(hidden_size: int, say: Say) -> None:
    """Say so if a hidden size is off the multiples that matrix products like."""
    if hidden_size % WIDTH_MULTIPLE:
        say(f"hidden_size {hidden_size} is no multiple of {WIDTH_MULTIPLE}, which would run faster")
