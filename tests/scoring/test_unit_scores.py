"""Scores: what is stored is what was there, and NaN never gets in."""

import math

import pytest
import torch

from slimvlm.core.errors import ConfigError, NumericalError
from slimvlm.models.parts import Parts
from slimvlm.scoring.score_model import score
from slimvlm.scoring.unit_scores import Scores, Statistics
from tests import tiny
from tests.handmade import assert_equal

CRITERIA = ("block_influence", "angular", "taylor", "magnitude")


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", ["scores", "scores.json", "llava-1.5", "scores.safetensors"])
def test_scores_survive_their_files(criterion, name, tmp_path):
    model = tiny.build("llama")
    scores = score(model, [tiny.batch(model)], criterion)
    scores.save(tmp_path / name)
    loaded = Scores.load(tmp_path / name)
    assert (loaded.criterion, dict(loaded.options)) == (criterion, dict(scores.options))
    assert_equal(loaded.tensors(), scores.tensors())


def test_two_versions_of_a_name_are_two_files(tmp_path):
    for version in (1, 2):
        Scores("by-hand", layer=torch.full((2,), float(version))).save(tmp_path / f"run.v{version}")
    assert Scores.load(tmp_path / "run.v1").layer.tolist() == [1, 1]


@pytest.mark.parametrize("broken", ["missing", "json", "safetensors"])
def test_broken_score_files_are_refused(broken, tmp_path):
    path = tmp_path / "scores"
    if broken != "missing":
        Scores("by-hand", layer=torch.ones(2)).save(path)
        path.with_suffix(f".{broken}").write_bytes(b"\xff not what it says")
    with pytest.raises(ConfigError, match=r"scores .*cannot be read"):
        Scores.load(path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_statistics_refuse_nan_and_infinity(value):
    with pytest.raises(NumericalError, match=r"infinity at '3\.mlp'"):
        Statistics(
            parts={
                (2, "mlp"): torch.ones(2, dtype=torch.float64),
                (3, "mlp"): torch.tensor([1.0, value], dtype=torch.float64),
            }
        )


@pytest.mark.parametrize("criterion", ["taylor", "block_influence", "activation", "gate"])
def test_nan_is_traced_to_its_sample_and_layer(criterion):
    """Layer 1 makes infinity of one token, which only the third sample has."""
    model = tiny.build("llama")
    batches = [tiny.batch(model, seed=seed) for seed in range(4)]
    batches = [{n: v[:1] for n, v in batch.items()} for batch in batches]
    for batch in batches:
        batch["input_ids"] = batch["input_ids"].clamp(max=90)
    batches[2]["input_ids"][0, 3] = 91

    def spoil(module, args, output):
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        hidden[spoilt["mask"]] = math.inf
        return output

    def look(module, args):
        spoilt["mask"] = args[0] == 91

    spoilt = {}
    model.get_input_embeddings().register_forward_pre_hook(look)
    Parts(model).layers[1].register_forward_hook(spoil)
    with pytest.raises(NumericalError, match=r"\(calibration sample 3, from layer 1 on\)"):
        score(model, batches, criterion)
