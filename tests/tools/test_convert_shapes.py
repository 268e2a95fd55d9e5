"""Originals of many shapes keep their outputs; what they are is computed in `originals`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf

from slimvlm_tools.convert import convert
from tests.tolerances import FORWARD, assert_close
from tests.tools.originals import IMAGE, Original, random_original, save_original

FIXTURES = Path(__file__).parent.parent / "fixtures" / "convert"
IMAGE_ID = {"llava": 384, "bunny": 403, "internvl": 397}
"""Behind the tokens of the fixtures' tokenizers, or one of them."""
OUTER = ("select_layer", "downsample_ratio", "force_image_size")
"""Fields of InternVL that stand outside the language model's configuration."""
FEATURES = "mm_vision_select_feature"
LAYER = "mm_vision_select_layer"

HEADS = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4}
SIZES = {
    "llava": {
        **{"hidden_size": 64, "intermediate_size": 96, **HEADS, "hidden_act": "silu"},
        **{"vocab_size": 384, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
        **{"rope_theta": 10000.0, "tie_word_embeddings": False},
    },
    "bunny": {
        **{"hidden_size": 80, "intermediate_size": 160, **HEADS},
        **{"vocab_size": 403, "tie_word_embeddings": False},
    },
    "internvl": {
        **{"hidden_size": 64, "intermediate_size": 96, **HEADS},
        **{"vocab_size": 404, "tie_word_embeddings": False},
    },
}
TOWER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 14}
TOWERS = {
    "llava": {
        **{**TOWER, "intermediate_size": 64, "image_size": 56},
        **{"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    },
    "bunny": {
        **{**TOWER, "intermediate_size": 56, "image_size": 60},
        **{"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    },
    "internvl": {
        **{**TOWER, "intermediate_size": 64, "image_size": 84},
        **{"hidden_act": "gelu", "layer_norm_eps": 1e-6},
    },
}
SU = {
    "type": "su",
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.2, 2.9],
    "long_factor": [1.1, 2.0, 4.5, 9.0, 21.0, 40.0],
}
VARIANTS = {
    # name: family, changes of the language model, of the tower, of the files
    "llava-as-published": ("llava", {}, {}, {"kind": "bin", "shards": 2, "outside": True}),
    "llava-grouped": (
        "llava",
        {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96, LAYER: -1,
         "num_hidden_layers": 5, "vocab_size": 777, "rms_norm_eps": 1e-6, "rope_theta": 5e5},
        {"num_hidden_layers": 5, "patch_size": 16, "image_size": 60, "num_attention_heads": 4},
        {"dtype": "bfloat16", "shards": 3},
    ),
    "llava-tied": (
        "llava",
        {"tie_word_embeddings": True, "num_key_value_heads": 1, LAYER: 1, FEATURES: "cls_patch",
         "rope_scaling": {"type": "linear", "factor": 2.5}, "hidden_act": "gelu"},
        {"hidden_act": "gelu", "layer_norm_eps": 1e-4, "image_size": 42},
        {"dtype": "float16", "kind": "bin"},
    ),
    "llava-whole-tower-model": (
        "llava",
        {"num_hidden_layers": 1, "model_type": "llava", LAYER: -4, "intermediate_size": 56},
        {"num_hidden_layers": 4, "hidden_size": 48, "intermediate_size": 80},
        {"outside": True, "wrapped": True, "kind": "bin"},
    ),
    "bunny-inside": ("bunny", {}, {}, {"cut": True, "shards": 2}),
    "bunny-outside": (
        "bunny",
        {"num_attention_heads": 5, "num_key_value_heads": 5, "partial_rotary_factor": 0.5,
         "num_hidden_layers": 4, "intermediate_size": 100, "vocab_size": 512},
        {"num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 45, "patch_size": 9},
        {"outside": True, "dtype": "bfloat16"},
    ),
    "bunny-grouped": (
        "bunny",
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 2e4,
         "layer_norm_eps": 1e-4, "hidden_act": "gelu", "partial_rotary_factor": 0.8},
        {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "num_hidden_layers": 2},
        {"outside": True, "wrapped": True, "kind": "bin", "shards": 2, "dtype": "float16"},
    ),
    "internvl-short": (
        "internvl",
        {"rope_scaling": None, "num_key_value_heads": 2, "num_hidden_layers": 4, "select_layer": -2,
         "sliding_window": 24, "rms_norm_eps": 1e-6},
        {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False, "patch_size": 21},
        {"dtype": "bfloat16", "shards": 3},
    ),
    "internvl-long": (
        "internvl",
        {"rope_scaling": SU, "hidden_size": 48, "original_max_position_embeddings": 50,
         "max_position_embeddings": 640, "vocab_size": 410, "force_image_size": 112},
        {"num_attention_heads": 4},
        {},
    ),
    "internvl-tied": (
        "internvl",
        {"rope_scaling": SU, "hidden_size": 48, "original_max_position_embeddings": 400,
         "max_position_embeddings": 400, "tie_word_embeddings": True, "downsample_ratio": 0.25,
         "select_layer": 2, "rope_theta": 5e4},
        {"image_size": 112, "hidden_size": 24, "hidden_act": "gelu_pytorch_tanh"},
        {"dtype": "float16", "kind": "bin", "shards": 2},
    ),
}  # fmt: skip


def original_of(name, seed):
    family, text_changes, tower_changes, files = VARIANTS[name]
    source = FIXTURES / family / "original"
    config = json.loads((source / "config.json").read_text())
    tower = {**TOWERS[family], **tower_changes}
    if family == "internvl":
        outer = {n: v for n, v in text_changes.items() if n in OUTER}
        inner = {n: v for n, v in text_changes.items() if n not in OUTER}
        config["llm_config"] |= {**SIZES[family], **inner}
        config["vision_config"] |= tower
        config |= {"force_image_size": tower["image_size"], **outer}
        tower = config["vision_config"]
    else:
        config |= {**SIZES[family], "mm_hidden_size": tower["hidden_size"], **text_changes}
    dtype = getattr(torch, files.get("dtype", "float32"))
    return random_original(family, config, tower, seed, dtype)


def written(original, name, folder):
    """The folder of an original, and that of its tower's description."""
    files = VARIANTS[name][3]
    source = folder / "source"
    shutil.copytree(FIXTURES / original.family / "original", source)
    tower = None
    if original.family != "internvl":
        tower = folder / "tower"
        tower.mkdir()
        kind = "clip" if original.family == "llava" else "siglip"
        described = {"model_type": f"{kind}_vision_model", **original.vision}
        whole = {"model_type": kind, "vision_config": dict(original.vision)}
        config = whole if files.get("wrapped") else described
        (tower / "config.json").write_text(json.dumps(config))
    kept = original
    if files.get("cut"):  # the published Bunny has no last layer of the tower
        last = original.vision["num_hidden_layers"] - 1
        weights = {n: t for n, t in original.weights.items() if not n.startswith(f"tower.{last}.")}
        kept = Original(original.family, original.config, original.vision, weights)
    outside = tower if files.get("outside") else None
    save_original(kept, source, outside, files.get("kind", "safetensors"), files.get("shards", 1))
    return source, tower


def prompt(original, num_features):
    """Ids with -200 for a picture, and with its placeholder as often as it has features."""
    generator = torch.Generator().manual_seed(5)
    image = IMAGE_ID[original.family]
    first, *others = (torch.randint(5, 380, (n,), generator=generator).tolist() for n in (7, 9, 30))
    asked = [*first, IMAGE, *others[0], IMAGE, *others[1]]
    return asked, [i for a in asked for i in ([image] * num_features if a == IMAGE else [a])]


def pictures(original):
    side = original.config.get("force_image_size") or original.vision["image_size"]
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(6))


def lost(original, model):
    """Names of weights that the converted model does not have bit for bit, maybe with more rows."""
    there = [tensor.flatten() for tensor in model.state_dict().values()]
    return {
        name
        for name, tensor in original.weights.items()
        if not any(torch.equal(t[: tensor.numel()], tensor.float().flatten()) for t in there)
    }


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_are_those_of_the_original(name, tmp_path):
    original = original_of(name, seed=len(name))
    source, tower = written(original, name, tmp_path)
    out = convert(source, tmp_path / "out", tower)
    model = hf.AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    assert model.config.image_token_id == IMAGE_ID[original.family]
    rows = original.text["vocab_size"]
    added = list(range(rows, model.config.text_config.vocab_size))
    assert (model.generation_config.suppress_tokens or []) == added
    behind = (
        f"tower.{original.vision['num_hidden_layers'] - 1}."  # a layer that Bunny does not read
    )
    unread = behind if original.family == "bunny" else "nothing"
    heads = "lm_head" if original.text["tie_word_embeddings"] else "nothing"
    assert not [n for n in lost(original, model) if heads not in n and not n.startswith(unread)]
    pixels = pictures(original)
    asked, expanded = prompt(original, model.config.image_seq_length)
    found = model(input_ids=torch.tensor([expanded]), pixel_values=pixels).logits[0]
    expected = original.logits(asked, pixels)
    assert 0.3 < expected.std() < 3
    assert_close(found[:, :rows], expected, FORWARD)

    text = [i for i in asked if i != IMAGE]
    found = model(input_ids=torch.tensor([text])).logits[0]
    assert_close(found[:, :rows], original.logits(text, None), FORWARD)

    inputs = {"input_ids": torch.tensor([expanded]), "pixel_values": pixels}
    whole = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0]
    said = whole[len(expanded) :].tolist()
    assert said == greedy(original, asked, pixels, len(said))


def greedy(original, ids, pixels, count):
    said = []
    for _ in range(count):
        said.append(int(original.logits(ids + said, pixels)[-1].argmax()))
    return said
