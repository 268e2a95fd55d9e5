"""What a teacher says about some data, on disk: training then needs no teacher in memory.

A cache is a folder. ``index.json`` holds the request: teacher, data, positions. Each shard of
samples is one safetensors file. Finished shards stay, so that a stopped run goes on behind them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimvlm.core.documents import built, read_object
from slimvlm.core.errors import ConfigError
from slimvlm.core.files import new_file, require_ours
from slimvlm.core.options import DIVERGENCES, HIDDEN_LOSSES, Positions, RecoverConfig
from slimvlm.core.progress import progress
from slimvlm.core.requests import digest, is_begun_for, note_request, require_same_request
from slimvlm.data.chat import encode_samples
from slimvlm.data.images import identifying_bytes
from slimvlm.data.samples import Sample
from slimvlm.models.hidden import (
    compared_positions,
    hidden_states,
    is_sharded,
    require_finite_values,
)
from slimvlm.models.load import digest_of_weights
from slimvlm.models.parts import family_of, text_config_of

INDEX_FILE = "index.json"
FORMAT = "slimvlm-teacher/2"
SHARD_SAMPLES = 64


@dataclass(frozen=True)
class Index:
    """What a cache holds.

    Attributes:
        teacher: Fingerprint of the teacher.
        head: Fingerprint of its head alone.
        kd_on: The positions: ``answer``, ``text`` or ``all``.
        hidden_size: Width of the teacher's hidden states.
        samples: Names of the samples, in order.
        contents: A hash of each sample's conversation and pictures.
        format: Version of the folder's layout.
    """

    teacher: str
    head: str
    kd_on: Positions
    hidden_size: int
    samples: tuple[str, ...]
    contents: tuple[str, ...]
    format: str = FORMAT


def is_cache(folder: str | Path) -> bool:
    """Whether a folder is a teacher's cache rather than a model."""
    return (Path(folder) / INDEX_FILE).is_file()


def write_cache(
    model: PreTrainedModel,
    processor: Any,
    samples: Sequence[Sample],
    out: str | Path,
    kd_on: Positions = "answer",
    batch_size: int = 8,
    force: bool = False,
) -> int:
    """Run a teacher over some data and keep its final hidden states, in bfloat16.

    The losses hidden and cosine compare with them, and kl, rkl and jsd as long as the student's
    head does not learn.

    If the folder holds a part of the same cache, only the rest is done.

    Args:
        model: The teacher.
        processor: Its processor or tokenizer.
        samples: The conversations.
        out: The folder.
        kd_on: Positions that will be compared.
        batch_size: Samples that run at once.
        force: Remove what else the folder holds.

    Returns:
        Shards that were written now.

    Raises:
        ConfigError: If the folder holds something else.
    """
    head = _head(model)
    index = Index(
        teacher=digest_of_weights(model),
        head=digest_of_weights(head),
        kd_on=kd_on,
        hidden_size=int(text_config_of(model.config).hidden_size),
        samples=tuple(sample.id for sample in samples),
        contents=tuple(map(digest_of_sample, samples)),
    )
    folder = Path(out)
    if force and folder.exists() and not is_begun_for(folder / INDEX_FILE, asdict(index)):
        require_ours(folder)
        shutil.rmtree(folder)
    _claim(folder, index)
    missing = [n for n in range(num_shards(index)) if not shard_path(folder, n).exists()]
    for number in progress(missing, "teacher"):
        start = number * SHARD_SAMPLES
        chosen = samples[start : start + SHARD_SAMPLES]
        batches = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
        parts = [_said(model, processor, batch, index) for batch in batches]
        tensors = {name: torch.cat([part[0][name] for part in parts]) for name in parts[0][0]}
        encoded = [code for part in parts for code in part[1]]
        _write_shard(shard_path(folder, number), tensors, encoded)
    return len(missing)


