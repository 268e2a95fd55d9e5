"""Write the language model of a vision-language model as a text model of its own."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from slimvlm.core.errors import ConfigError, DataError, ReloadError, UnsupportedModelError
from slimvlm.core.files import require_free
from slimvlm.core.tables import read_table
from slimvlm.data import chat
from slimvlm.models import load as models
from slimvlm.models.families import FAMILIES
from slimvlm.models.parts import Parts, family_of, text_config_of
from slimvlm.pruning import save

_TABLES = read_table(__file__, "text_only.yaml")
STAND_INS: dict[str, tuple[str, Mapping[str, object]]] = _TABLES["stand_ins"]


def has_own_class(text_type: str) -> bool:
    """Whether transformers, and slimvlm, know a text model of a type."""
    return text_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and text_type in FAMILIES


def text_config_alone(config: PreTrainedConfig) -> PreTrainedConfig:
    """Describe the language model of a vision-language model as a text model, or refuse."""
    kind, text = config.model_type, text_config_of(config)
    if family_of(kind).vision is None:
        raise ConfigError(f"text_only: model_type {kind!r} is a text model already")
    text_type, fields = STAND_INS.get(text.model_type, (text.model_type, {}))
    if not has_own_class(text_type):
        message = f"transformers has its language model {text.model_type!r} inside of it only"
        why = f"cannot be written as text alone, because {message}"
        raise UnsupportedModelError(f"text_only: model_type {kind!r} {why}")
    outer = {"model_type", "auto_map", "architectures", *type(text).sub_configs}
    values = {name: value for name, value in text.to_dict().items() if name not in outer}
    values["tie_word_embeddings"] = getattr(config, "tie_word_embeddings", False)
    if text_type != text.model_type:
        rope, seen = values["rope_parameters"], _TABLES["of_pictures"]
        values["rope_parameters"] = {k: v for k, v in rope.items() if k not in seen}
    alone: PreTrainedConfig = CONFIG_MAPPING[text_type].from_dict({**values, **fields})
    return alone


def text_alone(model: PreTrainedModel) -> PreTrainedModel:
    """Return a text model, to be saved, that shares every weight with a vision-language model."""
    parts, text = Parts(model), models.empty_model(text_config_alone(model.config))
    beside, prefix = (*parts.family.towers, *parts.family.projector), f"{parts.family.backbone}."
    seeing = tuple(f"{path.removeprefix(prefix)}." for path in beside)  # Phi-4's lie inside
    inner = parts.text_model.state_dict()
    weights = {f"model.{k}": value for k, value in inner.items() if not k.startswith(seeing)}
    weights |= {f"lm_head.{name}": value for name, value in parts.head.state_dict().items()}
    if "lm_head.bias" in text.state_dict():  # Phi's, which a model that sees may lack
        weights.setdefault("lm_head.bias", parts.head.weight.new_zeros(len(parts.head.weight)))
    text.load_state_dict(weights, assign=True)
    text.tie_weights()
    models.set_class_(text)
    text.generation_config = model.generation_config
    return text


def text_tokenizer(processor: Any) -> Any:
    """Return a processor's tokenizer, whose chat template then takes turns that are strings."""
    tokenizer, template = chat.tokenizer_of(processor), getattr(processor, "chat_template", None)
    if tokenizer is not None:
        tokenizer._set_processor_class(None)  # where the name of the absent processor is kept
        tokenizer.init_kwargs.pop("processor_class", None)
    if not isinstance(template, str):
        return tokenizer
    turns, found = _TABLES["turns"], None
    expected = chat.render(processor, turns)
    for beginning in ("", _TABLES["turns_as_parts"]):
        tokenizer.chat_template = beginning + template
        with suppress(DataError):
            found = chat.render(tokenizer, turns)
        if found == expected:
            return tokenizer
    raise ConfigError("text_only: the chat template of the model takes no text without an image")


@torch.no_grad()
def export_text(model: str | Path, out: str | Path, force: bool = False) -> None:
    """Write the language model alone as a folder that plain ``AutoModelForCausalLM`` loads.

    Weights, token ids and logits of texts stay those of the whole model. The folder is read back
    before it takes its name; by then the weights that it was made of are no longer in memory.
    """
    require_free(out, force)
    described = models.load_config(model)
    models.require_full_precision(described, "written as text alone")
    text_config_alone(described)
    whole, processor = models.load(model, device="cpu")
    tokenizer, made_by = text_tokenizer(processor), save.plan_of(model)
    batch = save.probe(whole, tokenizer)
    expected, text = save.last_logits(whole, batch), text_alone(whole)
    if not family_of(described.model_type).caps_logits:
        for name in _TABLES["plain_logits"].keys() & vars(text.config).keys():
            setattr(text.config, name, _TABLES["plain_logits"][name])

    def check(folder: Path) -> save.CardFacts:
        both: tuple[Any, ...] = (whole, text)
        for each in both:  # one copy is in memory at a time
            each.to("meta")
        found = save.last_logits(save.read_back(folder, text), batch)
        save.require_same_logits(folder, found, expected)
        if tokenizer is not None:  # which class reads it depends on the type of the model
            again = models.load_processor(str(folder), text.config)
            ours, theirs = (each(save.PROBE_TEXT)["input_ids"] for each in (tokenizer, again))
            ids = save.probe(text, again)["input_ids"]
            if ours != theirs or not torch.equal(ids, batch["input_ids"]):
                raise ReloadError(f"{str(folder)!r}: the tokenizer reads back with other tokens")
        base = described._name_or_path
        return save.CardFacts(base=base, name=Path(out).name, is_text_of=described.model_type)

    save.write_folder(out, text, tokenizer, made_by, check, force=force)
