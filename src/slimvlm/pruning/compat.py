"""Write checkpoints that older transformers read: other names of weights and configuration fields.

transformers 5 moved rotary settings into ``rope_parameters``, renamed ``torch_dtype`` and took a
level out of the names of CLIP and SigLIP towers. Older versions load such a folder without an
exception, but with a random tower and another rotary base. The rewrites here put the old names
beside the new ones, or back in their place where the newest transformers reads both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from slimvlm.core.errors import ConfigError
from slimvlm.core.files import new_file, write_text

VERSIONS = ("4.57", "5.0")
"""Versions of transformers that can read the files besides the newest; tested in both."""

_TOWER = (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.")
_NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "llava": (_TOWER,),
    "llava_next": (_TOWER,),
    "vipllava": (_TOWER,),
    "llava_onevision": (_TOWER,),
    "paligemma": (_TOWER,),
    "qwen2_vl": (),
    "qwen2_5_vl": (),
    "qwen3_vl": (),
    "internvl": (),
    "idefics3": (),
    "smolvlm": (),
}
"""Names of weights to rewrite, by model type; only what is listed can be written for them."""
_NEED_5 = ("idefics3", "smolvlm")
"""Model types of which 4.57 computes other logits: it numbers a picture's patches otherwise."""
_FIELDS = {"vipllava": {"vision_feature_layers": "vision_feature_layer"}}
"""Other fields that older versions call otherwise: their name and today's, by model type."""
_TOWERS_WITH_A_LEVEL = ("clip_vision_model", "siglip_vision_model")


def require_known(config: Any) -> tuple[str, ...]:
    """Check that older transformers are known to read a model of this kind.

    Returns:
        The versions that do.

    Raises:
        ConfigError: If not; the message lists the kinds that they do.
    """
    kind = config.model_type
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    is_known = kind in _NAMES and (not _NAMES[kind] or tower in _TOWERS_WITH_A_LEVEL)
    if not is_known or getattr(config, "auto_map", None):
        raise ConfigError(
            f"compat: files of {kind!r} for transformers {' and '.join(VERSIONS)} are not known to "
            f"load right; known: {', '.join(_NAMES)}, with layers of equal widths and a CLIP or "
            "SigLIP tower"
        )
    return VERSIONS[1:] if kind in _NEED_5 else VERSIONS


def rewrite_for_older(folder: Path) -> None:
    """Rewrite a folder that ``save_pretrained`` has just written, in place.

    Args:
        folder: With ``config.json`` and safetensors files; its model type must be known.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in _parts(config):
        part |= _older_fields(part)
    write_text(path, json.dumps(config, indent=2) + "\n")
    rules = _NAMES[config["model_type"]]
    if rules:
        _rename_weights(folder, lambda name: _renamed(name, rules))


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration and those inside it."""
    yield config
    for value in config.values():
        if isinstance(value, dict) and "model_type" in value:
            yield from _parts(value)


def _older_fields(config: dict[str, Any]) -> dict[str, Any]:
    """What older versions call the fields of one configuration."""
    names = {"torch_dtype": "dtype", **_FIELDS.get(config.get("model_type", ""), {})}
    fields = {old: config[new] for old, new in names.items() if new in config}
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_type" not in rope:
        return fields
    scaling = dict(rope)
    fields["rope_theta"] = scaling.pop("rope_theta", 10000.0)
    if "partial_rotary_factor" in scaling:
        fields["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
    is_plain = scaling == {"rope_type": "default"}
    fields["rope_scaling"] = None if is_plain else {**scaling, "type": scaling["rope_type"]}
    return fields


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _rename_weights(folder: Path, rename: Callable[[str], str]) -> None:
    """Give the tensors of every file other names, one file in memory at a time."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {rename(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        with new_file(path) as written:
            save_file(tensors, written, metadata)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        values = json.loads(index.read_text())
        values["weight_map"] = {rename(k): v for k, v in values["weight_map"].items()}
        write_text(index, json.dumps(values, indent=2) + "\n")
