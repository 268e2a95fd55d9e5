"""Write checkpoint files in a layout that older transformers, engines and the newest all read.

transformers 5 moved rotary settings into ``rope_parameters``, renamed ``torch_dtype`` and removed a
level from the names of CLIP and SigLIP towers. Older versions load such a folder without an
exception, but with a random tower and another rotary base; vLLM refuses it. So checkpoints get the
old fields in addition to the new ones, and the old names instead of the new ones, wherever the
newest transformers reads both and older ones were seen to compute the same. Tokenizers get the
class and the fields that both know, whatever the model.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimvlm.core.files import new_file, write_text
from slimvlm.core.tables import read_table
from slimvlm.data.chat import tokenizer_of
from slimvlm.models.files import write_weights

Reader = Callable[[str], Tensor]  # gives parameters by name, if a model has no storage for them
SHARD_BYTES = 10**9  # largest weight file written tensor by tensor: one is in memory at a time


@dataclass(frozen=True)
class Layout:
    """How the files of one model type are written."""

    since: str = "4.57"  # the oldest transformers that was seen to compute the same from them
    tower_level: bool = False  # whether names of the tower get the level of older versions
    fields: Mapping[str, str] = field(default_factory=dict)  # names in older versions, and today's
    # language models inside with which older versions compute something else
    except_around: Sequence[str] = ()


LAYOUTS = {kind: Layout(**row) for kind, row in read_table(__file__, "layouts.yaml").items()}
"""Model types whose files older versions read."""


def layout_of(config: Any) -> Layout | None:
    """Find the layout for a configuration; None where none is known or layers are uneven."""
    row = LAYOUTS.get(config.model_type)
    if row is None or getattr(config, "auto_map", None):
        return None
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    if row.tower_level and tower not in ("clip_vision_model", "siglip_vision_model"):
        return None
    text = getattr(getattr(config, "text_config", None), "model_type", None)
    return None if text in row.except_around else row


def lay_out(folder: Path, config: Any) -> None:
    """Rewrite a folder of ``save_pretrained`` in its model's layout, if one is known, in place."""
    layout = layout_of(config)
    if layout is None:
        return
    path = folder / "config.json"
    values = json.loads(path.read_text())
    parts = [values]  # grows by the parts of its parts
    for part in parts:
        parts += [v for v in part.values() if isinstance(v, dict) and "model_type" in v]
        if "dtype" in part:
            part["torch_dtype"] = part["dtype"]
        rope = part.get("rope_parameters") or {}
        if "sliding_attention" in rope:
            local = rope["sliding_attention"]
            part["rope_local_base_freq"] = local.get("rope_theta", 10000.0)
            rope = rope.get("full_attention", local)
        if "rope_type" not in rope:
            continue
        scaling = dict(rope)
        part["rope_theta"] = scaling.pop("rope_theta", 10000.0)
        if "partial_rotary_factor" in scaling:
            part["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
        is_plain = scaling == {"rope_type": "default"}
        part["rope_scaling"] = None if is_plain else {**scaling, "type": scaling["rope_type"]}
    values |= {old: values[new] for old, new in layout.fields.items() if new in values}
    write_text(path, json.dumps(values, indent=2) + "\n")
    if not layout.tower_level:
        return
    old, new = re.compile(r"^vision_tower\.(?!vision_model\.)"), "vision_tower.vision_model."
    for path in sorted(folder.glob("*.safetensors")):
        with new_file(path) as written:  # from mapped memory: no tensor is held
            renamed = {old.sub(new, name): tensor for name, tensor in load_file(path).items()}
            save_file(renamed, written, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        values = json.loads(index.read_text())
        values["weight_map"] = {old.sub(new, k): v for k, v in values["weight_map"].items()}
        write_text(index, json.dumps(values, indent=2) + "\n")


def write_model(
    folder: Path, model: PreTrainedModel, processor: Any, read: Reader | None = None
) -> None:
    """Write configuration, weights, code and processor in the layout that most libraries read."""
    if read is None:
        model.save_pretrained(folder)
    else:
        write_weights(model, read, folder, SHARD_BYTES)
    lay_out(folder, model.config)
    if processor is not None:
        write_processor(processor, folder)


def write_processor(processor: Any, folder: Path) -> None:
    """Write a processor or tokenizer so that older versions and the newest read the same."""
    processor.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return
    tokenizer = tokenizer_of(processor)
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":  # the newest knows both names
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.setdefault("model_input_names", tokenizer.model_input_names)
    others = config.get("extra_special_tokens") or []
    if isinstance(others, list):
        config["additional_special_tokens"] = others
        config["extra_special_tokens"] = {
            name: config[name]
            for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES
            if name in config and name not in PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES
        }
    write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
