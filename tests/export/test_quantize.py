"""Quantised checkpoints: close, smaller as counted, loaded by plain transformers, backbone only."""

from dataclasses import replace

import jaxtyping
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn

import slimvlm as sv
from slimvlm.core.errors import ConfigError, SlimError
from slimvlm.evaluation.bench import stored_bytes
from slimvlm.export import quantize as quantization
from slimvlm.export.quantize import quantize
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.hidden import head_of, hidden_states
from slimvlm.models.parts import Parts
from slimvlm.pruning.cut import prune_
from tests import tiny
from tests.handmade import logits, plan_by_hand

pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
pytest.importorskip("compressed_tensors")
CASES = [
    *(("int8", "torchao"), ("int8", "bitsandbytes"), ("int4", "bitsandbytes")),
    *((to, "compressed-tensors") for to in ("int8", "int4", "fp8")),
]
MOST_OFF = {"int8": 0.06, "int4": 0.5, "fp8": 0.2}
"""Largest difference of logits, relative to the largest logit."""


def pruned(family, neurons=64):
    """A tiny model without one layer and some neurons, in bfloat16."""
    model = tiny.build(family)
    prune_(model, plan_by_hand(read_anatomy(model), layers=(0, 1, 3), neurons=range(neurons)))
    return model.to(torch.bfloat16)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A pruned LLaVA, its folder, and a batch."""
    model = pruned("llava-llama")
    folder = tmp_path_factory.mktemp("model") / "original"
    model.save_pretrained(folder)
    batch = tiny.batch(model).items()
    return folder, model, {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch}


@pytest.mark.parametrize(("to", "backend"), CASES)
def test_plain_transformers_loads_it_and_answers_are_close(to, backend, original, tmp_path):
    folder, model, batch = original
    done = quantize(folder, tmp_path / "small", to, backend, "cpu")
    small = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "small", dtype="auto").eval()
    exact, found = logits(model, batch).float(), logits(small, batch).float()
    difference = (found - exact).abs().max() / exact.abs().max()
    assert 0 < float(difference) < MOST_OFF[to]
    assert (done.to, done.backend) == (to, backend)
    assert done.bytes_before == stored_bytes(model)
    assert done.bytes_after < done.bytes_before
    assert sv.anatomy(small.config).total_params == read_anatomy(model).total_params
    again = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "small", dtype="auto").eval()
    del (inputs := dict(batch))["labels"]
    (hidden,) = hidden_states(again, inputs)  # without the head, before the whole model is called
    found, whole = head_of(again)(hidden), logits(small, batch)
    if (to, backend) == ("int4", "bitsandbytes"):  # its kernels differ with and without gradients
        assert float((found - whole).abs().max() / whole.abs().max()) < 0.02
    else:
        assert torch.equal(found, whole)
    assert torch.equal(logits(again, batch), whole)
    # tower, projector, embeddings and head are untouched
    assert not list((tmp_path / "small").glob("*.bin"))
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "small" / "model.safetensors")
    kept = {name for name in before if ".layers." not in name or "vision_tower" in name}
    parts = {name.removeprefix("model.").split(".")[0] for name in kept}
    assert {"vision_tower", "multi_modal_projector", "language_model"} <= parts
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_int8_saves_a_byte_for_each_weight_but_a_scale_for_each_row(original, tmp_path):
    folder, model, _ = original
    done = quantize(folder, tmp_path / "small", "int8", "torchao", "cpu")
    matrices = [linear.weight for _, _, linear in Parts(model).projections()]
    rows, weights = sum(map(len, matrices)), sum(weight.numel() for weight in matrices)
    saved = done.bytes_before - done.bytes_after
    assert saved in (weights - 4 * rows, weights - 5 * rows)  # without or with zero points


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi", "internvl-phi3", "smolvlm"])
def test_other_families(family, tmp_path):
    pruned(family).save_pretrained(tmp_path / "original")
    quantize(tmp_path / "original", tmp_path / "small", "int8", device="cpu")
    small, _ = sv.load(tmp_path / "small", device="cpu")
    owned = {id(linear) for _, _, linear in Parts(small).projections()}
    assert owned
    for module in small.modules():
        if isinstance(module, nn.Linear):
            assert (type(module.weight) is not nn.Parameter) == (id(module) in owned)


def test_layers_of_different_widths(tmp_path):
    model = tiny.build("llava-llama")
    plan = plan_by_hand(read_anatomy(model))
    prune_(model, replace(plan, neurons=(tuple(range(64)), *plan.neurons[1:])))
    sv.save(model, None, tmp_path / "uneven")
    quantize(tmp_path / "uneven", tmp_path / "small", "int8", device="cpu")
    small, _ = sv.load(tmp_path / "small", device="cpu")
    assert [s.intermediate_size for s in read_anatomy(small).layers] == [64, 96, 96, 96]


@pytest.mark.parametrize("verb", ["prune", "score", "score in parts", "recover"])
def test_a_quantised_model_is_not_changed_further(verb, original, tmp_path):
    quantize(original[0], tmp_path / "small", "int8", device="cpu")
    small, _ = sv.load(tmp_path / "small", device="cpu")
    work = {
        "prune": lambda: prune_(small, plan_by_hand(sv.anatomy(small.config))),
        "score": lambda: sv.score(small, (), "magnitude"),
        "score in parts": lambda: sv.score(small, (), "obs"),
        "recover": lambda: sv.recover(small, None, (), sv.RecoverConfig(loss="sft")),
    }[verb]
    with pytest.raises(ConfigError, match="quantised, so it cannot be"):
        work()
    with pytest.raises(ConfigError, match="quantised already"):
        quantize(tmp_path / "small", tmp_path / "smaller", device="cpu")


@pytest.mark.parametrize("name", ["mllama", "lfm2"])
def test_matrices_outside_units_keep_the_names_that_others_have(name, tmp_path):
    """Cross-attention and convolutions have matrices named as those of attention and MLPs are."""
    tiny.build(name).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "small", "fp8", device="cpu")
    assert (tmp_path / "small" / "config.json").is_file()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"to": "int4", "neurons": 72}, r"rows of mlp.down_proj have 72 .* --round-to 64"),
        ({"to": "int3", "backend": "torchao"}, "to 'int3' with backend 'torchao' must be one of"),
        ({"missing": "bitsandbytes", "to": "int4"}, r"pip install 'slimvlm\[quant\]'"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    wrong, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for a user
    pruned("llama", wrong.pop("neurons", 64)).save_pretrained(tmp_path / "original")
    if missing := wrong.pop("missing", None):
        monkeypatch.setattr(quantization, "find_spec", lambda name: None if name == missing else 1)
    with pytest.raises(SlimError, match=message):
        quantize(tmp_path / "original", tmp_path / "small", device="cpu", **wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["original"]
