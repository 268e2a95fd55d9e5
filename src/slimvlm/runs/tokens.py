"""Choose the tokens that a run keeps, first of all, from the data and further texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from slimvlm.core.errors import ConfigError, SlimError
from slimvlm.core.options import SizeOptions
from slimvlm.core.progress import Say, silent
from slimvlm.data.samples import Sample
from slimvlm.data.vocabulary import Vocabulary, choose_vocabulary
from slimvlm.models.anatomy import Anatomy
from slimvlm.models.files import file_if_reachable
from slimvlm.models.load import anatomy as anatomy_of
from slimvlm.models.load import load_config, load_processor, resolve
from slimvlm.planning.make import make_plan
from slimvlm.planning.plan import Plan
from slimvlm.pruning.tokens import token_ids_of
from slimvlm.runs.recipes import rules
from slimvlm.runs.request import Request, ratio_of


def vocabulary_for(
    model: str,
    options: SizeOptions,
    samples: Sequence[Sample],
    trust_remote_code: bool = False,
    fewest: int = 0,
) -> Vocabulary:
    """Choose the tokens that a model keeps, without its weights, from counted conversations.

    Where the number is open, at least ``fewest`` stay. Raises SlimError if the model has no
    tokenizer.
    """
    config, name = load_config(model, trust_remote_code), resolve(model)
    processor = load_processor(name, config, trust_remote_code)
    if processor is None:
        raise ConfigError(f"vocab_size {options.vocab_size}: the model has no tokenizer")
    path: str | Path | None = Path(name) / GENERATION_CONFIG_NAME
    if not Path(name).is_dir():
        path = file_if_reachable(name, GENERATION_CONFIG_NAME)
    has_one = path is not None and Path(path).is_file()
    generation = GenerationConfig.from_pretrained(name) if has_one else None
    size = options.vocab_size if isinstance(options.vocab_size, int) else None
    texts = [] if options.vocab_text is None else [Path(options.vocab_text)]
    named = token_ids_of(config, generation)
    return choose_vocabulary(processor, samples, size, texts, named, fewest)


def with_tokens(request: Request, samples: Sequence[Sample], say: Say = silent) -> Request:
    """Choose the tokens of a request, unless it keeps all or has them already.

    With axis ``auto`` and no token option, those of a further try with fewer tokens are chosen.
    """
    config = request.prune
    if request.tries_tokens and request.fewer_tokens is None:
        return replace(request, fewer_tokens=_fewer(request, samples, say))
    if not config.loses_tokens or request.tokens is not None:
        return request
    chosen = vocabulary_for(request.model, config, samples, config.trust_remote_code)
    say(chosen.line())
    return replace(request, tokens=chosen.tokens)


def tokens_to_try(shape: Anatomy) -> int | None:
    """Return how many tokens a try keeps at least; None where they weigh too little."""
    rule, weigh = rules().tokens_first, shape.token_params * shape.vocab_size
    is_much = weigh >= rule.from_share * shape.backbone_params
    return shape.vocab_size // rule.one_of if is_much else None


def _fewer(request: Request, samples: Sequence[Sample], say: Say) -> tuple[int, ...]:
    """Choose the tokens of a further try: all that the data needs, more by rank, up to a third.

    They never remove more than the ratio. There is no such try where too little is known of the
    needs of unseen text, or where tokens weigh little or cannot go.
    """
    config, shape = request.prune, anatomy_of(request.model)
    third = tokens_to_try(shape)
    if third is None or shape.why_tokens_stay is not None:
        return ()
    most = math.ceil(ratio_of(config) * shape.backbone_params / shape.token_params)
    fewest = max(third, shape.vocab_size - most)
    try:
        chosen = vocabulary_for(request.model, config, samples, config.trust_remote_code, fewest)
    except SlimError as error:
        say(f"all tokens stay: {error}")
        return ()
    if chosen.coverage is None or len(chosen.tokens) == chosen.total:
        return ()
    say(f"tried, too, and taken if held-out answers lose less by it: {chosen.line()}")
    return chosen.tokens


def tokens_alone(request: Request, anatomy: Anatomy) -> Plan | None:
    """Make the plan where a request's tokens alone remove its ratio; None if more must go."""
    if request.tokens is None or request.prune.experts:
        return None
    plan = make_plan(anatomy, [], 0.0, tokens=request.tokens)
    asked = ratio_of(request.prune)
    return replace(plan, asked_ratio=asked) if plan.ratio >= asked else None
