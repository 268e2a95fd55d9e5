"""Write a smaller checkpoint, from a plan or a request, in memory or layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from slimvlm.core.errors import ConfigError
from slimvlm.core.files import new_folder, require_free
from slimvlm.core.options import MemoryOptions, PruneConfig
from slimvlm.core.progress import Say
from slimvlm.data.read import identity_of_data
from slimvlm.data.samples import Sample
from slimvlm.models.load import (
    anatomy,
    check_models,
    default_device,
    load_processor,
)
from slimvlm.planning.plan import Plan
from slimvlm.pruning.save import save
from slimvlm.pruning.walk.result import Walked
from slimvlm.pruning.write_checkpoint import prune_checkpoint
from slimvlm.runs import stages
from slimvlm.runs.request import (
    Request,
    check_options,
    check_request,
    resolved,
    scored_by,
)
from slimvlm.runs.score import scores_on_disk
from slimvlm.runs.stages import Calibration, read_split
from slimvlm.scoring.layerwise.checkpoint import LazyCheckpoint, open_checkpoint
from slimvlm.scoring.layerwise.stores import Scratch, scratch_folder
from slimvlm.scoring.unit_scores import Scores


def prune(
    model: str,
    config: PruneConfig,
    out: Path,
    *,
    plan_file: Path | None = None,
    memory: MemoryOptions = MemoryOptions(),
    force: bool = False,
    say: Say = print,
) -> Walked:
    """Write a smaller checkpoint, as the verb ``prune`` does.

    Raises:
        SlimError: For anything that the user can mend; found before weights are read.
    """
    require_free(out, force)
    if (plan_file is None) == (config.ratio is None):
        raise ConfigError("prune needs either --ratio or --plan")
    given = None if plan_file is None else Plan.load(plan_file)
    request = resolved(Request(model=model, prune=config), say)
    config = request.prune
    if memory.low_memory:
        check_low_memory(config)
    if given is None:
        check_request(request, anatomy(model), say)
    else:
        check_options(config)
    check_models(config, model)
    reads = given is None or config.repair != "none" or config.local_steps != 0
    samples = read_split(request, say).calibration if reads else ()
    if memory.low_memory:
        with scratch_folder(memory.scratch_beside(out)) as folder:
            return _on_disk(request, given, samples, out, folder, force, say)
    loaded, processor = stages.load_original(request)
    calibration = Calibration(processor, samples, request.hold_out)
    scores = [] if given else list(stages.calibrate(request, loaded, calibration).values())
    walked = stages.prune_(request, loaded, calibration, scores, given)
    save(loaded, processor, out, walked.plan, force, config.pad)
    return walked


def check_low_memory(config: PruneConfig) -> None:
    """Refuse what needs the whole model in memory.

    Raises:
        ConfigError: If the request does.
    """
    if config.pad:
        raise ConfigError("pad True: low_memory can only do False")
    if config.axis == "auto":
        raise ConfigError("axis 'auto': low_memory can only do depth, width, both or chart")


def _on_disk(
    request: Request,
    given: Plan | None,
    samples: Sequence[Sample],
    out: Path,
    scratch: Path,
    force: bool,
    say: Say,
) -> Walked:
    """The same with one layer in memory at a time."""
    config = request.prune
    opened = open_checkpoint(request.model, config.dtype, config.trust_remote_code)
    processor = load_processor(str(opened.folder), opened.model.config, config.trust_remote_code)
    calibration = Calibration(processor, samples, request.hold_out)
    data = [] if config.data is None else [identity_of_data(config.data)]
    noted = {"asked": asdict(request), "data": data, **opened.identity}
    Scratch(scratch).keep_if_same("request.json", noted)
    scores = [] if given else _scores_on_disk(request, opened, calibration, scratch, say)
    store = Scratch(scratch / "walk")
    walked = stages.walk(request, opened, store, default_device(), calibration, scores, given)
    trusted = config.trust_remote_code
    prune_checkpoint(
        request.model,
        walked.plan,
        out,
        config.dtype,
        force,
        trust_remote_code=trusted,
        weights=walked.weights,
    )
    return walked


def _scores_on_disk(
    request: Request, opened: LazyCheckpoint, calibration: Calibration, scratch: Path, say: Say
) -> list[Scores]:
    """Scores before the walk, which a restart does not collect again."""
    scored = scratch / "scored"
    if not scored.exists():
        found = scores_on_disk(request, opened, calibration, scratch / "scoring", say)
        with new_folder(scored) as folder:
            for scores in found:
                scores.save(folder / scores.criterion)
    return [Scores.load(scored / name) for name in scored_by(request.prune)]
