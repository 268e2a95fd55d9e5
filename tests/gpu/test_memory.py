"""What a card holds, what a dry run says of it, and what happens where there is no room."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers as hf

import slimvlm as sv
from slimvlm.core.options import CompressConfig, RecoverConfig
from slimvlm.core.progress import silent
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.cost import weight_bytes
from slimvlm.models.devices import release_memory
from slimvlm.models.load import auto_class
from slimvlm.pruning.walk.engine import Steps, WalkConfig
from slimvlm.pruning.walk.walk import plans_for, states_bytes, walk
from slimvlm.runs.advise import dry_run, dry_run_rows
from slimvlm.scoring import stores
from slimvlm.scoring.layerwise import Live
from slimvlm.scoring.stores import Memory, Scratch, StatesPlace
from tests import pretended_gpu, tiny
from tests import tiny_folder as folders
from tests.gpu.alike import assert_close, config, llava, pretended
from tests.handmade import random_scores
from tests.tiers import tiered

pytestmark = pytest.mark.usefixtures("unhurried")
HIDDEN, LAYERS, BATCHES, TOKENS = 128, 12, 4, 16
GRAMS = 6 * 4 * HIDDEN**2
"""Gram matrices of a layer, in float32, as many as a walk holds at one time."""


@pytest.fixture
def model():
    """A model whose layers are most of it, and large beside what tiny batches need."""
    config = hf.LlamaConfig(
        **{"hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": folders.VOCAB},
    )
    return auto_class(config).from_config(config, dtype=torch.float32).eval()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    folders.processor("text").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path):
    return str(folders.write_llava_data(tmp_path / "data", count=20, pictures=False))


class Peak:
    """What a card has held at most since this was made, beyond what it held then."""

    def __init__(self):
        release_memory()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    @property
    def bytes(self):
        return torch.cuda.max_memory_allocated() - self.before


@pretended
def test_a_walk_from_files_needs_two_layers(model, folder, tmp_path, card):
    data, peak = [tiny.batch(model, TOKENS, seed) for seed in range(BATCHES)], Peak()
    layer = 4 * max(shape.params for shape in read_anatomy(model).layers)
    sv.walk_checkpoint(folder, data[:3], tmp_path / "out", 0.3, held_out=data[3:], device=card)
    states = states_bytes(HIDDEN, BATCHES * TOKENS, 4, aims=True)
    assert 0 < peak.bytes < 2 * layer + states + GRAMS
    assert peak.bytes < weight_bytes(read_anatomy(model), "float32") / 3


CONFIG = CompressConfig(
    **{"ratio": 0.3, "axis": "width", "samples": 8, "test_samples": 2, "local_steps": 0},
    **{"general_text": 0.0, "recover": None},
)
RECOVER = RecoverConfig(train="lora", loss="sft+hidden", max_steps=2, batch_size=2)
FULL = RecoverConfig(train="full", loss="sft", max_steps=2, batch_size=2)
SCORED = {"criterion": ("magnitude",), "repair": "none"}
RUNS = {
    **{"walk": {}, "local steps": {"local_steps": 2}},
    "taylor": {"criterion": ("taylor",), "repair": "none"},
    **{"lora": {**SCORED, "recover": RECOVER}, "full": {**SCORED, "recover": FULL}},
}
ON_FULL_CARD = ("walk", "local steps")


@pretended
@pytest.mark.parametrize(
    ("name", "is_full"),
    tiered(
        [*((name, False) for name in RUNS), *((name, True) for name in ON_FULL_CARD)],
        lambda name, is_full: name == ("local steps" if is_full else "lora"),
    ),
)
def test_a_dry_run_says_what_a_run_takes_and_it_leaves_nothing_on_the_card(
    name, is_full, model, folder, data, tmp_path
):
    """On a full card, two models are neither timed in turn nor both there to be compared."""
    asked = replace(CONFIG, data=data, **RUNS[name])
    room = 4 * weight_bytes(read_anatomy(model), "float32") // 3 if is_full else 1 << 30
    release_memory()
    with pretended_gpu.limit(room):
        said, peak = dry_run(str(folder), asked, silent).cost, Peak()
        sv.compress(str(folder), asked, tmp_path / "run", say=silent)
    assert max(said.calibration_bytes, said.training_bytes) == pytest.approx(peak.bytes, rel=0.25)
    release_memory()
    assert peak.bytes > 0
    assert torch.cuda.memory_allocated() == peak.before


@pretended
def test_a_dry_run_says_where_states_go_and_what_does_not_fit(folder, data):
    asked = replace(CONFIG, data=data, recover=RECOVER)

    def rows(room):
        release_memory()
        with pretended_gpu.limit(room):
            found = dry_run(str(folder), asked, silent)
        return {row[0]: row[1] for row in dry_run_rows(found)}

    enough, little = rows(1 << 30), rows(4 << 20)
    assert "GiB on cuda:0 (" in enough["hidden states"]
    assert "in host memory" in little["hidden states"]
    assert "more than" not in enough["memory of pruning"] + enough["memory of training"]
    assert "free on cuda:0: prune --low-memory" in little["memory of pruning"]
    assert "free on cuda:0: a smaller --batch-size" in little["memory of training"]


# Training whose batches do not fit takes smaller ones, and learns the same.
def trained(batch_size, card, room=0):
    """The weights after two steps on a card, and the most bytes that these took beside them."""
    model, processor = llava()
    teacher, how = copy.deepcopy(model), config(train="full", loss="sft+kl", batch_size=batch_size)
    model.to(card)
    peak = Peak()
    with pretended_gpu.limit(room or 1 << 40, card):
        history = sv.recover(model, teacher, folders.short_samples(12), how, processor)
    assert len(history.steps) == 2
    return {name: value.cpu() for name, value in model.state_dict().items()}, peak.bytes


@pretended
@pytest.mark.parametrize("size", [6, pytest.param(4, marks=pytest.mark.slow)])
def test_batches_that_do_not_fit_are_divided(size, card, capsys):
    expected, most = trained(size, card)
    _, least = trained(1, card)
    assert least < most
    capsys.readouterr()
    found, _ = trained(size, card, room=(3 * least + most) // 4)
    assert f"no memory on cuda:0 for batches of {size}: 2 batches of" in capsys.readouterr().err
    assert_close(found, expected)


@pretended
def test_what_fits_in_no_batches_is_one_error(card):
    with pytest.raises(torch.OutOfMemoryError):
        trained(2, card, room=1000)


# Where a walk keeps hidden states changes nothing but memory, and is decided from free memory.

STEPS = Steps(repair="auto", count=2)
CPU = torch.device("cpu")


def walked(name, device, store):
    """A walk along both axes, and the most bytes that the card held meanwhile."""
    model = tiny.build(name).to(device)
    data = [tiny.batch(model, 40, seed) for seed in range(8)]
    anatomy = read_anatomy(model)
    scores = sv.Scores("by-hand", layer=random_scores(anatomy).layer)
    chosen = plans_for(anatomy, [scores], 0.3, "both", "balanced")
    config = WalkConfig(*chosen, data[:-2], data[-2:], STEPS)
    if device.type == "cpu":
        return walk(Live(model), config, device, Memory(CPU), store), 0
    torch.get_device_module(device).reset_peak_memory_stats()
    found = walk(Live(model), config, device, Memory(CPU), store)
    return found, torch.get_device_module(device).max_memory_allocated()


@pytest.mark.parametrize("name", tiered(["llava-llama", "qwen3_vl"]))
def test_every_place_gives_the_same_walk(name, card, tmp_path):
    expected, _ = walked(name, CPU, Memory())
    peaks = {}
    for store in (Memory(), Memory(CPU), Scratch(tmp_path / "states")):
        found, peaks[type(store), getattr(store, "device", None)] = walked(name, card, store)
        assert found.plan == expected.plan
        assert found.weights.keys() == expected.weights.keys()
        for place, value in expected.weights.items():
            torch.testing.assert_close(found.weights[place], value, rtol=1e-3, atol=1e-5)
    assert peaks[Memory, CPU] < peaks[Memory, None]
    assert peaks[Scratch, None] < peaks[Memory, None]


@pytest.fixture
def free(monkeypatch):
    """Bytes that are said to be free, by kind of device."""
    found = {"cpu": 8000, "cuda": 4000}
    monkeypatch.setattr(stores, "free_memory", lambda device: found[device.type])
    return found


def test_the_first_place_with_room_is_taken(free):
    card = torch.device("cuda", 0)
    assert [StatesPlace.of(n, card).kind for n in (1000, 1001, 4000, 4001)] == [
        *("device", "host", "host", "files")
    ]
    assert [StatesPlace.of(n, CPU).kind for n in (1000, 4000, 4001)] == ["host", "host", "files"]
    free.update(cuda=4 << 30, cpu=20 << 30)
    assert str(StatesPlace.of(3 << 30, card)) == (
        "3.00 GiB in host memory (4.00 GiB free on cuda:0, 20.00 GiB free on the host)"
    )
