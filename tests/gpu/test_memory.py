"""What the card holds: a walk, a walk from files, a whole run; and what a dry run says of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import slimvlm as sv
from slimvlm.core.options import CompressConfig, RecoverConfig
from slimvlm.core.progress import silent
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.classes import auto_class
from slimvlm.models.cost import release_memory, weight_bytes
from slimvlm.pruning.walk.walk import states_bytes
from slimvlm.runs.advise import dry_run, dry_run_rows
from tests import pretended_gpu, tiny
from tests import tiny_folder as folders

pytestmark = pytest.mark.usefixtures("unhurried")
counted = pytest.mark.skipif(
    pretended_gpu.REASON is not None, reason="only the pretended card counts every byte"
)
HIDDEN, LAYERS, BATCHES, TOKENS = 128, 12, 4, 16
GRAMS = 6 * 4 * HIDDEN**2
"""Gram matrices of a layer, in float32, as many as a walk holds at one time."""


@pytest.fixture
def model() -> Any:
    """A model whose layers are most of it, and large beside what tiny batches need."""
    config = hf.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=folders.VOCAB,
    )
    return auto_class(config).from_config(config, dtype=torch.float32).eval()


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    """The same as a checkpoint."""
    model.save_pretrained(tmp_path / "model")
    folders.processor("text").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path: Path) -> str:
    return str(folders.write_llava_data(tmp_path / "data", count=20, pictures=False))


class Peak:
    """What a card has held at most since this was made, beyond what it held then."""

    def __init__(self) -> None:
        release_memory()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    @property
    def bytes(self) -> int:
        return torch.cuda.max_memory_allocated() - self.before


def batches(model: Any) -> list[dict[str, torch.Tensor]]:
    return [tiny.batch(model, TOKENS, seed) for seed in range(BATCHES)]


def layer_bytes(model: Any) -> int:
    return 4 * max(layer.params for layer in read_anatomy(model).layers)


@counted
@pytest.mark.parametrize("local_steps", [0, 2])
def test_a_walk_needs_little_beyond_the_model(
    local_steps: int, model: Any, card: torch.device
) -> None:
    """A sixth of the weights, one layer that learns, and what it reads of the batches."""
    model.to(card)
    layer, weights = layer_bytes(model), weight_bytes(read_anatomy(model), "float32")
    data, peak = batches(model), Peak()
    sv.walk_(model, data[:3], 0.3, held_out=data[3:], local_steps=local_steps)
    states = states_bytes(HIDDEN, BATCHES * TOKENS, 4, aims=True)
    learning = 4 * layer if local_steps else layer
    assert peak.bytes < 0.15 * weights + states + max(GRAMS, learning)


@counted
def test_a_walk_from_files_needs_two_layers(
    model: Any, folder: Path, tmp_path: Path, card: torch.device
) -> None:
    data, peak = batches(model), Peak()
    sv.walk_checkpoint(folder, data[:3], tmp_path / "out", 0.3, held_out=data[3:], device=card)
    states = states_bytes(HIDDEN, BATCHES * TOKENS, 4, aims=True)
    assert 0 < peak.bytes < 2 * layer_bytes(model) + states + GRAMS
    assert peak.bytes < weight_bytes(read_anatomy(model), "float32") / 3


CONFIG = CompressConfig(ratio=0.3, axis="width", samples=8, report_samples=2, local_steps=0)
RECOVER = RecoverConfig(train="lora", loss="sft+hidden", max_steps=2, batch_size=2)


@counted
def test_a_run_leaves_nothing_on_the_card(folder: Path, data: str, tmp_path: Path) -> None:
    peak = Peak()
    sv.compress(
        str(folder), replace(CONFIG, data=data, recover=RECOVER), tmp_path / "run", say=silent
    )
    release_memory()
    assert peak.bytes > 0
    assert torch.cuda.memory_allocated() == peak.before


RUNS: dict[str, dict[str, Any]] = {
    "walk": {},
    "local steps": {"local_steps": 2},
    "taylor": {"criterion": ("taylor",), "repair": "none"},
    "lora": {"criterion": ("magnitude",), "repair": "none", "recover": RECOVER},
    "full": {
        "criterion": ("magnitude",),
        "repair": "none",
        "recover": RecoverConfig(train="full", loss="sft", max_steps=2, batch_size=2),
    },
}


ON_FULL_CARD = ("walk", "local steps")


@counted
@pytest.mark.parametrize(
    ("name", "is_full"),
    [*((name, False) for name in RUNS), *((name, True) for name in ON_FULL_CARD)],
)
def test_a_dry_run_says_what_a_run_takes(
    name: str, is_full: bool, model: Any, folder: Path, data: str, tmp_path: Path
) -> None:
    """On a full card, two models are neither timed in turn nor both there to be compared."""
    config = replace(CONFIG, data=data, **RUNS[name])
    room = 4 * weight_bytes(read_anatomy(model), "float32") // 3 if is_full else 1 << 30
    release_memory()
    with pretended_gpu.limit(room):
        said, peak = dry_run(str(folder), config, silent).cost, Peak()
        sv.compress(str(folder), config, tmp_path / "run", say=silent)
    assert max(said.calibration_bytes, said.training_bytes) == pytest.approx(peak.bytes, rel=0.25)


@counted
def test_a_dry_run_says_where_states_go_and_what_does_not_fit(folder: Path, data: str) -> None:
    config = replace(CONFIG, data=data, recover=RECOVER)

    def rows(room: int) -> dict[str, str]:
        release_memory()
        with pretended_gpu.limit(room):
            found = dry_run(str(folder), config, silent)
        return {row[0]: row[1] for row in dry_run_rows(found)}

    enough, little = rows(1 << 30), rows(4 << 20)
    assert "GiB on cuda:0 (" in enough["hidden states"]
    assert "in host memory" in little["hidden states"]
    assert "more than" not in enough["memory of pruning"] + enough["memory of training"]
    assert "free on cuda:0: prune --low-memory" in little["memory of pruning"]
    assert "free on cuda:0: a smaller --batch-size" in little["memory of training"]
