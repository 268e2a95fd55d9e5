"""Anatomies of tiny models, and of Llama-like models of any size without the model."""

from functools import cache

from slimvlm.models.anatomy import Anatomy, LayerShape, read_anatomy
from slimvlm.planning.make import default_multiple
from slimvlm.scoring.unit_scores import Scores
from tests import tiny
from tests.handmade import random_scores


def synthetic(
    layers: int, kv_heads: int, queries: int, head_dim: int, neurons: int, hidden: int, vocab: int
) -> Anatomy:
    """An anatomy of a Llama-like model of any size, without the model."""
    shape = LayerShape(
        num_kv_heads=kv_heads,
        queries_per_group=queries,
        head_dim=head_dim,
        intermediate_size=neurons,
        kv_group_params=2 * (queries + 1) * head_dim * hidden,
        neuron_params=3 * hidden,
        fixed_params=2 * hidden,
    )
    return Anatomy(
        **{"model_type": "mistral", "text_type": "mistral", "hidden_size": hidden},
        **{"vocab_size": vocab, "layers": (shape,) * layers, "final_norm_params": hidden},
        **{"embedding_params": vocab * hidden, "head_params": vocab * hidden},
        **{"vision_params": 0, "projector_params": 0},
    )


SYNTHETIC = {
    "7b": lambda: synthetic(6, 32, 1, 128, 11008, 4096, 6000),  # LLaVA's widths, fewer layers
    "7b-gqa": lambda: synthetic(5, 4, 7, 128, 18944, 3584, 25000),
    "135m": lambda: synthetic(30, 3, 3, 64, 1536, 576, 49152),
}
TINY = ("llama", "phi", "phi3", "gemma2", "llava-llama", "qwen2_vl", "qwen3_vl")


@cache
def anatomy_named(name: str) -> Anatomy:
    return SYNTHETIC[name]() if name in SYNTHETIC else read_anatomy(tiny.build(name))


@cache
def scores_named(name: str) -> Scores:
    return random_scores(anatomy_named(name))


def step_of(anatomy: Anatomy, axis: str, round_to: int | None = None) -> float:
    """The documented step: a layer, or one multiple of neurons in all layers."""
    if axis == "depth":
        return anatomy.layers[0].params / anatomy.backbone_params
    multiple = round_to or default_multiple(anatomy)
    return multiple * sum(s.neuron_params for s in anatomy.layers) / anatomy.backbone_params