class OfflineTeacher:
    """A finished cache.

    Args:
        folder: From `write_cache`.

    Raises:
        ConfigError: If it is not a cache, or not finished.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = _read_index(self.folder)
        count = num_shards(self.index)
        done = sum(shard_path(self.folder, number).exists() for number in range(count))
        if done < count:
            raise ConfigError(
                f"teacher {str(folder)!r}: {done} of {count} shards are there. Give the "
                "cache-teacher command again to finish it"
            )
        self._places = {code: place for place, code in enumerate(self.index.contents)}

    def require_fit(
        self, model: PreTrainedModel, samples: Sequence[Sample], config: RecoverConfig
    ) -> None:
        """Check that the cache answers everything that a training will ask.

        Raises:
            ConfigError: If data, positions or losses do not match; the message names the first.
        """
        where, index = f"teacher {str(self.folder)!r}", self.index
        if config.kd_on not in ("auto", index.kd_on):
            raise ConfigError(f"{where} holds kd_on {index.kd_on!r}, not {config.kd_on!r}")
        if config.paper_exact:
            raise ConfigError(f"{where} lacks positions that paper_exact compares")
        if config.hidden_layers == "mapped":
            raise ConfigError(f"{where} holds final hidden states, not hidden_layers 'mapped'")
        logit_losses = config.loss_weights.keys() & set(DIVERGENCES)
        if logit_losses and not self._has_head_of(model, config):
            raise ConfigError(
                f"{where} holds hidden states. {sorted(logit_losses)[0]!r} from them needs a model "
                "with the teacher's head, undivided, and train 'lora' or 'projector'"
            )
        width = int(text_config_of(model.config).hidden_size)
        if set(HIDDEN_LOSSES) & config.loss_weights.keys() and width != index.hidden_size:
            raise ConfigError(
                f"{where}: hidden_size is {index.hidden_size}, the model's is {width}"
            )
        missing = [s.id for s in samples if digest_of_sample(s) not in self._places]
        if missing:
            known = "with other content " if missing[0] in self.index.samples else ""
            more = f" and {len(missing) - 1} more samples" * (len(missing) > 1)
            raise ConfigError(f"{where} lacks sample {missing[0]!r} {known}of the data{more}")

    def _has_head_of(self, model: PreTrainedModel, config: RecoverConfig) -> bool:
        """Whether a model has the teacher's head and keeps it; not known of a divided one."""
        if config.train == "full" or is_sharded(model):
            return False
        return digest_of_weights(_head(model)) == self.index.head

    def targets(
        self, samples: Sequence[Sample], inputs: dict[str, Tensor], positions: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "N D"]:
        """The teacher's final hidden states at the positions of a batch, in their order.

        Raises:
            ConfigError: If a sample has other tokens or positions than when the cache was made.
        """
        codes = digests_of_encodings(inputs, positions)
        rows = [self._of(sample, code) for sample, code in zip(samples, codes, strict=True)]
        return torch.cat(rows)

    def _of(self, sample: Sample, code: str) -> Float[Tensor, "N D"]:
        number, place = divmod(self._places[digest_of_sample(sample)], SHARD_SAMPLES)
        with safe_open(shard_path(self.folder, number), framework="pt") as shard:
            if json.loads(shard.metadata()["encoded"])[place] != code:
                raise ConfigError(
                    f"teacher {str(self.folder)!r}: sample {sample.id!r} had other tokens or "
                    "positions when the cache was made"
                )
            counts = shard.get_tensor("counts")
            stop = int(counts[: place + 1].sum())
            start = stop - int(counts[place])
            states: Tensor = shard.get_slice("hidden")[start:stop]
            return states


def digest_of_sample(sample: Sample) -> str:
    """A hash of a sample's conversation and pictures.

    A picture in a file counts by its name and size, so that data can be moved and need not be read.
    """
    pictures = (identifying_bytes(image, may_move=True) for image in sample.images)
    return digest([[sample.id, sample.messages], *pictures])[:24]


def digests_of_encodings(inputs: dict[str, Tensor], positions: Bool[Tensor, "B T"]) -> list[str]:
    """A hash of each sequence's tokens and compared positions; padding does not matter."""
    codes = []
    lengths = inputs["attention_mask"].sum(1).tolist()
    for ids, where, length in zip(inputs["input_ids"], positions, lengths, strict=True):
        both = torch.stack([ids[:length], where[:length].to(ids)]).cpu()
        codes.append(digest([both.numpy().tobytes()])[:16])
    return codes


def num_shards(index: Index) -> int:
    """Files that a finished cache has."""
    return -(-len(index.samples) // SHARD_SAMPLES)


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"shard-{number:05}.safetensors"


@torch.no_grad()
def _said(
    model: PreTrainedModel, processor: Any, samples: Sequence[Sample], index: Index
) -> tuple[dict[str, Tensor], list[str]]:
    """A teacher's hidden states for a batch, and the hashes of its sequences."""
    inputs = encode_samples(processor, samples)
    labels = inputs.pop("labels")
    positions = compared_positions(model.config, inputs, labels, index.kd_on)
    on_device = {name: value.to(model.device) for name, value in inputs.items()}
    (hidden,) = hidden_states(model, on_device)
    rows = hidden[positions.to(hidden.device)]
    require_finite_values(rows, f"the teacher's hidden states of sample {samples[0].id!r}")
    said = {"counts": positions.sum(1), "hidden": rows.bfloat16().cpu()}
    return said, digests_of_encodings(inputs, positions)


def _write_shard(path: Path, tensors: dict[str, Tensor], encoded: list[str]) -> None:
    with new_file(path) as partial:
        save_file(tensors, partial, {"encoded": json.dumps(encoded)})


def _claim(folder: Path, index: Index) -> None:
    """Make the folder this cache's, or find that it is already."""
    if not folder.exists() or not any(folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
        note_request(folder / INDEX_FILE, asdict(index))
        return
    what = f"output {str(folder)!r} is a cache"
    cure = "Choose another folder, or use --force to replace it"
    require_same_request(asdict(_read_index(folder)), asdict(index), what, cure)


def _read_index(folder: Path) -> Index:
    values = read_object(folder / INDEX_FILE, "teacher's cache")
    index = built(Index, values, f"teacher's cache {str(folder)!r}")
    if index.format != FORMAT:
        raise ConfigError(f"teacher {str(folder)!r}: format must be {FORMAT!r}")
    return index


def _head(model: PreTrainedModel) -> nn.Module:
    return model.get_submodule(family_of(model.config.model_type).head)
