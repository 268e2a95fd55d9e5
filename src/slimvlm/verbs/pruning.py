"""Write a smaller checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from slimvlm.config import PruneConfig
from slimvlm.errors import ConfigError
from slimvlm.verbs.options import INLINE, Model, check_model, load_model, read_samples
from slimvlm.verbs.printing import note

if TYPE_CHECKING:
    from slimvlm.plan import Plan
    from slimvlm.repair import RepairReport
    from slimvlm.samples import Sample


def prune(
    model: Model,
    out: Path,
    plan: Path | None = None,
    pruning: Annotated[PruneConfig, INLINE] = PruneConfig(),
    low_memory: bool = False,
    scratch: Path | None = None,
    force: bool = False,
) -> None:
    """Write a smaller checkpoint, from a plan or from a ratio, criterion and data.

    Args:
        model: Folder, hub id, or demo.
        out: The new checkpoint folder.
        plan: A plan file instead of ratio, axis, criterion and allocation.
        pruning: What to remove, and how.
        low_memory: For models larger than the memory: one layer is read at a time, activations lie
            on disk, and the checkpoint is written piece by piece.
        scratch: Folder for these activations; by default beside OUT.
        force: Replace an existing folder.
    """
    from slimvlm.checkpoint import load_config
    from slimvlm.compat import require_known
    from slimvlm.outputs import require_free
    from slimvlm.plan import Plan
    from slimvlm.pruning import check_low_memory, check_request

    require_free(out, force)
    if (plan is None) == (pruning.ratio is None):
        raise ConfigError("prune needs either --ratio or --plan")
    pruning = replace(pruning, axis=pruning.axis or "width")
    if low_memory:
        check_low_memory(pruning)
    given = None if plan is None else Plan.load(plan)
    if given is not None:
        shown = _samples_for_repair(pruning)
        check_model(model, pruning)
    else:
        shown = check_request(model, pruning, note, pruning.samples)
    if pruning.compat:
        versions = require_known(load_config(model, pruning.trust_remote_code))
        note(f"compat: also for transformers {' and '.join(versions)}")
    if low_memory:
        folder = scratch or out.with_name(f".{out.name}.scratch")
        _prune_on_disk(model, out, given, pruning, shown, folder, force)
    else:
        _prune_in_memory(model, out, given, pruning, shown, force)


def _prune_in_memory(
    model: str,
    out: Path,
    given: Plan | None,
    pruning: PruneConfig,
    shown: list[Sample],
    force: bool,
) -> None:
    from slimvlm.checkpoint import save
    from slimvlm.pruning import Calibration, choose_plan, cut_

    loaded, processor = load_model(model, pruning)
    calibration = Calibration(pruning, processor, shown)
    plan = given or choose_plan(pruning, loaded, calibration, note)
    report = cut_(pruning, loaded, plan, calibration)
    save(loaded, processor, out, plan, force, pad=pruning.pad, compat=pruning.compat)
    _report(plan, out, report)


def _prune_on_disk(
    model: str,
    out: Path,
    given: Plan | None,
    pruning: PruneConfig,
    shown: list[Sample],
    scratch: Path,
    force: bool,
) -> None:
    from slimvlm.pruning import plan_with_low_memory
    from slimvlm.streaming import prune_checkpoint

    plan = given or plan_with_low_memory(pruning, model, shown, scratch, note)
    trusted = pruning.trust_remote_code
    prune_checkpoint(model, plan, out, pruning.dtype, force, trust_remote_code=trusted)
    _report(plan, out)


def _report(chosen: Plan, out: Path, repair: RepairReport | None = None) -> None:
    print(chosen.summary())
    if chosen.needs_retype:
        print(f"language model written as {chosen.after.text_type!r}, which computes the same")
    if repair is not None:
        print(repair.summary())
    print(f"checkpoint: {out}")


def _samples_for_repair(pruning: PruneConfig) -> list[Sample]:
    """Calibration samples for a plan that is there already: repair alone reads them."""
    if pruning.repair == "none":
        return []
    if pruning.data is None:
        raise ConfigError(f"repair {pruning.repair!r} needs --data")
    return read_samples(pruning)
