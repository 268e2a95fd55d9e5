"""Remove tokens from the tokenizer, and renumber every field that holds token ids.

Kept tokens get new ids in their old order. Ids outside the vocabulary, as some configurations have
for images or by default, do not change.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedConfig, PreTrainedModel

from slimvlm.core.errors import ConfigError, UnsupportedModelError, shortened
from slimvlm.data.chat import tokenizer_of
from slimvlm.data.roles import TOKEN_FIELD, token_fields, token_numbers
from slimvlm.data.vocabulary import TokenizerFile
from slimvlm.models.parts import Parts, text_config_of
from slimvlm.planning.plan import Plan

_OF_PROCESSOR = re.compile(r"\w*_(id|ids|index)")
_MAY_GO = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
"""Fields that forbid tokens; removed tokens are also removed from them."""
_UNKNOWN = ("sequence_bias", "forced_decoder_ids")  # name tokens in forms that are not renumbered


def new_numbers(plan: Plan) -> dict[int, int]:
    """Map old token ids to new ones."""
    return {old: new for new, old in enumerate(plan.tokens or ())}


def trim_tokenizer_(processor: Any, plan: Plan) -> None:
    """Remove a plan's tokens from the original's processor or tokenizer, in place.

    Vocabulary, merges, added tokens, the template of special tokens and padding change together. A
    text of kept tokens gets the same ones, with their new ids; any other text gets more, shorter
    tokens, and still decodes to itself. Nothing changes if the tokenizer is trimmed already or the
    plan has no ``tokens``.

    Raises:
        ConfigError: If the plan has tokens that the tokenizer lacks, or removes one that it needs.
        UnsupportedModelError: If tokenizers of this kind cannot be trimmed.
    """
    if plan.tokens is None:
        return
    file = TokenizerFile.of(processor)
    if file.texts.keys() == set(range(len(plan.tokens))):
        return
    tokenizer = tokenizer_of(processor)
    trimmed = Tokenizer.from_str(file.trimmed(plan.tokens))
    texts = [trimmed.id_to_token(number) for number in range(trimmed.get_vocab_size())]
    if texts != [file.texts[token] for token in plan.tokens]:
        raise UnsupportedModelError(f"tokens: {file.name} cannot be renumbered")
    trimmed.encode_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens
    tokenizer._tokenizer = trimmed
    if processor is not tokenizer:
        new = new_numbers(plan)
        for name, value in list(vars(processor).items()):
            if _OF_PROCESSOR.fullmatch(name):
                setattr(processor, name, _renumbered(value, new, name))


def trimmed_processor(processor: Any, plan: Plan | None) -> Any:
    """Return a processor with a plan's tokens: itself if nothing changes, else a copy."""
    if processor is None or plan is None or plan.tokens is None:
        return processor
    changed = copy.deepcopy(processor)
    trim_tokenizer_(changed, plan)
    return changed


def token_ids_of(*configs: Any) -> set[int]:
    """Collect the token ids in configurations, such as those of images and the end of a text."""
    return {
        number
        for config in configs
        for _, _, name, value in token_fields(config)
        if name not in _MAY_GO
        for number in token_numbers(value)
        if number >= 0
    }


def require_named_tokens(model: PreTrainedModel, plan: Plan) -> None:
    """Refuse a plan that removes a token in the model's configuration, and name the field."""
    if plan.tokens is None:
        return
    rows, kept = plan.before.vocab_size, set(plan.tokens)
    for config in (model.config, model.generation_config):
        for name in _UNKNOWN:
            if getattr(config, name, None) is not None:
                told = f"plan: the tokens of {name} in {type(config).__name__} cannot be renumbered"
                raise ConfigError(f"{told}; remove it first")
        for _, where, name, value in token_fields(config):
            lost = [n for n in token_numbers(value) if 0 <= n < rows and n not in kept]
            if lost and name not in _MAY_GO:
                named = f"the model's {where} {shortened(value)}"
                raise ConfigError(f"plan: tokens must contain {lost[0]}, which is {named}")


def renumber_config_(config: PreTrainedConfig, plan: Plan) -> None:
    """Renumber the token ids of a configuration and its parts, in place."""
    if plan.tokens is None:
        return
    new = new_numbers(plan)
    for owner, _, name, value in list(token_fields(config)):
        setattr(owner, name, _renumbered(value, new, name))
    is_whole = config.model_type == plan.before.model_type
    for part in (config, text_config_of(config)) if is_whole else (config,):
        for name in _row_fields(plan):
            if getattr(part, name, None) == plan.before.vocab_size:
                setattr(part, name, len(plan.tokens))


def _row_fields(plan: Plan) -> list[str]:
    return ["vocab_size", *(s.rows for s in plan.before.backbone.layer_stacks if s.rows)]


def renumber_modules_(model: PreTrainedModel, plan: Plan) -> None:
    """Renumber copies of token ids in modules and the generation configuration, in place."""
    if plan.tokens is None:
        return
    new = new_numbers(plan)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if TOKEN_FIELD.fullmatch(name):
                setattr(module, name, _renumbered(value, new, name))
        for name in _row_fields(plan):
            if vars(module).get(name) == plan.before.vocab_size:
                setattr(module, name, len(plan.tokens))
    text_model = model.get_submodule(plan.before.family.backbone)
    embeddings = (holder for stack, holder in Parts(model).stacks() if stack.rows)
    for owner in (text_model, text_model.get_submodule("embed_tokens"), *embeddings):
        if (padding := vars(owner).get("padding_idx")) is not None:
            owner.padding_idx = new.get(padding)  # type: ignore[assignment]
    for owner, _, name, value in list(token_fields(model.generation_config)):
        setattr(owner, name, _renumbered(value, new, name))


def _renumbered(value: Any, new: Mapping[int, int], name: str) -> Any:
    """Replace the token ids in a field's value; leave out forbidden tokens that were removed."""
    if isinstance(value, list | tuple):
        if name in _MAY_GO:
            value = [each for each in value if all(n in new for n in token_numbers(each))]
        return type(value)(_renumbered(each, new, name) for each in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return new.get(value, value)
    return value
