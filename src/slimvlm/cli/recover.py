"""Train a smaller model back, with its teacher in memory or on disk."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from slimvlm.cli.options import (
    INLINE,
    Model,
    TrainingData,
    check_compat,
    check_model,
    load_model,
    read_samples,
)
from slimvlm.cli.printing import note
from slimvlm.core.errors import ConfigError
from slimvlm.core.options import LoadConfig, RecoverConfig
from slimvlm.core.processes import is_first_rank, num_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slimvlm.planning.plan import Plan
    from slimvlm.training.offline import OfflineTeacher
    from slimvlm.training.recover import History


def recover(
    model: Model,
    source: Annotated[TrainingData, INLINE],
    out: Path,
    teacher: str | None = None,
    training: Annotated[RecoverConfig, INLINE] = RecoverConfig(),
    shard: bool = False,
    force: bool = False,
    compat: bool = False,
) -> None:
    """Train a pruned checkpoint back towards the original model.

    Stopped runs go on where they were when the same command is given again. With torchrun, several
    processes share the batches.

    Args:
        model: The pruned checkpoint.
        source: What to learn from.
        out: The recovered checkpoint folder.
        teacher: The original model, or a folder that cache-teacher wrote; not needed for --loss
            sft.
        training: How to train.
        shard: Divide the weights of model and teacher among the processes of torchrun (FSDP2); such
            a run cannot go on after a stop.
        force: Replace an existing folder.
        compat: Write files that transformers 4.57 and 5.0 load right, too.
    """
    from slimvlm.core.files import require_free
    from slimvlm.models.load import resolve
    from slimvlm.planning.plan import Plan
    from slimvlm.pruning.save import PLAN_FILE
    from slimvlm.training.recover import recover as train

    require_free(out, force)
    if not training.needs_teacher:
        teacher = None
    elif teacher is None:
        raise ConfigError(f"loss {training.loss!r} needs --teacher")
    if shard and num_ranks() < 2:
        raise ConfigError("--shard needs several processes: start slimvlm with torchrun")
    check_model(model, source)
    if compat:
        check_compat(model, source)
    said = _written_answers(teacher)
    original = teacher if said is None else None
    if original is not None:
        check_model(original, source)
    chosen = read_samples(source, model)
    student, processor = _for_training(model, source, shard)
    teaching = said if original is None else _for_training(original, source, shard, "cpu")[0]
    plan_file = Path(resolve(model)) / PLAN_FILE
    plan = Plan.load(plan_file) if plan_file.exists() else None
    work = out.with_name(f".{out.name}.training")
    history = train(student, teaching, chosen, training, processor, work, plan)
    if shard:
        student = _gathered(student, model, source)
    if is_first_rank():
        _write(out, student, processor, plan, history, work, force, compat)
    note(f"teacher: {history.teacher}")
    note(f"trained on {history.num_samples} samples; checkpoint in {out}")


def _for_training(
    model: str, source: LoadConfig, shard: bool, device: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """Shards learn in float32. What a whole teacher shares with its student never goes to a GPU."""
    if shard:
        return load_model(model, replace(source, dtype="float32"), shard=True)
    return load_model(model, source, device)


def _gathered(sharded: PreTrainedModel, model: str, source: LoadConfig) -> PreTrainedModel:
    """A sharded model as a whole one in its file's data type, in the first process."""
    from slimvlm.models.sharding import fill_, gathered_weights

    weights = gathered_weights(sharded)
    if not is_first_rank():
        return sharded
    whole, _ = load_model(model, source, "cpu")
    fill_(whole, weights)
    return whole


def _write(
    out: Path,
    model: PreTrainedModel,
    processor: Any,
    plan: Plan | None,
    history: History,
    work: Path,
    force: bool,
    compat: bool,
) -> None:
    from slimvlm.core.files import write_text
    from slimvlm.pruning.save import save
    from slimvlm.training.recover import ADAPTER_FOLDER, TRACKER_FOLDER

    def add_history(folder: Path) -> None:
        text = json.dumps(asdict(history), indent=1) + "\n"
        write_text(folder / "slimvlm_history.json", text)
        for name in (ADAPTER_FOLDER, TRACKER_FOLDER):
            if (work / name).exists():
                shutil.copytree(work / name, folder / name)

    save(model, processor, out, plan, force, also=add_history, compat=compat)
    shutil.rmtree(work, ignore_errors=True)


def _written_answers(teacher: str | None) -> OfflineTeacher | None:
    """What cache-teacher wrote, if that is what the user named."""
    from slimvlm.training.offline import OfflineTeacher, is_cache

    return OfflineTeacher(teacher) if teacher is not None and is_cache(teacher) else None


def cache_teacher(
    model: Model,
    source: Annotated[TrainingData, INLINE],
    out: Path,
    what: Literal["hidden", "top-k"] = "hidden",
    k: int = 64,
    kd_on: Literal["answer", "text", "all"] = "answer",
    batch_size: int = 8,
    force: bool = False,
) -> None:
    """Write down what a teacher says about some data, for recover without a teacher in memory.

    Stopped runs go on where they were when the same command is given again.

    Args:
        model: The original model.
        source: What recover will learn from.
        out: The folder to write; recover takes it as --teacher.
        what: Final hidden states (bfloat16), or the largest logits.
        k: How many logits for each position.
        kd_on: Positions that recover will compare.
        batch_size: Samples that run at once.
        force: Replace an existing folder; it stays until the new one is whole.
    """
    from slimvlm.core.files import held, replacement, require_free
    from slimvlm.training.offline import is_cache, write_cache

    if not is_cache(out):
        require_free(out, force)
    for name, value in (("k", k), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name} {value} must be at least 1")
    check_model(model, source)
    chosen = read_samples(source, model)
    loaded, processor = load_model(model, source)
    with held(out), replacement(out) if force else nullcontext(out) as folder:
        count = write_cache(loaded, processor, chosen, folder, what, k, kd_on, batch_size, force)
    note(f"{what} of {len(chosen)} samples in {out}; shards written now: {count}")
