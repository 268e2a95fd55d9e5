"""Originals of many shapes keep their outputs; what they are is computed in `originals`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
import yaml

from slimvlm_tools.convert import convert
from tests.tiers import tiered
from tests.tolerances import FORWARD, assert_close
from tests.tools.originals import IMAGE, Original, random_original, save_original

FIXTURES = Path(__file__).parent.parent / "fixtures" / "convert"
IMAGE_ID = {"llava": 384, "bunny": 403, "internvl": 397}
"""Behind the tokens of the fixtures' tokenizers, or one of them."""
OUTER = ("select_layer", "downsample_ratio", "force_image_size")
"""Fields of InternVL that stand outside the language model's configuration."""
TABLES = yaml.safe_load(Path(__file__).with_name("originals.yaml").read_text())
VARIANTS = TABLES["variants"]
FIRST = {row[0]: name for name, row in VARIANTS.items()}
"""A variant of each family."""


def original_of(name, seed):
    family, text_changes, tower_changes, files = VARIANTS[name]
    source = FIXTURES / family / "original"
    config = json.loads((source / "config.json").read_text())
    tower = {**TABLES["towers"][family], **tower_changes}
    if family == "internvl":
        outer = {n: v for n, v in text_changes.items() if n in OUTER}
        inner = {n: v for n, v in text_changes.items() if n not in OUTER}
        config["llm_config"] |= {**TABLES["sizes"][family], **inner}
        config["vision_config"] |= tower
        config |= {"force_image_size": tower["image_size"], **outer}
        tower = config["vision_config"]
    else:
        config |= {
            **TABLES["sizes"][family],
            "mm_hidden_size": tower["hidden_size"],
            **text_changes,
        }
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
@pytest.mark.parametrize("name", tiered(VARIANTS, lambda name: name in FIRST.values()))
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
