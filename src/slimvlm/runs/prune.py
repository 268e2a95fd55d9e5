"""Write a smaller checkpoint, from a plan or a request, in memory or layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slimvlm.core.errors import ConfigError
from slimvlm.core.files import require_free
from slimvlm.core.options import LoadConfig, MemoryOptions, PruneConfig
from slimvlm.core.progress import Say
from slimvlm.data.samples import Sample
from slimvlm.models.load import anatomy, check_models, load_config
from slimvlm.planning.plan import Plan
from slimvlm.pruning.compat import require_known
from slimvlm.pruning.layerwise import score as on_disk
from slimvlm.pruning.layerwise.write import prune_checkpoint
from slimvlm.pruning.repair import RepairReport
from slimvlm.pruning.save import save
from slimvlm.runs import stages
from slimvlm.runs.request import (
    Request,
    check_options,
    check_request,
    criteria_of,
    ranked_plan,
    resolved,
)
from slimvlm.runs.score import scores_on_disk
from slimvlm.runs.stages import Calibration, read_split

_NEEDS_WHOLE_MODEL: dict[str, tuple[object, ...]] = {
    "repair": ("none", "auto"),
    "pad": (False,),
    "compat": (False,),
}
"""What low memory can do, of options that may need the whole model in memory."""


@dataclass(frozen=True)
class Pruned:
    """What `prune` did.

    Attributes:
        plan: What stays.
        repair: How the rest was repaired, if it was.
    """

    plan: Plan
    repair: RepairReport | None = None

    def summary(self) -> str:
        """A line for each part."""
        lines = [self.plan.summary()]
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
    if memory.low_memory:
        check_low_memory(config)
    given = None if plan_file is None else Plan.load(plan_file)
    request = resolved(Request(model=model, prune=config), say, memory.low_memory)
    config = request.prune
    if given is None:
        check_request(request, anatomy(model), say)
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
    return _pruned_in_memory(request, given, samples, out, force, say)


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
        on_disk.CriterionRequest(name)


def _planned_on_disk(request: Request, samples: Sequence[Sample], scratch: Path, say: Say) -> Plan:
    config = request.prune
    shape, scores = scores_on_disk(request, samples, scratch, say)
    return ranked_plan(config, shape, scores)


def _pruned_in_memory(
    request: Request,
    given: Plan | None,
    samples: Sequence[Sample],
    out: Path,
    force: bool,
    say: Say,
) -> Pruned:
    config = request.prune
    loaded, processor = stages.load_original(request)
    calibration = Calibration(processor, samples, request.hold_out)
    if (chosen := given) is None:
        scores = stages.calibrate(request, loaded, calibration)
        chosen = stages.plan(request, loaded, calibration, list(scores.values()), say)
    repair = stages.prune_(request, loaded, chosen, calibration)
    save(loaded, processor, out, chosen, force, config.pad, compat=config.compat)
    return Pruned(chosen, repair)


def check_compat(model: str, options: LoadConfig, say: Say) -> None:
    """Refuse a model that no older transformers is known to read; says which versions do."""
    versions = require_known(load_config(model, options.trust_remote_code))
    say(f"compat: also for transformers {' and '.join(versions)}")
