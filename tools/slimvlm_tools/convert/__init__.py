"""Original-format checkpoints (LLaVA-1.5, Bunny-v1.0, Mini-InternVL-Chat) as native classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from slimvlm.core.errors import ConfigError, UnsupportedModelError
from slimvlm.core.files import mark_checkpoint, new_folder, require_free
from slimvlm.models.files import unreadable
from slimvlm.models.load import empty_model, load_config
from slimvlm.pruning.save import CardFacts, write_card
from slimvlm_tools.convert.internvl import plan_internvl
from slimvlm_tools.convert.llava import plan_bunny, plan_llava
from slimvlm_tools.convert.pieces import Conversion
from slimvlm_tools.convert.source import find_folder, read_json
from slimvlm_tools.convert.write import check_written, write_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NATIVE = ("LlavaForConditionalGeneration", "InternVLForConditionalGeneration")
"""The classes that originals become."""


class Original(NamedTuple):
    """A family of originals.

    Attributes:
        fields: What its configuration must have, and a native one has not.
        plan: From folder, configuration and vision tower to what becomes of them. Raises
            UnsupportedModelError for what has no native counterpart, before a weight is read where
            the configuration shows it, and ConfigError where files are missing or wrong.
    """

    fields: tuple[str, ...]
    plan: Callable[[Path, Mapping[str, Any], str | Path | None], Conversion]


ORIGINALS = {
    "LlavaLlamaForCausalLM": Original(("mm_vision_tower", "vocab_size"), plan_llava),
    "BunnyPhiForCausalLM": Original(("mm_vision_tower", "vocab_size"), plan_bunny),
    "InternVLChatModel": Original(("llm_config", "vision_config"), plan_internvl),
}
"""By the class that an original's configuration names."""
MODEL_TYPES = {
    "llava_llama": "LlavaLlamaForCausalLM",
    "llava": "LlavaLlamaForCausalLM",
    "bunny-phi": "BunnyPhiForCausalLM",
    "internvl_chat": "InternVLChatModel",
}
"""The class of configurations that do not name one."""


def convert(
    source: str | Path,
    out: str | Path,
    vision_tower: str | Path | None = None,
    force: bool = False,
    dtype: str | None = None,
) -> Path:
    """Write an original-format checkpoint anew for plain transformers, with the same outputs.

    Logits, token ids of conversations and pixel values are those of the original code (to
    rounding; see ``docs/convert.md``), which is not needed and never run. Tensors go from the
    source to the new files one at a time, so memory stays at about one output file (1 GiB)
    whatever the model's size.

    Args:
        source: Folder or hub id of the original: LLaVA-1.5 (Llama), Bunny-v1.0 (Phi-2) or
            Mini-InternVL-Chat (Phi-3).
        out: The new folder. It appears when it is complete and has been loaded back.
        vision_tower: Folder or hub id of the vision tower, for LLaVA and Bunny. Needed where the
            checkpoint does not hold its weights (they win where it does), or where they are not
            those of the published tower that the configuration names.
        force: Whether an existing folder may be replaced.
        dtype: ``float32``, ``bfloat16`` or ``float16``; by default every tensor stays as stored.

    Returns:
        The new folder.

    Raises:
        ConfigError: If a file or option is missing or wrong, or the folder exists.
        UnsupportedModelError: If something in the checkpoint has no native counterpart.
        ReloadError: If what was written does not load back.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} must be one of: {', '.join(DTYPES)}")
    out = require_free(out, force)
    folder = find_folder(source, "source")
    config = read_json(folder / "config.json")
    original = original_of(config)
    if (folder / "adapter_config.json").is_file():
        raise UnsupportedModelError(
            f"source {str(source)!r} is a LoRA adapter. Merge it into its model first"
        )
    with unreadable(source, "original"):
        conversion = original.plan(folder, config, vision_tower)
    generation = read_json(folder / "generation_config.json")
    with new_folder(out, force) as partial:
        write_checkpoint(conversion, generation, partial, DTYPES[dtype] if dtype else None)
        check_written(partial)
        empty = empty_model(load_config(partial))
        write_card(partial, empty, None, CardFacts(base=str(source), name=out.name, copied=True))
        mark_checkpoint(partial)
    return out


def original_of(config: Mapping[str, Any]) -> Original:
    """The family of an original's ``config.json``, by the class that it names."""
    model_type = str(config.get("model_type", ""))
    named = config.get("architectures") or [MODEL_TYPES.get(model_type, "")]
    name = str(named[0])
    original = ORIGINALS.get(name)
    if name in NATIVE:
        raise UnsupportedModelError(
            f"config.json: {name!r} is a native class already. There is nothing to convert"
        )
    if original is None:
        raise UnsupportedModelError(
            f"config.json: architectures {name!r} (model_type {model_type!r}) cannot be converted. "
            f"Can be: {', '.join(ORIGINALS)}"
        )
    if lost := [field for field in original.fields if field not in config]:
        raise UnsupportedModelError(
            f"config.json: {name} without {lost[0]!r} is not in the original format"
        )
    return original
