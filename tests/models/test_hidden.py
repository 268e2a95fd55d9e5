"""Calibration of a model that accelerate has spread over devices and disk."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from slimvlm.core.errors import ConfigError
from slimvlm.evaluation.bench import stored_bytes
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.devices import digest_of_weights
from slimvlm.models.hidden import as_inputs, head_weights_of, hidden_states
from slimvlm.pruning.cut import mask_, prune_
from slimvlm.scoring.score_model import score
from tests import tiny
from tests.handmade import plan_by_hand
from tests.tolerances import LOSS, assert_close, assert_scores_close

TOPS = ("embed_tokens", "norm", "rotary_emb")
CASES = [
    {"criterion": "taylor", "gradient": "per_sample"},
    *({"criterion": name} for name in ("taylor_mix", "gate", "activation", "wanda", "magnitude")),
]


def on_disk(model, folder, **places):
    """A copy of a text model with every second layer and the head on a disk."""
    model.save_pretrained(folder / "model")
    places = {f"model.{name}": places.get(name, "cpu") for name in TOPS}
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    return AutoModelForCausalLM.from_pretrained(
        folder / "model",
        device_map={**places, "lm_head": "disk"},
        offload_folder=folder / "offload",
        dtype=torch.float32,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["criterion"])
def test_weights_on_disk_give_the_same_scores(case, tmp_path):
    model = tiny.build("llama")
    spread = on_disk(model, tmp_path)
    assert spread.model.layers[1].mlp.up_proj.weight.is_meta
    batches = [tiny.batch(model, 12, 0), tiny.batch(model, 15, 1)]
    expected, found = score(model, batches, **case), score(spread, batches, **case)
    for unit in ("kv_group", "neuron"):
        for ours, theirs in zip(found.of(unit), expected.of(unit), strict=True):
            assert_scores_close(ours, theirs)


def test_weights_on_disk_are_told_apart_counted_and_judged_by_as_in_memory(tmp_path):
    model = tiny.build("llama")
    spread = on_disk(model, tmp_path)
    assert digest_of_weights(spread) == digest_of_weights(model)
    assert stored_bytes(spread) == stored_bytes(model)
    assert torch.equal(head_weights_of(spread).weight, head_weights_of(model).weight)
    model.model.layers[1].mlp.down_proj.weight.data[:, 3] = 0  # a single neuron
    assert digest_of_weights(spread) != digest_of_weights(model)


def test_inputs_go_where_weights_on_disk_are_used(tmp_path):
    model = tiny.build("llama")
    spread = on_disk(model, tmp_path, embed_tokens="disk")
    batch = tiny.batch(model)
    del batch["labels"]
    found, expected = (hidden_states(m, as_inputs(m, batch)) for m in (spread, model))
    assert_close(found[0], expected[0], LOSS)


def test_weights_on_disk_are_not_pruned(tmp_path):
    model = tiny.build("llama")
    spread, plan = on_disk(model, tmp_path), plan_by_hand(read_anatomy(model), (0, 2))
    for change in (prune_, mask_):
        with pytest.raises(ConfigError, match=r"^model: its device_map divides it over cpu, disk"):
            change(spread, plan)
