"""The device is the user's choice, and what a device cannot do is done elsewhere or said."""

import pytest
import torch

import slimvlm as sv
from slimvlm import cli
from slimvlm.evaluation.bench import bench
from slimvlm.models.devices import computes_bfloat16, device_named, free_memory, peak_memory
from slimvlm.scoring.criteria import CRITERIA
from tests import pretended_gpu, tiny
from tests import tiny_folder as folders
from tests.gpu.alike import pretended
from tests.handmade import Watched, refused, stops
from tests.tiers import tiered
from tests.tolerances import assert_scores_close, share_of

MIB = 2**20


@pytest.fixture(scope="module")
def llava():
    return str(folders.folder("llava"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(folders.write_llava_data(tmp_path_factory.mktemp("data"), count=8))


def test_a_model_goes_where_the_user_says_and_the_card_has_a_name(card, llava):
    assert device_named() == card
    for named, place in ((None, card), (card.type, card), (str(card), card), ("cpu", "cpu")):
        assert sv.load(llava, device=named)[0].device == torch.device(place)
    model = tiny.build("llama").to(card)
    found = bench(model, workload=sv.Workload(prompt_tokens=4, new_tokens=3, batch_sizes=(1,)))
    assert found.device == torch.get_device_module(card).get_device_name(card)


@pretended
def test_memory_and_precision_are_the_card_s(card):
    assert computes_bfloat16(card)
    with pretended_gpu.capability(pretended_gpu.TURING):
        assert torch.cuda.is_bf16_supported()
        assert not computes_bfloat16(card)
    held = torch.zeros(64 * MIB, dtype=torch.uint8, device=card)
    with pretended_gpu.limit(100 * MIB):
        assert free_memory(card) == 100 * MIB
    assert "GiB on the accelerator" in peak_memory()
    del held


OF_EXPERTS = ("reap", "frequency")


@pytest.fixture
def without_float64(card, monkeypatch):
    """Inside, nothing in float64 can be made on a card, as on MPS."""
    monkeypatch.setattr("slimvlm.models.devices.has_float64", lambda device: device.type == "cpu")

    def look(func, _, made):
        wide = [v for v in made if v.device.type == card.type and v.dtype == torch.float64]
        assert not wide, f"{func} makes float64 on a card"

    return Watched(look)


def scored(criterion, device):
    model = tiny.build("qwen3_vl_moe" if criterion in OF_EXPERTS else "llava-llama").to(device)
    batches = [tiny.batch(model, 12, seed) for seed in range(2)]
    found = sv.score(model, batches, criterion).tensors()
    return {k: v for k, v in found.items() if v.numel() and k != "layer_runs"}


def walked(axis, device):
    model = tiny.build("llava-llama").to(device)
    batches = [tiny.batch(model, 12 + seed, seed) for seed in range(5)]
    plan = sv.walk_(model, batches, 0.3, axis, local_steps=1).plan
    return {str(i): torch.tensor([0.0, *kept]) for i, kept in enumerate(plan.neurons)}


def evaluated(_, device):
    model, processor = sv.load(str(folders.folder("llava")), device=device)
    samples = sv.evaluate_data(model, processor, folders.short_samples(3), model).samples
    return {sample.id: torch.tensor(sample.loss) for sample in samples}


USES = {**dict.fromkeys(CRITERIA, scored), "width": walked, "both": walked, "samples": evaluated}


@pytest.mark.parametrize(
    "what", tiered(USES, ("taylor", "obs", "reap", "both", "samples").__contains__)
)
def test_sums_in_float64_are_made_on_the_cpu_where_a_card_has_none(what, card, without_float64):
    expected = USES[what](what, torch.device("cpu"))
    with without_float64:
        found = USES[what](what, card)
    assert found.keys() == expected.keys()
    for name in expected:
        assert_scores_close(found[name], expected[name], share_of(what))


SMALLER, LOW_MEMORY = "a smaller --batch-size (with", "--low-memory keeps one layer"


@pretended
@pytest.mark.parametrize(
    ("words", "during", "cure"),
    [
        ("score --criterion taylor", "score", LOW_MEMORY),
        pytest.param(
            *("prune --ratio 0.3 --samples 8", "prune", LOW_MEMORY), marks=pytest.mark.slow
        ),
        ("recover --loss sft --train full", "recover, stage 'train", SMALLER),
    ],
)
def test_out_of_memory_is_one_line_that_says_what_helps(
    words, during, cure, card, llava, data, tmp_path
):
    verb, *rest = words.split()
    size = sum(p.nbytes for p in sv.load(llava, device="cpu")[0].parameters())
    with pretended_gpu.limit(size + size // 4):
        told = refused(verb, llava, "--data", data, "--out", tmp_path / "out", *rest)
    assert told.startswith(f"slimvlm: out of memory on {card} during {during}"), told
    assert "more was needed" in told
    assert f"What helps: {cure}" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("first", tiered(["card", "cpu"], lambda first: first == "card"))
def test_a_stopped_walk_goes_on_elsewhere(first, card, llava, data, tmp_path, monkeypatch):
    given = ["prune", llava, "--ratio", "0.3", "--data", data, "--samples", "8", "--low-memory"]
    given += ["--out", str(tmp_path / "out"), "--axis", "width", "--test-samples", "0"]
    monkeypatch.setattr("slimvlm.runs.prune.prune_checkpoint", stops)
    found = []
    for device in sorted(["cpu", str(card)], reverse=first == "card"):
        with pytest.raises(SystemExit):
            cli.main([*given, "--device", device])
        files = (tmp_path / ".out.scratch").rglob("walk/*/*")
        found.append({file: file.stat().st_mtime_ns for file in files})
    assert found[0]
    assert found[0] == found[1], "layers are done a second time"
