"""Write a smaller checkpoint, from a plan or a request, in memory or layer by layer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from slimvlm.core.errors import ConfigError
from slimvlm.core.files import new_folder, require_free
from slimvlm.core.options import MemoryOptions, PruneConfig, ReportOptions
from slimvlm.core.progress import Say
from slimvlm.core.requests import asked
from slimvlm.data.read import identity_of_data
from slimvlm.evaluation.on_data import DataResult, evaluate_data, single_result
from slimvlm.evaluation.predictions import Predictions
from slimvlm.models.load import (
    anatomy,
    check_models,
    device_named,
    load_processor,
)
from slimvlm.planning.plan import Plan
from slimvlm.pruning.card import CardFacts
from slimvlm.pruning.save import prune_checkpoint, save
from slimvlm.pruning.tokens import trimmed_processor
from slimvlm.pruning.walk.result import Walked
from slimvlm.runs import stages
from slimvlm.runs.held_out import (
    ORIGINAL,
    PRUNED,
    paired_from_files,
    predictions_from_files,
    predictions_of_original,
)
from slimvlm.runs.request import (
    Request,
    resolved,
    scored_by,
)
from slimvlm.runs.score import scores_on_disk
from slimvlm.runs.stages import Calibration, SampleSplit
from slimvlm.runs.tables import held_out_text
from slimvlm.scoring.criteria import require_low_memory
from slimvlm.scoring.layerwise.checkpoint import open_checkpoint
from slimvlm.scoring.layerwise.stores import Scratch, scratch_folder
from slimvlm.scoring.unit_scores import Scores

HELD_OUT_FILE = "slimvlm_held_out.json"


@dataclass(frozen=True)
class Pruned:
    """A smaller checkpoint that was written."""

    walked: Walked
    # of original and smaller model; empty without unseen samples
    held_out: Mapping[str, DataResult] = field(default_factory=dict)


def prune(
    model: str,
    config: PruneConfig,
    out: Path,
    *,
    plan_file: Path | None = None,
    memory: MemoryOptions = MemoryOptions(),
    report: ReportOptions = ReportOptions(),
    force: bool = False,
    say: Say = print,
) -> Pruned:
    """Write a smaller checkpoint, as the verb ``prune`` does; check all before weights are read."""
    require_free(out, force)
    is_asked = config.ratio is not None or config.tokens_first
    if (plan_file is None) != is_asked:
        raise ConfigError(
            "prune needs either --ratio or --plan, or --vocab-size or --experts alone"
        )
    plan = None if plan_file is None else Plan.load(plan_file)
    request = Request(model=model, prune=config, report_samples=report.unseen(config.samples))
    request = resolved(request, say, None if plan else anatomy(model))
    if memory.low_memory:
        if request.prune.axis == "auto":
            raise ConfigError("axis 'auto': low_memory can only do depth, width, both or chart")
        for criterion in scored_by(request.prune):
            require_low_memory(criterion)
    check_models(config, model)
    request, plan, samples = stages.settled(request, plan, config.data is not None, say)
    if memory.low_memory:
        with scratch_folder(memory.scratch_beside(out)) as folder:
            return _on_disk(request, plan, samples, out, folder, force, say)
    loaded, processor = stages.load_original(request)
    held_out: dict[str, DataResult] = {}
    if unseen := samples.report:
        kept = predictions_of_original(loaded, processor, unseen)
        held_out[ORIGINAL] = single_result(kept, unseen, loaded.device)
    calibration = Calibration(processor, samples.calibration, request.hold_out)
    scores = [] if plan else list(stages.calibrate(request, loaded, calibration).values())
    walked = stages.prune_(request, loaded, calibration, scores, plan, say=say)
    processor = trimmed_processor(processor, walked.plan)
    if unseen:
        held_out[PRUNED] = evaluate_data(loaded, processor, unseen, kept, name=PRUNED)
    base, text = loaded.config._name_or_path, held_out_text(held_out)
    facts = CardFacts(base=base, name=out.name, held_out=text)
    also = partial(_write_held_out, held_out)
    save(loaded, processor, out, walked.plan, force, also=also, facts=facts)
    return Pruned(walked, held_out)


def _on_disk(
    request: Request,
    plan: Plan | None,
    samples: SampleSplit,
    out: Path,
    scratch: Path,
    force: bool,
    say: Say,
) -> Pruned:
    """Prune with one layer in memory at a time; the same scratch folder resumes."""
    config, model, unseen = request.prune, request.model, samples.report
    device = device_named(config.device)
    opened = open_checkpoint(model, config.dtype, config.trust_remote_code)
    processor = load_processor(str(opened.folder), opened.model.config, config.trust_remote_code)
    data = [] if config.data is None else [identity_of_data(config.data)]
    noted = {"asked": asked(request), "data": data, **opened.identity}
    Scratch(scratch).keep_if_same("request.json", noted)

    calibration = Calibration(processor, samples.calibration, request.hold_out)
    scores: list[Scores] = []
    if plan is None:
        stored = scratch / "scored"
        if not stored.exists():
            found = scores_on_disk(request, opened, calibration, scratch / "scoring", say)
            with new_folder(stored) as folder:
                for each in found:
                    each.save(folder / each.criterion)
        scores = [Scores.load(stored / name) for name in scored_by(config)]

    held_out: dict[str, DataResult] = {}
    if unseen:
        path = scratch / "said.safetensors"
        if not path.exists():
            at = scratch / "unseen"
            predictions_from_files(opened, at, device, processor, unseen).save(path)
            shutil.rmtree(at, ignore_errors=True)
        kept = Predictions.load(path)
        held_out[ORIGINAL] = single_result(kept, unseen, device)

    results = Scratch(scratch / "walk")
    walked = stages.walk(request, opened, results, device, calibration, scores, plan, say)

    def describe(folder: Path) -> str:
        if unseen:
            smaller = open_checkpoint(folder, config.dtype)
            words, at = trimmed_processor(processor, walked.plan), scratch / "unseen-pruned"
            held_out[PRUNED] = paired_from_files(smaller, at, device, words, unseen, kept)
            _write_held_out(held_out, folder)
        return held_out_text(held_out)

    prune_checkpoint(
        model,
        walked.plan,
        out,
        config.dtype,
        force,
        trust_remote_code=config.trust_remote_code,
        weights=walked.weights,
        describe=describe,
    )
    return Pruned(walked, held_out)


def _write_held_out(held_out: Mapping[str, DataResult], folder: Path) -> None:
    if PRUNED in held_out:
        held_out[PRUNED].save(folder / HELD_OUT_FILE)
