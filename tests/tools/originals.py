"""Originals of any shape, and what their own code computes, written out anew in float64.

The published layouts are those of `slimvlm_tools.convert`; nothing here uses it or transformers. A
vision tower, a projector and a decoder are each one function of the tensors by original name.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import Tensor

IMAGE = -200
NAMES = yaml.safe_load(Path(__file__).with_name("originals.yaml").read_text())["names"]
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Original:
    """An original checkpoint in memory."""

    family: str
    config: Values
    vision: Values
    """The vision tower's configuration, every field stated."""
    weights: Mapping[str, Tensor]
    """By original name, the tower's behind ``tower.``."""

    @property
    def text(self) -> Values:
        return self.config["llm_config"] if self.family == "internvl" else self.config

    def logits(self, ids: list[int], pixels: Tensor | None) -> Tensor:
        """Logits of one prompt; every -200 stands for all features of the next picture."""
        prefix = "language_model." if self.family == "internvl" else ""
        weights = {n.removeprefix(prefix): t.double() for n, t in self.weights.items()}
        table = weights["model.embed_tokens.weight"]
        pictures = iter(() if pixels is None else self.features(weights, pixels.double()))
        rows = [next(pictures) if i == IMAGE else table[i][None] for i in ids]
        hidden = decoder(weights, self.text, torch.cat(rows), self.family)
        head = table if self.text["tie_word_embeddings"] else weights["lm_head.weight"]
        return hidden @ head.T

    def features(self, weights: Mapping[str, Tensor], pixels: Tensor) -> Tensor:
        """Visual tokens of pictures, as the language model gets them."""
        tower = {n.removeprefix("tower."): t for n, t in weights.items() if n.startswith("tower.")}
        states = list(vision_states(tower, self.vision, pixels))
        if self.family == "internvl":
            seen = states[self.config["select_layer"]][:, 1:]
            seen = shuffled(seen, round(1 / self.config["downsample_ratio"]))
            seen = F.layer_norm(seen, seen.shape[-1:], weights["mlp1.0.weight"],
                                weights["mlp1.0.bias"])  # fmt: skip
            names = ("mlp1.1", "mlp1.3")
        else:
            seen = states[self.config.get("mm_vision_select_layer", -2)]
            seen = seen[:, int(self.config.get("mm_vision_select_feature") == "patch") :]
            names = ("model.mm_projector.0", "model.mm_projector.2")
        first, second = ((weights[f"{n}.weight"], weights[f"{n}.bias"]) for n in names)
        return F.linear(F.gelu(F.linear(seen, *first)), *second)


# Vision towers
def vision_states(weights: Mapping[str, Tensor], config: Values, x: Tensor) -> Iterator[Tensor]:
    """Hidden states of a pre-norm ViT: of CLIP, SigLIP or InternViT, by the names it has."""
    x = F.conv2d(x, weights["patch.weight"], weights.get("patch.bias"), stride=config["patch_size"])
    grid = x.shape[2]
    x = x.flatten(2).transpose(1, 2)
    if "class" in weights:
        x = torch.cat([weights["class"].expand(len(x), 1, -1), x], 1)
    x = x + at_size(weights["position"], grid, "class" in weights)
    if "before.weight" in weights:
        x = norm(x, weights, "before", config["layer_norm_eps"])
    yield x
    for index in range(config["num_hidden_layers"]):
        own = {n.split(".", 1)[1]: t for n, t in weights.items() if n.startswith(f"{index}.")}
        y = norm(x, own, "norm1", config["layer_norm_eps"])
        q, k, v = (linear(y, own, part) for part in "qkv")
        if "q_norm.weight" in own:
            q, k = norm(q, own, "q_norm", 1e-6), norm(k, own, "k_norm", 1e-6)
        heads = config["num_attention_heads"]
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in (q, k, v))
        y = linear(attend(q, k, v, None), own, "out")
        x = x + y * own.get("scale1", 1)
        y = norm(x, own, "norm2", config["layer_norm_eps"])
        y = linear(activation(config["hidden_act"])(linear(y, own, "fc1")), own, "fc2")
        x = x + y * own.get("scale2", 1)
        yield x


