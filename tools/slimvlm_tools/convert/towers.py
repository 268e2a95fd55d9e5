"""The vision tower of LLaVA and Bunny: inside the checkpoint, or in a folder of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from slimvlm.core.errors import ConfigError, UnsupportedModelError
from slimvlm_tools.convert.layout import Piece, Rule, apply_rules
from slimvlm_tools.convert.source import Weights, find_folder, read_json

INSIDE = "model.vision_tower."
INSIDE_PATTERN = r"model\.vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?"
CLIP, SIGLIP = "clip", "siglip"
FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_channels", "image_size", "patch_size", "hidden_act", "layer_norm_eps"),
    *("attention_dropout", "initializer_range", "projection_dim"),
)
_CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "clip-vit-large-patch14-336": (CLIP, {**_CLIP_LARGE, "image_size": 336}),
    "clip-vit-large-patch14": (CLIP, {**_CLIP_LARGE, "image_size": 224}),
    "siglip-so400m-patch14-384": (
        SIGLIP,
        {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
    ),
}
"""Published towers, for checkpoints that hold the tower's weights but not its configuration."""
MEAN_STD = {
    CLIP: (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),
    SIGLIP: ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
_NOT_USED = "the language model reads the vision tower's hidden states only"
_OTHER_PARTS = Rule(
    r"(?:text_model|visual_projection|text_projection|logit_scale|logit_bias)(?:\..*)?",
    reason=_NOT_USED,
)


@dataclass(frozen=True)
class Tower:
    """A vision tower: its configuration as plain values, and where its weights are.

    Attributes:
        kind: ``clip`` or ``siglip``.
        fields: Values of the native vision configuration; its layer count is the original tower's.
        num_layers: Layers found in the weights.
        weights: The folder that holds them.
        inside: Whether that is the checkpoint itself.
        preprocessor: ``preprocessor_config.json`` of the tower's folder, or nothing.
    """

    kind: str
    fields: Mapping[str, Any]
    num_layers: int
    weights: Weights
    inside: bool
    preprocessor: Mapping[str, Any]

    @property
    def image_size(self) -> int:
        """Height and width of the pictures that it takes, in pixels."""
        return int(self.fields["image_size"])

    @property
    def num_patches(self) -> int:
        """Patches of one picture. A last, incomplete patch does not count."""
        return int((self.image_size // int(self.fields["patch_size"])) ** 2)

    def rules(self) -> list[Rule]:
        """Where its tensors go."""
        prefix = INSIDE_PATTERN if self.inside else r"(?:vision_model\.)?"
        extra = [] if self.inside else [_OTHER_PARTS]
        return [
            *extra,
            Rule(prefix + r"embeddings\.position_ids", reason="counts up from 0"),
            Rule(prefix + r"head\..*", reason=_NOT_USED),
            Rule(
                prefix + r"((?:embeddings|encoder|pre_layrnorm|post_layernorm)\..*)",
                (r"model.vision_tower.\1",),
            ),
        ]

    def place(self, num_layers: int) -> tuple[dict[str, Piece], dict[str, str]]:
        """Native names of its tensors, for a tower that keeps its first layers only."""
        names = [n for n in self.weights.shapes if n.startswith(INSIDE) or not self.inside]
        pieces, unused = apply_rules(self.weights, self.rules(), names)
        for index in range(num_layers, self.num_layers):
            for name in [n for n in pieces if f".encoder.layers.{index}." in n]:
                unused[pieces.pop(name).name] = "behind the layer that the language model reads"
        return pieces, unused


def find_tower(
    source: Weights, config: Mapping[str, Any], kind: str, vision_tower: str | Path | None
) -> Tower:
    """Find a tower's weights and configuration.

    Weights inside the checkpoint win over the folder. What the folder says of heads, activation
    and epsilon holds for both, since weights do not tell.

    Args:
        source: The checkpoint.
        config: Its ``config.json``.
        kind: The only kind of tower that the family's code has: ``clip`` or ``siglip``.
        vision_tower: The tower's folder or hub id; by default what ``mm_vision_tower`` names, if
            it is a local folder or in the hub cache.

    Raises:
        ConfigError: If weights or configuration are to be had nowhere.
        UnsupportedModelError: If the tower is of another kind, or not what its folder says.
    """
    named = str(config.get("mm_vision_tower") or config.get("vision_tower") or "")
    inside = any(name.startswith(INSIDE) for name in source.shapes)
    folder = _tower_folder(named, vision_tower)
    if folder is None and not inside:
        raise ConfigError(
            f"vision_tower: the checkpoint does not hold the weights of {named!r}. Give its folder"
        )
    trained = [n for n in ("unfreeze_mm_vision_tower", "unfreeze_vision_tower") if config.get(n)]
    if trained and not inside:
        raise ConfigError(
            f"config.json: {trained[0]} is true, but the checkpoint holds no vision tower"
        )
    fields, preprocessor = _describe(folder, kind, named, config.get("vision_config"))
    weights = Weights(folder) if folder is not None and not inside else source
    tower = Tower(kind, fields, _count_layers(weights, inside), weights, inside, preprocessor)
    _check_width(tower, named)
    return tower


def image_processor(tower: Tower, aspect_ratio: str | None, center_crop: bool) -> Any:
    """The native counterpart of the original pictures' way: pad to a square or not, then resize.

    Padding has the colour ``int(255 * mean)``. Settings come from the tower's
    ``preprocessor_config.json`` where it has them.

    Raises:
        UnsupportedModelError: If it makes pictures of another size than the tower takes.
    """
    given, side = tower.preprocessor, tower.image_size
    mean, std = MEAN_STD[tower.kind]
    square = {"height": side, "width": side}
    size = given.get("size", {"shortest_edge": side} if center_crop else square)
    crop = given.get("crop_size", square) if center_crop else square
    size = size if isinstance(size, dict) else {"shortest_edge": size} if center_crop else square
    crop = crop if isinstance(crop, dict) else {"height": crop, "width": crop}
    do_crop = center_crop and bool(given.get("do_center_crop", True))
    made = crop if do_crop else size
    if set(made.values()) != {side}:
        raise UnsupportedModelError(
            f"vision_tower: its preprocessor makes pictures of {dict(made)}, the tower takes {side}"
        )
    switches: dict[str, Any] = {
        name: bool(given.get(name, True)) for name in ("do_resize", "do_rescale", "do_normalize")
    }
    return LlavaImageProcessorPil(
        do_pad=aspect_ratio == "pad",
        size=size,
        do_center_crop=do_crop,
        crop_size=crop,
        resample=given.get("resample", 3),
        rescale_factor=given.get("rescale_factor", 1 / 255),
        image_mean=list(given.get("image_mean", mean)),
        image_std=list(given.get("image_std", std)),
        **switches,
    )


def _tower_folder(named: str, vision_tower: str | Path | None) -> Path | None:
    if vision_tower is not None:
        return find_folder(vision_tower, "vision_tower")
    try:
        return find_folder(named, "vision_tower", cached_only=True)
    except ConfigError:
        return None


def _describe(
    folder: Path | None, kind: str, named: str, stated: Mapping[str, Any] | None
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Values of the vision configuration, and ``preprocessor_config.json``."""
    if folder is None and stated:
        return {name: stated[name] for name in FIELDS if stated.get(name) is not None}, {}
    if folder is None:
        known, fields = KNOWN.get(PurePosixPath(named).name, ("", {}))
        if known != kind:
            raise ConfigError(
                f"vision_tower: the configuration of {named!r} is not known. Give its folder"
            )
        return dict(fields), {}
    config = read_json(folder / "config.json")
    found = str(config.get("model_type", ""))
    if found.removesuffix("_vision_model") != kind:
        raise UnsupportedModelError(
            f"vision_tower {str(folder)!r}: model_type {found!r} cannot be converted here. Can be: "
            f"{kind}, {kind}_vision_model"
        )
    values = config
    if found == kind:  # the whole two-tower model; old files say its vision part twice
        values = {**config.get("vision_config", {}), **(config.get("vision_config_dict") or {})}
    fields = {name: values[name] for name in FIELDS if values.get(name) is not None}
    if "image_size" not in fields or "patch_size" not in fields:
        fields = {"image_size": 224, "patch_size": 32 if kind == CLIP else 16, **fields}
    return fields, read_json(folder / "preprocessor_config.json")


def _count_layers(weights: Weights, inside: bool) -> int:
    prefix = INSIDE if inside else ""
    found = [
        int(name.split(".encoder.layers.")[1].split(".")[0])
        for name in weights.shapes
        if name.startswith(prefix) and ".encoder.layers." in name and "text_model." not in name
    ]
    found += [
        int(name.split(".")[2]) for name in weights.shapes if name.startswith("encoder.layers.")
    ]
    return max(found, default=-1) + 1


def _check_width(tower: Tower, named: str) -> None:
    ends = "embeddings.patch_embedding.weight"
    prefix = INSIDE if tower.inside else ""
    shapes = [
        shape
        for name, shape in tower.weights.shapes.items()
        if name.startswith(prefix) and name.endswith(ends)
    ]
    width = tower.fields.get("hidden_size", 768)
    if not shapes or shapes[0][0] != width or math.prod(shapes[0][2:]) != _patch_area(tower):
        found = list(shapes[0]) if shapes else "no patch embedding"
        raise ConfigError(
            f"vision_tower: the weights ({found}) are not those of {named!r} (hidden_size {width}, "
            f"patch_size {tower.fields.get('patch_size')}). Give the folder that describes them"
        )


def _patch_area(tower: Tower) -> int:
    return int(tower.fields["patch_size"]) ** 2
