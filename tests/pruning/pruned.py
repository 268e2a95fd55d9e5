"""Tiny models in float64, plans by hand for them, and what is left without repair."""

import copy
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.parts import Parts
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import prune_
from tests import tiny
from tests.handmade import Batch, plan_by_hand

HEADS_STAY = ("qwen2_vl", "qwen2_5_vl")


def build(name: str) -> PreTrainedModel:
    """A tiny model in float64."""
    return tiny.build(name).double()


def doubled(batch: Batch) -> Batch:
    """A batch with pictures in float64."""
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def batches(model: PreTrainedModel, count: int = 6, tokens: int = 24) -> list[Batch]:
    """Batches for such a model."""
    return [doubled(tiny.batch(model, tokens, seed)) for seed in range(count)]


def narrow(model: PreTrainedModel, layers: Sequence[int] | None = None) -> Plan:
    """Half of the KV groups (where they may go), two thirds of the neurons."""
    anatomy = read_anatomy(model)
    fixed = model.config.model_type in HEADS_STAY
    groups = None if fixed else range(0, anatomy.layers[0].num_kv_heads, 2)
    return plan_by_hand(anatomy, layers, groups, range(64))


def sliced(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """What is left if the model is only cut."""
    student = copy.deepcopy(model)
    prune_(student, plan)
    return student


@torch.no_grad()
def with_determined_neurons_(model: PreTrainedModel) -> None:
    """Make the last 32 of 96 neurons copies of others and, where there are biases, constant."""
    for layer in Parts(model).layers:
        for path in ("gate_proj", "up_proj", "gate_up_proj", "fc1"):
            linear = getattr(layer.mlp, path, None)
            if linear is None:
                continue
            for block in linear.weight.view(-1, 96, 64):
                block[64:] = block[:32]
            if linear.bias is not None:
                linear.bias[64:] = linear.bias[:32]
                linear.weight[90:] = 0
