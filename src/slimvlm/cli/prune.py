"""Write a smaller checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from slimvlm.cli.options import INLINE, Model, check_compat, check_model, load_model, read_samples
from slimvlm.cli.printing import note
from slimvlm.core.errors import ConfigError
from slimvlm.core.options import PruneConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from slimvlm.data.samples import Sample
    from slimvlm.planning.plan import Plan
    from slimvlm.pruning.repair import RepairReport

from typing import Literal

from slimvlm.core.options import CalibrationConfig


def prune(
    model: Model,
    out: Path,
    plan: Path | None = None,
    pruning: Annotated[PruneConfig, INLINE] = PruneConfig(),
    hidden_size: int | None = None,
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
        hidden_size: Narrow the residual stream to so many channels first, as the verb narrow does;
            the ratio then counts both.
        low_memory: For models larger than the memory: one layer is read at a time, activations lie
            on disk, and the checkpoint is written piece by piece.
        scratch: Folder for these activations; by default beside OUT.
        force: Replace an existing folder.
    """
    from slimvlm.core.files import require_free
    from slimvlm.planning.plan import Plan
    from slimvlm.runs.stages import check_low_memory, check_request

    require_free(out, force)
    if (plan is None) == (pruning.ratio is None):
        raise ConfigError("prune needs either --ratio or --plan")
    pruning = replace(pruning, axis=pruning.axis or "width")
    if hidden_size is not None and (plan is not None or low_memory):
        raise ConfigError(f"hidden_size {hidden_size} needs --ratio, and cannot have low_memory")
    if low_memory:
        check_low_memory(pruning)
    given = None if plan is None else Plan.load(plan)
    if given is not None:
        check_model(model, pruning)
        shown = _samples_for_repair(model, pruning)
    else:
        source: str | PreTrainedConfig = model
        if hidden_size is not None:
            source, pruning = _rest_after_narrowing(model, pruning, hidden_size)
        check_request(source, pruning, note)
        shown = read_samples(pruning, model)
    if pruning.compat:
        check_compat(model, pruning)
    if low_memory:
        folder = scratch or out.with_name(f".{out.name}.scratch")
        _prune_on_disk(model, out, given, pruning, shown, folder, force)
    else:
        _prune_in_memory(model, out, given, pruning, hidden_size, shown, force)


def _rest_after_narrowing(
    model: str, pruning: PruneConfig, hidden_size: int
) -> tuple[PreTrainedConfig, PruneConfig]:
    """The narrower model's configuration, and a request for what is then left to remove."""
    from slimvlm.models.load import load_config
    from slimvlm.pruning.narrowing import narrowed_config, narrowing_ratio
    from slimvlm.runs.stages import ratio_of

    pass

    config, ratio = load_config(model, pruning.trust_remote_code), ratio_of(pruning)
    gone = narrowing_ratio(config, hidden_size)
    if gone >= ratio:
        raise ConfigError(
            f"hidden_size {hidden_size} alone removes {gone:.1%} of the backbone, which leaves "
            f"nothing of ratio {ratio:g} for other units; narrow does that alone"
        )
    advise_width(hidden_size)
    rest = 1 - (1 - ratio) / (1 - gone)
    return narrowed_config(config, hidden_size), replace(pruning, ratio=rest)


def _prune_in_memory(
    model: str,
    out: Path,
    given: Plan | None,
    pruning: PruneConfig,
    hidden_size: int | None,
    shown: list[Sample],
    force: bool,
) -> None:
    from slimvlm.pruning.save import save
    from slimvlm.runs.stages import Calibration, choose_plan, cut_, narrow_first_

    loaded, processor = load_model(model, pruning)
    calibration = Calibration(pruning, processor, shown)
    narrowing = None if hidden_size is None else narrow_first_(loaded, hidden_size, calibration)
    plan = given or choose_plan(pruning, loaded, calibration, note)
    report = cut_(pruning, loaded, plan, calibration)
    also = None if narrowing is None else narrowing.save
    save(loaded, processor, out, plan, force, pruning.pad, also, compat=pruning.compat)
    if narrowing is not None:
        total = 1 - (1 - narrowing.ratio) * (1 - plan.ratio)
        print(
            f"removes {total:.2%} of the backbone in all; {narrowing.summary()}, and of the rest:"
        )
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
    from slimvlm.pruning.low_memory.cut import prune_checkpoint
    from slimvlm.runs.stages import plan_with_low_memory

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


def _samples_for_repair(model: str, pruning: PruneConfig) -> list[Sample]:
    """Calibration samples for a plan that is there already: repair alone reads them."""
    if pruning.repair == "none":
        return []
    if pruning.data is None:
        raise ConfigError(f"repair {pruning.repair!r} needs --data")
    return read_samples(pruning, model)


def narrow(
    model: Model,
    out: Path,
    hidden_size: int,
    calibration: Annotated[CalibrationConfig, INLINE] = CalibrationConfig(),
    criterion: Literal["activation", "magnitude", "random"] = "activation",
    seed: int = 0,
    force: bool = False,
) -> None:
    """Write a checkpoint whose hidden states have fewer channels; prune and recover it afterwards.

    Norms divide by the mean over channels, so even an unused channel is missed: recover what comes
    out.

    Args:
        model: Folder, hub id, or demo.
        out: The new checkpoint folder.
        hidden_size: Channels to keep; multiples of 128 run fastest.
        calibration: What activation reads.
        criterion: What keeps a channel: its size after the norms, the size of its weights, chance.
        seed: For random.
        force: Replace an existing folder.
    """
    from slimvlm.core.files import require_free
    from slimvlm.data.roles import parse_token_weights
    from slimvlm.models.load import load_config
    from slimvlm.pruning.card import CardFacts
    from slimvlm.pruning.narrowing import narrow_to_, narrowing_ratio
    from slimvlm.pruning.save import save
    from slimvlm.scoring.score_model import calibration_batches

    require_free(out, force)
    narrowing_ratio(load_config(model, calibration.trust_remote_code), hidden_size)
    needs_data = criterion == "activation"
    if needs_data and calibration.data is None:
        raise ConfigError("criterion 'activation' needs --data")
    samples = read_samples(calibration, model) if needs_data else []
    given = calibration.token_weights
    weights = None if given is None else parse_token_weights(given)
    advise_width(hidden_size)
    loaded, processor = load_model(model, calibration)
    batches = calibration_batches(processor, samples, 4, "channels") if needs_data else ()
    done = narrow_to_(loaded, hidden_size, batches, criterion, weights, seed)
    command = f"slimvlm narrow {model} --hidden-size {hidden_size} --criterion {criterion}"
    facts = CardFacts(base=loaded.config._name_or_path, name=out.name, command=command)
    save(loaded, processor, out, force=force, also=done.save, facts=facts)
    print(done.summary())
    print(f"checkpoint: {out}")


def advise_width(hidden_size: int) -> None:
    """Say so if a hidden size is off the multiples that matrix products like."""
    from slimvlm.models.cost import WIDTH_MULTIPLE

    if hidden_size % WIDTH_MULTIPLE:
        note(
            f"hidden_size {hidden_size} is no multiple of {WIDTH_MULTIPLE}, which would run faster"
        )
