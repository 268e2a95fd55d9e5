"""Train a smaller model back, with its teacher in memory or on disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from slimvlm.config import RecoverConfig
from slimvlm.errors import ConfigError
from slimvlm.verbs.options import INLINE, Model, TrainingData, check_model, load_model, read_samples
from slimvlm.verbs.printing import note

if TYPE_CHECKING:
    from slimvlm.offline_teacher import OfflineTeacher


def recover(
    model: Model,
    source: Annotated[TrainingData, INLINE],
    out: Path,
    teacher: str | None = None,
    training: Annotated[RecoverConfig, INLINE] = RecoverConfig(),
    force: bool = False,
) -> None:
    """Train a pruned checkpoint back towards the original model.

    Stopped runs go on where they were when the same command is given again.

    Args:
        model: The pruned checkpoint.
        source: What to learn from.
        out: The recovered checkpoint folder.
        teacher: The original model, or a folder that cache-teacher wrote; not needed for --loss
            sft.
        training: How to train.
        force: Replace an existing folder.
    """
    from slimvlm.checkpoint import PLAN_FILE, resolve, save
    from slimvlm.outputs import require_free, write_text
    from slimvlm.plan import Plan
    from slimvlm.recovery import ADAPTER_FOLDER
    from slimvlm.recovery import recover as train

    require_free(out, force)
    if set(training.loss_weights) == {"sft"}:
        teacher = None
    elif teacher is None:
        raise ConfigError(f"loss {training.loss!r} needs --teacher")
    check_model(model, source)
    answers = _written_answers(teacher)
    if teacher is not None and answers is None:
        check_model(teacher, source)
    chosen = read_samples(source)
    student, processor = load_model(model, source)
    original = None
    if teacher is not None and answers is None:
        original, _ = load_model(teacher, source, "cpu")  # what it shares never goes to a GPU
    plan_file = Path(resolve(model)) / PLAN_FILE
    plan = Plan.load(plan_file) if plan_file.exists() else None
    work = out.with_name(f".{out.name}.training")
    history = train(student, original or answers, chosen, training, processor, work, plan)
    save(student, processor, out, plan, force)
    write_text(out / "slimvlm_history.json", json.dumps(asdict(history), indent=1) + "\n")
    if training.keep_adapter:
        shutil.move(work / ADAPTER_FOLDER, out / ADAPTER_FOLDER)
    shutil.rmtree(work, ignore_errors=True)
    note(f"teacher: {history.teacher}")
    note(f"trained on {history.num_samples} samples; checkpoint in {out}")


def _written_answers(teacher: str | None) -> OfflineTeacher | None:
    """What cache-teacher wrote, if that is what the user named."""
    from slimvlm.offline_teacher import OfflineTeacher, is_cache

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
        force: Replace an existing folder.
    """
    from slimvlm.offline_teacher import is_cache, write_cache
    from slimvlm.outputs import require_free

    if not is_cache(out):
        require_free(out, force)
    for name, value in (("k", k), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name} {value} must be at least 1")
    check_model(model, source)
    chosen = read_samples(source)
    loaded, processor = load_model(model, source)
    if force and out.exists():
        shutil.rmtree(out)
    count = write_cache(loaded, processor, chosen, out, what, k, kd_on, batch_size)
    note(f"{what} of {len(chosen)} samples in {out}; shards written now: {count}")
