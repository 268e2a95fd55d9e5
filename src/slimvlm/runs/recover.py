"""Train a smaller checkpoint back towards its teacher."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import distributed
from transformers import PreTrainedModel

from slimvlm.core.errors import ConfigError
from slimvlm.core.files import require_free, write_text
from slimvlm.core.options import LoadConfig, RecoverConfig, TrainingData
from slimvlm.core.processes import is_first_rank, num_ranks
from slimvlm.core.progress import Say
from slimvlm.models.hidden import gathered_weights
from slimvlm.models.load import check_models, load, load_as, resolve
from slimvlm.planning.plan import Plan
from slimvlm.pruning.save import PLAN_FILE, save
from slimvlm.runs.stages import samples_for
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
    """Train a pruned checkpoint towards the original, as the verb ``recover`` does.

    The checks come before weights are read.
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
    for name in filter(None, (model, teacher)):
        check_models(source, name)
    samples = samples_for(model, source, None, say)
    student, processor = _for_training(model, source, shard)
    original = None if teacher is None else _for_training(teacher, source, shard, "cpu")[0]
    plan_file = Path(resolve(model)) / PLAN_FILE
    plan = Plan.load(plan_file) if plan_file.exists() else None
    work = out.with_name(f".{out.name}.training")
    history = train(student, original, samples, config, processor, work, plan)
    if shard:
        weights = gathered_weights(student)
        if is_first_rank():  # a whole model again, in its file's data type
            student, _ = load_as(source, model, "cpu")
            missing, unexpected = student.load_state_dict(weights, strict=False)
            assert not unexpected
            assert set(missing) <= set(student.all_tied_weights_keys or {}), missing
    if is_first_rank():
        save(student, processor, out, plan, force, also=partial(_add_files, history, work))
        shutil.rmtree(work, ignore_errors=True)
    # threads that still listen when the interpreter ends can abort a process, and with it torchrun
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    return history


def _for_training(
    model: str, source: LoadConfig, shard: bool, device: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """Load a model: shards in float32; weights shared with a teacher must never go to a GPU."""
    if shard:
        return load(model, "float32", None, source.trust_remote_code, shard=True)
    return load_as(source, model, device)


def _add_files(history: History, work: Path, folder: Path) -> None:
    """Write the history, an adapter and a tracker's files into the checkpoint."""
    text = json.dumps(asdict(history), indent=1) + "\n"
    write_text(folder / "slimvlm_history.json", text)
    for name in (ADAPTER_FOLDER, TRACKER_FOLDER):
        if (work / name).exists():
            shutil.copytree(work / name, folder / name)
