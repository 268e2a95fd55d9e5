"""Write a smaller checkpoint, from a plan or a request, in memory or layer by layer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slimvlm.core.errors import ConfigError
from slimvlm.core.files import new_folder, require_free
from slimvlm.core.options import MemoryOptions, PruneConfig, ReportOptions
from slimvlm.core.progress import Say, silent
from slimvlm.core.requests import asked
from slimvlm.data.read import identity_of_data
from slimvlm.data.samples import Sample
from slimvlm.evaluation.on_data import DataResult, evaluate_data
from slimvlm.evaluation.predictions import Predictions
from slimvlm.models.load import (
    anatomy,
    check_models,
    device_named,
    load_processor,
)
from slimvlm.planning.plan import Plan
from slimvlm.pruning.card import CardFacts
from slimvlm.pruning.save import save
from slimvlm.pruning.tokens import trimmed_processor
from slimvlm.pruning.walk.result import Walked
from slimvlm.pruning.write_checkpoint import prune_checkpoint
from slimvlm.runs import stages
from slimvlm.runs.held_out import (
    ORIGINAL,
    PRUNED,
    paired_from_files,
    predictions_from_files,
    predictions_of_original,
    result_of,
)
from slimvlm.runs.request import (
    Request,
    check_options,
    check_request,
    resolved,
    scored_by,
)
from slimvlm.runs.score import scores_on_disk
from slimvlm.runs.stages import Calibration, SampleSplit, read_split
from slimvlm.runs.tables import held_out_text
from slimvlm.runs.tokens import tokens_alone, with_tokens
from slimvlm.scoring.criteria import require_low_memory
from slimvlm.scoring.layerwise.checkpoint import LazyCheckpoint, open_checkpoint
from slimvlm.scoring.layerwise.stores import Scratch, scratch_folder
from slimvlm.scoring.unit_scores import Scores

HELD_OUT_FILE = "slimvlm_held_out.json"


@dataclass(frozen=True)
class Pruned:
    """A smaller checkpoint that was written.

    Attributes:
        walked: What was cut, and how.
        held_out: What was kept on samples that nothing was fitted to: of the original and of the
            smaller model; empty if none were kept apart.
    """

    walked: Walked
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
    """Write a smaller checkpoint, as the verb ``prune`` does.

    Raises:
        SlimError: For anything that the user can mend; found before weights are read.
    """
    require_free(out, force)
    is_asked = config.ratio is not None or config.goes_first
    if (plan_file is None) != is_asked:
        raise ConfigError(
            "prune needs either --ratio or --plan, or --vocab-size or --experts alone"
        )
    given = None if plan_file is None else Plan.load(plan_file)
    request = Request(model=model, prune=config, report_samples=report.unseen(config.samples))
    has_no_data = config.data is None
    request = resolved(request, say, None if given else anatomy(model))
    config = request.prune
    if memory.low_memory:
        check_low_memory(config)
    if given is None:
        check_request(request, anatomy(model), silent if config.loses_tokens else say)
    else:
        check_options(config)
    check_models(config, model)
    stages.tell_lost_heads(request, say)
    samples = read_split(request, say)
    if given is None:
        counted = [] if has_no_data else samples.counted(request)
        request = with_tokens(request, counted, say)
        given = tokens_alone(request, anatomy(model))
        if given is None and config.loses_tokens:
            check_request(request, anatomy(model), say)
    if memory.low_memory:
        with scratch_folder(memory.scratch_beside(out)) as folder:
            return _on_disk(request, given, samples, out, folder, force, say)
    loaded, processor = stages.load_original(request)
    held_out: dict[str, DataResult] = {}
    if unseen := samples.report:
        kept = predictions_of_original(loaded, processor, unseen)
        held_out[ORIGINAL] = result_of(kept, unseen, loaded.device)
    calibration = Calibration(processor, samples.calibration, request.hold_out)
    scores = [] if given else list(stages.calibrate(request, loaded, calibration).values())
    walked = stages.prune_(request, loaded, calibration, scores, given, say=say)
    processor = trimmed_processor(processor, walked.plan)
    if unseen:
        held_out[PRUNED] = evaluate_data(loaded, processor, unseen, kept, name=PRUNED)
    facts = CardFacts(
        base=loaded.config._name_or_path, name=out.name, held_out=held_out_text(held_out)
    )
    save(
        loaded,
        processor,
        out,
        walked.plan,
        force,
        pad=config.pad,
        also=partial(_write_held_out, held_out),
        facts=facts,
    )
    return Pruned(walked, held_out)


def _write_held_out(held_out: Mapping[str, DataResult], folder: Path) -> None:
    if PRUNED in held_out:
        held_out[PRUNED].save(folder / HELD_OUT_FILE)


def check_low_memory(config: PruneConfig) -> None:
    """Refuse what needs the whole model in memory.

    Raises:
        ConfigError: If the request does.
    """
    if config.pad:
        raise ConfigError("pad True: low_memory can only do False")
    if config.axis == "auto":
        raise ConfigError("axis 'auto': low_memory can only do depth, width, both or chart")
    for criterion in scored_by(config):
        require_low_memory(criterion)


def _on_disk(
    request: Request,
    given: Plan | None,
    samples: SampleSplit,
    out: Path,
    scratch: Path,
    force: bool,
    say: Say,
) -> Pruned:
    """The same with one layer in memory at a time."""
    config = request.prune
    device = device_named(config.device)
    opened = open_checkpoint(request.model, config.dtype, config.trust_remote_code)
    processor = load_processor(str(opened.folder), opened.model.config, config.trust_remote_code)
    calibration = Calibration(processor, samples.calibration, request.hold_out)
    data = [] if config.data is None else [identity_of_data(config.data)]
    noted = {"asked": asked(request), "data": data, **opened.identity}
    Scratch(scratch).keep_if_same("request.json", noted)
    scores = [] if given else _scores_on_disk(request, opened, calibration, scratch, say)
    held_out: dict[str, DataResult] = {}
    if unseen := samples.report:
        kept = _predictions_on_disk(opened, device, processor, unseen, scratch)
        held_out[ORIGINAL] = result_of(kept, unseen, device)

    def measured(folder: Path) -> str:
        if unseen:
            smaller = open_checkpoint(folder, config.dtype)
            words, at = trimmed_processor(processor, walked.plan), scratch / "unseen-pruned"
            held_out[PRUNED] = paired_from_files(smaller, at, device, words, unseen, kept)
            _write_held_out(held_out, folder)
        return held_out_text(held_out)

    results = Scratch(scratch / "walk")
    walked = stages.walk(request, opened, results, device, calibration, scores, given, say)
    trusted = config.trust_remote_code
    prune_checkpoint(
        request.model,
        walked.plan,
        out,
        config.dtype,
        force,
        trust_remote_code=trusted,
        weights=walked.weights,
        describe=measured,
    )
    return Pruned(walked, held_out)


def _predictions_on_disk(
    opened: LazyCheckpoint,
    device: torch.device,
    processor: Any,
    samples: Sequence[Sample],
    scratch: Path,
) -> Predictions:
    """Compute the original's predictions, or read those of a stopped run."""
    path = scratch / "said.safetensors"
    if not path.exists():
        found = predictions_from_files(opened, scratch / "unseen", device, processor, samples)
        found.save(path)
        shutil.rmtree(scratch / "unseen", ignore_errors=True)
    return Predictions.load(path)


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
