"""The vision tower of LLaVA and Bunny: inside the checkpoint, or in a folder of its own."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from transformers import CLIPVisionConfig, SiglipVisionConfig
from transformers.image_processing_utils import get_size_dict
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from slimvlm.core.errors import ConfigError, UnsupportedModelError
from slimvlm_tools.convert.pieces import Piece, Rules, place
from slimvlm_tools.convert.source import OriginalWeights, find_folder, pick, read_json

INSIDE = "model.vision_tower."
_PREFIX = r"(?:model\.vision_tower\.)?(?:vision_tower\.)?(?:vision_model\.)?"
_PARTS = r"(?:embeddings|encoder|pre_layrnorm|post_layernorm)"
RULES: Rules = {
    _PREFIX + r"embeddings\.position_ids": (),  # counts up from 0
    # the language model reads hidden states, and none of these
    _PREFIX + r"head\..*": (),
    r"(?:text_model|visual_projection|text_projection|logit_scale|logit_bias)(?:\..*)?": (),
    _PREFIX + rf"({_PARTS}\..*)": (r"model.vision_tower.\1",),
}
PATCHES = "model.vision_tower.embeddings.patch_embedding.weight"
LAYER = re.compile(r"model\.vision_tower\.encoder\.layers\.(\d+)\..*")
CLIP, SIGLIP = "clip", "siglip"
CONFIGS: dict[str, type[CLIPVisionConfig | SiglipVisionConfig]] = {
    CLIP: CLIPVisionConfig,
    SIGLIP: SiglipVisionConfig,
}
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
_SIGLIP_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "clip-vit-large-patch14-336": (CLIP, {**_CLIP_LARGE, "image_size": 336}),
    "clip-vit-large-patch14": (CLIP, {**_CLIP_LARGE, "image_size": 224}),
    "siglip-so400m-patch14-384": (SIGLIP, {**_SIGLIP_SO400M, "image_size": 384}),
}
"""Published towers, for checkpoints that hold the tower's weights but not its configuration."""
MEAN_STD = {
    CLIP: ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    SIGLIP: ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


@dataclass(frozen=True)
class Tower:
    """A vision tower: its configuration, and where its weights are.

    Attributes:
        kind: ``clip`` or ``siglip``.
        config: The native vision configuration; it may say more layers than there are weights.
        pieces: Its tensors by native name.
        preprocessor: ``preprocessor_config.json`` of the tower's folder, or nothing.
    """

    kind: str
    config: Any
    pieces: Mapping[str, Piece]
    preprocessor: Mapping[str, Any]

    @property
    def num_patches(self) -> int:
        """Patches of one picture. A last, incomplete patch does not count."""
        return int((self.config.image_size // self.config.patch_size) ** 2)

    @property
    def num_layers(self) -> int:
        """Layers found in the weights."""
        return max((_layer_of(name) for name in self.pieces), default=-1) + 1

    def first_layers(self, count: int) -> Tower:
        """The tower without the layers behind the one that the language model reads."""
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = count
        pieces = {name: piece for name, piece in self.pieces.items() if _layer_of(name) < count}
        return Tower(self.kind, config, pieces, self.preprocessor)


def find_tower(
    source: OriginalWeights, config: Mapping[str, Any], kind: str, vision_tower: str | Path | None
) -> Tower:
    """Find a tower's weights and configuration.

    Weights inside the checkpoint win over the folder. What the folder says of heads, activation
    and epsilon holds for both, since weights do not tell.
    """
    named = str(config.get("mm_vision_tower") or config.get("vision_tower") or "")
    inside = [name for name in source.tensors if name.startswith(INSIDE)]
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
    fields = _described(folder, kind, named, config.get("vision_config"))
    weights = OriginalWeights(folder) if folder is not None and not inside else source
    pieces = place(weights, inside or weights.tensors, RULES)
    preprocessor = {} if folder is None else read_json(folder / "preprocessor_config.json")
    tower = Tower(kind, CONFIGS[kind](**pick(fields, FIELDS)), pieces, preprocessor)
    _check_width(tower, named)
    return tower


def image_processor(tower: Tower, aspect_ratio: str | None) -> LlavaImageProcessorPil:
    """The native counterpart of the original pictures' way: pad to a square or not, then resize.

    CLIP's are cropped from their shorter side, SigLIP's squeezed. Padding has the colour
    ``int(255 * mean)``. Settings come from the tower's ``preprocessor_config.json`` where it has
    them.
    """
    given, side, crops = tower.preprocessor, tower.config.image_size, tower.kind == CLIP
    mean, std = MEAN_STD[tower.kind]
    size = get_size_dict(given.get("size", side), default_to_square=not crops)
    crop = get_size_dict(given.get("crop_size", side) if crops else side)
    crops = crops and bool(given.get("do_center_crop", True))
    made = crop if crops else size
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
        do_center_crop=crops,
        crop_size=crop,
        resample=given.get("resample", 3),
        rescale_factor=given.get("rescale_factor", 1 / 255),
        image_mean=list(given.get("image_mean", mean)),
        image_std=list(given.get("image_std", std)),
        **switches,
    )


def _layer_of(name: str) -> int:
    """The layer that a native tensor of the tower belongs to; -1 for one outside the layers."""
    match = LAYER.fullmatch(name)
    return int(match[1]) if match else -1


def _tower_folder(named: str, vision_tower: str | Path | None) -> Path | None:
    if vision_tower is not None:
        return find_folder(vision_tower, "vision_tower")
    try:
        return find_folder(named, "vision_tower", cached_only=True)
    except ConfigError:
        return None


def _described(
    folder: Path | None, kind: str, named: str, stated: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """What is said of a tower: by its folder, by the checkpoint, or by its name."""
    if folder is None:
        known, fields = KNOWN.get(PurePosixPath(named).name, ("", {}))
        if not stated and known != kind:
            raise ConfigError(
                f"vision_tower: the configuration of {named!r} is not known. Give its folder"
            )
        return stated or fields
    values = read_json(folder / "config.json")
    found = str(values.get("model_type", ""))
    if found.removesuffix("_vision_model") != kind:
        raise UnsupportedModelError(
            f"vision_tower {str(folder)!r}: model_type {found!r} cannot be converted here. Can be: "
            f"{kind}, {kind}_vision_model"
        )
    if found == kind:  # the whole two-tower model; old files say its vision part twice
        return {**values.get("vision_config", {}), **(values.get("vision_config_dict") or {})}
    return values


def _check_width(tower: Tower, named: str) -> None:
    """Check that the first weights are of the tower that is described."""
    patches = tower.pieces.get(PATCHES)
    width, side = tower.config.hidden_size, tower.config.patch_size
    shape = list(patches.shape) if patches else "no patch embedding"
    if patches is None or patches.shape[0] != width or math.prod(patches.shape[2:]) != side**2:
        raise ConfigError(
            f"vision_tower: the weights ({shape}) are not those of {named!r} (hidden_size {width}, "
            f"patch_size {side}). Give the folder that describes them"
        )
