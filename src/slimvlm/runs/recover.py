"""Train a smaller checkpoint back, with its teacher in memory or on disk."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import distributed
from transformers import PreTrainedModel

from slimvlm.core.errors import ConfigError
from slimvlm.core.files import held, replacement, require_free, write_text
from slimvlm.core.options import LoadConfig, Positions, RecoverConfig, Said, TrainingData
from slimvlm.core.processes import is_first_rank, num_ranks
from slimvlm.core.progress import Say
from slimvlm.evaluation.written import DATA_FILE, is_written, write_answers
from slimvlm.models.hidden import fill_, gathered_weights
from slimvlm.models.load import check_models, load, load_as, resolve
from slimvlm.planning.plan import Plan
from slimvlm.pruning.save import PLAN_FILE, save
from slimvlm.runs.stages import samples_for
from slimvlm.training.offline import OfflineTeacher, is_cache, write_cache
from slimvlm.training.recover import ADAPTER_FOLDER, TRACKER_FOLDER, History
from slimvlm.training.recover import recover as train


def recover(
    model: str,
    source: TrainingData,
    config: RecoverConfig,
    out: Path,
    *,
    teacher: str | None = None,
    shard: bool = False,
    force: bool = False,
    say: Say = print,
) -> History:
    """Train a pruned checkpoint towards the original and write it, as the verb ``recover`` does.

    Raises:
        SlimError: For anything that the user can mend; found before weights are read.
    """
    require_free(out, force)
    if not config.needs_teacher:
        teacher = None
    elif teacher is None:
        raise ConfigError(f"loss {config.loss!r} needs --teacher")
    if shard and num_ranks() < 2:
        raise ConfigError("--shard needs several processes: start slimvlm with torchrun")
    if shard and source.device is not None:
        raise ConfigError(f"device {source.device!r}: with --shard every process has its own")
    check_models(source, model)
    said = OfflineTeacher(teacher) if teacher is not None and is_cache(teacher) else None
    original = teacher if said is None else None
    if original is not None:
        check_models(source, original)
    chosen = samples_for(model, source, source.samples, say)
    student, processor = _for_training(model, source, shard)
    teaching = said if original is None else _for_training(original, source, shard, "cpu")[0]
    plan_file = Path(resolve(model)) / PLAN_FILE
    plan = Plan.load(plan_file) if plan_file.exists() else None
    work = out.with_name(f".{out.name}.training")
    history = train(student, teaching, chosen, config, processor, work, plan)
    if shard:
        student = _gathered(student, model, source)
    if is_first_rank():
        also = partial(_write_beside, history, work)
        save(student, processor, out, plan, force, also=also)
        shutil.rmtree(work, ignore_errors=True)
    _leave_processes()
    return history


def _leave_processes() -> None:
    """End the talk with the other processes of torchrun.

    Threads that still listen when the interpreter ends can abort a process, and then torchrun ends
    all of them, whatever they have done.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _write_beside(history: History, work: Path, folder: Path) -> None:
    """What stands beside recovered weights: the history, an adapter and a tracker's files."""
    text = json.dumps(asdict(history), indent=1) + "\n"
    write_text(folder / "slimvlm_history.json", text)
    for name in (ADAPTER_FOLDER, TRACKER_FOLDER):
        if (work / name).exists():
            shutil.copytree(work / name, folder / name)


def _for_training(
    model: str, source: LoadConfig, shard: bool, device: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """Shards learn in float32. What a whole teacher shares with its student never goes to a GPU."""
    if shard:
        return load(model, "float32", None, source.trust_remote_code, shard=True)
    return load_as(source, model, device)


def _gathered(sharded: PreTrainedModel, model: str, source: LoadConfig) -> PreTrainedModel:
    """A sharded model as a whole one in its file's data type, in the first process."""
    weights = gathered_weights(sharded)
    if not is_first_rank():
        return sharded
    whole, _ = load_as(source, model, "cpu")
    fill_(whole, weights)
    return whole


def cache_teacher(
    model: str,
    source: TrainingData,
    out: Path,
    kd_on: Positions = "answer",
    batch_size: int = 8,
    *,
    what: Said = "hidden",
    max_new_tokens: int = 256,
    force: bool = False,
    say: Say = print,
) -> None:
    """Write down what a teacher says about some data, as the verb ``cache-teacher`` does.

    Raises:
        SlimError: For anything that the user can mend; found before weights are read.
    """
    is_begun = is_cache if what == "hidden" else is_written
    if not is_begun(out):
        require_free(out, force)
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ConfigError(f"{name} {value} must be at least 1")
    check_models(source, model)
    chosen = samples_for(model, source, source.samples, say)
    loaded, processor = load_as(source, model)
    with held(out), replacement(out) if force else nullcontext(out) as folder:
        if what == "answers":
            write_answers(loaded, processor, chosen, folder, max_new_tokens, batch_size)
            say(f"the teacher's answers to {len(chosen)} conversations: {out / DATA_FILE}")
            return
        count = write_cache(loaded, processor, chosen, folder, kd_on, batch_size, force)
    say(f"hidden states of {len(chosen)} samples in {out}; shards written now: {count}")
