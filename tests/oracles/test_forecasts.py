"""What is said of memory and work before a walk, against bytes and operations that are counted.

One model of each trait: plain text, a picture, cross-attention, deepstack features, experts, and
layers without attention. Bytes are said to within a third, operations of weights to a twentieth.
Bytes and launched kernels are those of the pretended card: ``python -m pytest -p
tests.pretended_gpu`` runs these.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import slimvlm as sv
from slimvlm.core.options import CompressConfig
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.devices import release_memory
from slimvlm.models.pictures import picture_of
from slimvlm.runs import cost as module
from slimvlm.runs.cost import Sizes, bytes_of_picture, cost
from slimvlm.runs.recipe import decide
from slimvlm.scoring.obs import removal_order
from tests import pretended_gpu, tiny
from tests.gpu.alike import pretended
from tests.handmade import Watched

TRAITS = {
    **{"text": "llama", "picture": "llava-llama", "cross-attention": "mllama"},
    **{"deepstack": "qwen3_vl", "experts": "qwen3_moe", "hybrid": "lfm2"},
}
EACH, BATCHES, TOKENS, IN_PICTURE = 4, 4, 48, 4  # a run reads samples in batches of 4


def sizes_of(model, length, **counts):
    beside = bytes_of_picture(model.config, IN_PICTURE, "float32")
    given = {"shape": read_anatomy(model), "tokens": float(length), "samples": 1}
    return Sizes(**{**given, **counts}, beside=beside)


def batch_of(model, seed):
    samples = [tiny.batch(model, TOKENS, EACH * seed + i) for i in range(EACH)]
    return {name: torch.cat([each[name] for each in samples]) for name in samples[0]}


@pytest.mark.gpu
@pretended
@pytest.mark.parametrize("trait", TRAITS)
def test_a_walk_takes_the_memory_that_is_said(trait, monkeypatch):
    """From a model that is not on the card yet, to the end of its walk."""
    monkeypatch.setattr(module, "device_flops", lambda *_: 1e9)  # time is not asked
    card, model = torch.device("cuda", 0), tiny.build(TRAITS[trait])
    axis = "depth" if trait == "experts" else "width"  # whose neurons no walk chooses
    data, shape = [batch_of(model, seed) for seed in range(BATCHES)], read_anatomy(model)
    length = data[0]["input_ids"].shape[1]
    sizes = sizes_of(model, length, samples=EACH * BATCHES, calibration=EACH * BATCHES)
    config = CompressConfig(ratio=0.3, axis=axis, data="demo", local_steps=0)
    said = cost(decide("", config, shape), sizes, card, "float32")
    release_memory()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sv.walk_(model.to(card), data, 0.3, axis, round_to=1)
    taken = torch.cuda.max_memory_allocated() - before
    assert said.calibration_bytes == pytest.approx(taken, rel=1 / 3)


@pytest.mark.parametrize("trait", TRAITS)
def test_a_pass_takes_the_operations_that_are_said(trait):
    """Of decoder and head; experts and attention run in plain products, as no other is counted."""
    model = tiny.build(TRAITS[trait])
    model.set_attn_implementation("eager")
    model.config.get_text_config()._experts_implementation = "eager"
    batch = tiny.batch(model, TOKENS)
    del batch["labels"]
    with torch.no_grad(), FlopCounterMode(display=False) as counting:
        model(**batch)
    has_tower = tiny.is_multimodal(model.config)
    parts = ("model.language_model" if has_tower else "model", "lm_head")
    by_part = counting.get_flop_counts()
    counted = sum(
        count
        for part in parts
        for operator, count in by_part[f"{type(model).__name__}.{part}"].items()
        if operator != torch.ops.aten.bmm  # attention scores, which the estimate leaves out
    )
    said = sizes_of(model, batch["input_ids"].shape[1]).backbone_flops
    assert said == pytest.approx(counted, rel=0.05)


def test_a_picture_that_is_cross_attended_takes_no_place_in_the_sequence(tmp_path):
    """Without data, the tokens of a conversation are its text's and what stands for the picture."""
    for trait, count in (("cross-attention", 1), ("picture", 16)):
        tiny.CONFIGS[TRAITS[trait]]().save_pretrained(tmp_path / trait)
        assert picture_of(str(tmp_path / trait)).tokens == count


NEURONS, MOST = 11_008, 60_000  # of a layer of LLaVA-1.5-7B; launches that it may take
"""A launch takes some 5 microseconds of the host, whatever it computes: 10 s in 32 layers."""


def eliminated(neurons, share):
    """Launches and waits of removing a share of the neurons of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * neurons, neurons, generator=generator)
    gram = (inputs * torch.rand(neurons, generator=generator)).cuda()
    gram, matrix = gram.T @ gram, torch.randn(64, neurons, generator=generator).cuda()
    launches = []

    def look(operator, given, made):
        on_card = any(value.device.type != "cpu" for value in (*given, *made))
        launches.append(not operator.is_view and on_card)

    with Watched(look):
        found = []
        run = lambda: found.append(removal_order(matrix, gram, neurons, int(share * neurons)))  # noqa: E731
        waits = pretended_gpu.waits_of(run)
    assert len(found[0].order) == int(share * neurons)
    return sum(launches), waits


@pytest.mark.gpu
@pretended
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_choosing_neurons_takes_few_launches_and_fewer_waits(share):
    """They grow at most in proportion to the neurons: blocks of equal size, half as many."""
    (few, _), (many, waits) = (eliminated(neurons, share) for neurons in (512, 1024))
    assert many <= 2.5 * few
    assert many * NEURONS / 1024 <= MOST
    assert waits <= many / 8
