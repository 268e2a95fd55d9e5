"""A training's folder of checkpoints: whose it is, and where to go on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedModel, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from slimvlm.core.documents import read_object
from slimvlm.core.errors import ConfigError
from slimvlm.core.options import RecoverConfig
from slimvlm.core.processes import is_first_rank, num_ranks
from slimvlm.core.requests import digest, note_request, noted_request, require_same_request
from slimvlm.data.samples import Sample
from slimvlm.models.hidden import is_sharded
from slimvlm.models.load import digest_of_weights
from slimvlm.training.offline import OfflineTeacher
from slimvlm.training.trainer import TRAINED_FILE

REQUEST_FILE = "request.json"


def claim_training(
    folder: Path,
    model: PreTrainedModel,
    teacher: PreTrainedModel | OfflineTeacher | None,
    config: RecoverConfig,
    samples: list[Sample],
) -> None:
    """Write a training's request into its folder of checkpoints; no other may go on there.

    Args:
        folder: Where checkpoints go; made if it is not there.
        model: The model before training.
        teacher: What it is trained against.
        config: How it is trained.
        samples: What it learns from, in order.

    Raises:
        ConfigError: If the folder belongs to another request.
    """
    request = {
        "config": asdict(config),
        "processes": num_ranks(),
        "model": _identity(model),
        "teacher": _identity(teacher),
        "samples": [sample.id for sample in samples],
        "conversations": digest([[sample.messages for sample in samples]]),
    }
    file = folder / REQUEST_FILE
    what = f"training folder {str(folder)!r} belongs to a run"
    cure = "Remove it, or give those options and data again"
    require_same_request(noted_request(file), request, what, cure)
    if is_first_rank():
        folder.mkdir(parents=True, exist_ok=True)
        note_request(file, request)


def _identity(source: PreTrainedModel | OfflineTeacher | None) -> str | None:
    """What a model or a teacher's cache is known by; None of a divided model, whole nowhere."""
    if isinstance(source, OfflineTeacher):
        return digest([asdict(source.index)])
    return None if source is None or is_sharded(source) else digest_of_weights(source)


def last_complete_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint whose writing was not cut short; None if there is none."""
    found = [
        path
        for path in folder.glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdecimal()
        and (path / TRAINED_FILE).is_file()
        and _is_json(path / TRAINER_STATE_NAME)
    ]
    newest = max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return str(newest) if newest is not None else None


def is_finished(checkpoint: str) -> bool:
    """Whether a checkpoint is that of a training's last step."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    return bool(state.global_step >= state.max_steps)


def _is_json(path: Path) -> bool:
    """Whether a file was written to its end: the Trainer writes its state last."""
    try:
        read_object(path, "training state")
    except ConfigError:
        return False
    return True