def at_size(table: Tensor, grid: int, has_class: bool) -> Tensor:
    """A table of positions for pictures of another size, as InternViT makes it."""
    first, rest = table[: int(has_class)], table[int(has_class) :]
    side = math.isqrt(len(rest))
    if side == grid:
        return table
    square = rest.T.view(1, -1, side, side).float()
    square = F.interpolate(square, (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([first, square[0].flatten(1).T.double()])


def shuffled(x: Tensor, r: int) -> Tensor:
    """Squares of ``r`` times ``r`` neighbours become one token, their channels row by row."""
    side = math.isqrt(x.shape[1])
    squares = x.view(len(x), side // r, r, side // r, r, -1).transpose(2, 3)
    return squares.flatten(3).flatten(1, 2)


# Decoders
def decoder(weights: Mapping[str, Tensor], config: Values, x: Tensor, family: str) -> Tensor:
    """Final hidden states of one sequence of embeddings."""
    eps = config.get("rms_norm_eps", config.get("layer_norm_eps"))
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"] // heads
    distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
    mask = (distance < 0) | (distance >= (config.get("sliding_window") or len(x)))
    for index in range(config["num_hidden_layers"]):
        start = f"model.layers.{index}."
        own = {n.removeprefix(start): t for n, t in weights.items() if n.startswith(start)}
        y = norm(x, own, "input_layernorm", eps)
        if family == "internvl":
            fused = linear(y, own, "self_attn.qkv_proj")
            q, k, v = fused.split([heads * width, groups * width, groups * width], -1)
        else:
            q, k, v = (linear(y, own, f"self_attn.{part}_proj") for part in "qkv")
        q, k, v = (part.unflatten(-1, (-1, width)) for part in (q, k, v))
        q, k = rotated(q, config), rotated(k, config)
        out = "self_attn.dense" if family == "bunny" else "self_attn.o_proj"
        attention = linear(attend(q[None], k[None], v[None], mask)[0], own, out)
        act = activation(config["hidden_act"])
        if family == "bunny":
            x = x + attention + linear(act(linear(y, own, "mlp.fc1")), own, "mlp.fc2")
            continue
        x = x + attention
        y = norm(x, own, "post_attention_layernorm", eps)
        if family == "internvl":
            gate, up = linear(y, own, "mlp.gate_up_proj").chunk(2, -1)
        else:
            gate, up = linear(y, own, "mlp.gate_proj"), linear(y, own, "mlp.up_proj")
        x = x + linear(act(gate) * up, own, "mlp.down_proj")
    return norm(x, weights, "model.final_layernorm" if family == "bunny" else "model.norm", eps)


def rotated(x: Tensor, config: Values) -> Tensor:
    """Rotary positions of ``[T, heads, width]``, also the scaled kinds ``linear`` and ``su``."""
    width = int(x.shape[-1] * config.get("partial_rotary_factor", 1.0))
    frequencies = config["rope_theta"] ** (-torch.arange(0, width, 2).double() / width)
    scaling, size = config.get("rope_scaling") or {}, 1.0
    if scaling.get("type") == "linear":
        frequencies = frequencies / scaling["factor"]
    elif scaling.get("type") == "su":
        short = config["original_max_position_embeddings"]
        kind = "long_factor" if len(x) > short else "short_factor"
        frequencies = frequencies / torch.tensor(scaling[kind]).double()
        stretch = config["max_position_embeddings"] / short
        size = math.sqrt(1 + math.log(stretch) / math.log(short)) if stretch > 1 else 1.0
    angles = torch.arange(len(x))[:, None, None] * frequencies
    a, b, rest = x[..., : width // 2], x[..., width // 2 : width], x[..., width:]
    cos, sin = angles.cos() * size, angles.sin() * size
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


# What all of them are made of
def linear(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def norm(x: Tensor, weights: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
    """LayerNorm where there is a bias, else RMSNorm."""
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    if bias is not None:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of ``[B, T, heads, width]``; query heads share key heads in order."""
    k, v = (part.repeat_interleave(q.shape[2] // k.shape[2], 2) for part in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        logits = logits.masked_fill(mask, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v).flatten(2)


def activation(name: str) -> Any:
    tanh_gelu = partial(F.gelu, approximate="tanh")
    known = {"gelu": F.gelu, "silu": F.silu, "gelu_new": tanh_gelu, "gelu_pytorch_tanh": tanh_gelu}
    return known.get(name) or {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}[name]


# Random ones
class _Random:
    """Tensors of the sizes that trained ones have."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int, mean: float = 0.0, std: float | None = None) -> Tensor:
        std = 0.8 / math.sqrt(math.prod(shape[1:])) if std is None else std
        return (mean + std * torch.randn(shape, generator=self.generator)).to(self.dtype)

    def linear(self, name: str, rows: int, columns: int, bias: bool = True) -> dict[str, Tensor]:
        found = {f"{name}.weight": self(rows, columns)}
        return found | ({f"{name}.bias": self(rows, std=0.2)} if bias else {})

    def norm(self, name: str, width: int, bias: bool = True) -> dict[str, Tensor]:
        found = {f"{name}.weight": self(width, mean=1.0, std=0.2)}
        return found | ({f"{name}.bias": self(width, std=0.2)} if bias else {})


def random_original(
    family: str, config: Values, vision: Values, seed: int, dtype: torch.dtype
) -> Original:
    make = _Random(seed, dtype)
    text = config["llm_config"] if family == "internvl" else config
    weights = _random_tower(make, vision, family)
    hidden, merged = text["hidden_size"], vision["hidden_size"]
    if family == "internvl":
        merged *= round(1 / config["downsample_ratio"]) ** 2
        weights |= make.norm("mlp1.0", merged)
    first, second = {"internvl": ("mlp1.1", "mlp1.3")}.get(
        family, ("model.mm_projector.0", "model.mm_projector.2")
    )
    weights |= make.linear(first, hidden, merged) | make.linear(second, hidden, hidden)
    language = _random_decoder(make, text, family)
    prefix = "language_model." if family == "internvl" else ""
    return Original(family, config, vision, weights | {prefix + n: t for n, t in language.items()})


def _random_tower(make: _Random, config: Values, family: str) -> dict[str, Tensor]:
    width, inner, patch = (config[n] for n in ("hidden_size", "intermediate_size", "patch_size"))
    has_class, rms = family != "bunny", config.get("norm_type") == "rms_norm"
    places = (config["image_size"] // patch) ** 2 + has_class
    made = {"patch.weight": make(width, 3, patch, patch), "position": make(places, width, std=0.5)}
    if family != "llava":
        made["patch.bias"] = make(width, std=0.2)
    if has_class:
        made["class"] = make(width, std=0.5)
    if family == "llava":
        made |= make.norm("before", width)
    if family != "internvl":
        made |= make.norm("after", width)
    for i in range(config["num_hidden_layers"]):
        made |= make.norm(f"{i}.norm1", width, not rms) | make.norm(f"{i}.norm2", width, not rms)
        for part in "qkv":
            made |= make.linear(f"{i}.{part}", width, width, config.get("qkv_bias", True))
        if config.get("qk_normalization"):
            made |= make.norm(f"{i}.q_norm", width, False) | make.norm(f"{i}.k_norm", width, False)
        made |= make.linear(f"{i}.out", width, width)
        made |= make.linear(f"{i}.fc1", inner, width) | make.linear(f"{i}.fc2", width, inner)
        if family == "internvl":
            made |= {f"{i}.scale{n}": make(width, mean=0.5, std=0.2) for n in (1, 2)}
    return {f"tower.{name}": tensor for name, tensor in made.items()}


def _random_decoder(make: _Random, config: Values, family: str) -> dict[str, Tensor]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    width = hidden // config["num_attention_heads"]
    keys, bias = config["num_key_value_heads"] * width, family == "bunny"
    table = make(config["vocab_size"], hidden, std=0.1 if config["tie_word_embeddings"] else 1.0)
    made = {"model.embed_tokens.weight": table}
    made["lm_head.weight"] = make(config["vocab_size"], hidden)
    made |= make.norm("model.final_layernorm" if bias else "model.norm", hidden, bias)
    for i in range(config["num_hidden_layers"]):
        start = f"model.layers.{i}."
        made |= make.norm(start + "input_layernorm", hidden, bias)
        attention, mlp = start + "self_attn.", start + "mlp."
        if family == "internvl":
            made |= make.linear(attention + "qkv_proj", hidden + 2 * keys, hidden, False)
            made |= make.linear(mlp + "gate_up_proj", 2 * inner, hidden, False)
        else:
            for part, rows in (("q", hidden), ("k", keys), ("v", keys)):
                made |= make.linear(f"{attention}{part}_proj", rows, hidden, bias)
        if bias:
            made |= make.linear(attention + "dense", hidden, hidden)
            made |= make.linear(mlp + "fc1", inner, hidden)
            made |= make.linear(mlp + "fc2", hidden, inner)
            continue
        made |= make.norm(start + "post_attention_layernorm", hidden, False)
        made |= make.linear(attention + "o_proj", hidden, hidden, False)
        made |= make.linear(mlp + "down_proj", hidden, inner, False)
        if family == "llava":
            for part in ("gate", "up"):
                made |= make.linear(f"{mlp}{part}_proj", inner, hidden, False)
    return made


# As files
def save_original(
    original: Original, folder: Path, tower: Path | None, kind: str = "safetensors", shards: int = 1
) -> None:
    """Write ``config.json`` and weights beside a tokenizer, the tower inside or in a folder."""
    (folder / "config.json").write_text(json.dumps(original.config))
    renamed = dict(_published_names(original, inside=tower is None))
    inside = {n: t for n, t in renamed.items() if not n.startswith("tower:")}
    save_weights(inside, folder, kind, shards)
    if tower is not None:
        save_weights({n.removeprefix("tower:"): t for n, t in renamed.items()
                      if n.startswith("tower:")}, tower, kind, 1)  # fmt: skip


def save_weights(weights: Mapping[str, Tensor], folder: Path, kind: str, shards: int) -> None:
    for old in [*folder.glob("*.safetensors*"), *folder.glob("*.bin*")]:
        old.unlink()
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = sorted(weights)
    files = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{kind}" if shards > 1 else f"{stem}.{kind}"
        part = {n: weights[n].clone() for n in names[number::shards]}
        files |= dict.fromkeys(part, file)
        (save_file if kind == "safetensors" else torch.save)(part, folder / file)  # type: ignore[operator]
    if shards > 1:
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": files}))


def _published_names(original: Original, inside: bool) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in original.weights.items():
        if not name.startswith("tower."):
            yield name, tensor
        elif original.family == "internvl":
            yield from _internvit(name.removeprefix("tower."), original.weights)
        else:
            start = "model.vision_tower.vision_tower." if inside else "tower:"
            yield start + "vision_model." + _clip(name.removeprefix("tower.")), tensor


def _clip(name: str) -> str:
    """The name that CLIP and SigLIP give a part of the tower."""
    first, _, rest = name.partition(".")
    if not first.isdigit():
        return NAMES["clip"][first] + ("." + rest if rest else "")
    part, _, kind = rest.partition(".")
    return f"encoder.layers.{first}.{NAMES['clip'][part]}.{kind}"


def _internvit(name: str, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The name that InternViT gives a part of the tower; queries, keys and values are one."""
    tensor = weights[f"tower.{name}"]
    first, _, rest = name.partition(".")
    if not first.isdigit():
        shape = tensor.shape if rest else (1, -1, tensor.shape[-1])
        new = NAMES["internvit"][first] + ("." + rest if rest else "")
        yield f"vision_model.embeddings.{new}", tensor.view(shape)
        return
    index, part, *kind = name.split(".")
    start = f"vision_model.encoder.layers.{index}."
    if part.startswith("scale"):
        yield f"{start}ls{part[-1]}", tensor
    elif part == "q":
        parts = [weights[f"tower.{index}.{p}.{kind[0]}"] for p in "qkv"]
        yield f"{start}attn.qkv.{kind[0]}", torch.cat(parts)
    elif part not in ("k", "v"):
        yield f"{start}{NAMES['internvit'][part]}.{kind[0]}", tensor
