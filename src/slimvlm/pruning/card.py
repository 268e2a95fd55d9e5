"""The model card of a checkpoint: README.md with the metadata block that the hub reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from transformers import PreTrainedModel

from slimvlm.core.documents import parse_yaml, read_text
from slimvlm.core.errors import ConfigError
from slimvlm.models.files import file_if_reachable
from slimvlm.models.load import auto_class, is_uneven
from slimvlm.models.parts import Parts, text_config_of
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import MULTI_TOKEN_FIELDS
from slimvlm.pruning.layout import layout_of

CARD_FILE = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
_INHERITED = ("license", "license_name", "license_link", "base_model")
_TAGS = ["slimvlm", "pruned", "model-compression"]


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Facts for a model card that the checkpoint itself does not hold."""

    base: str  # the original: a hub id or a folder
    name: str
    command: str = ""
    results: str = ""  # a Markdown table
    # Metric and score in percent of each task, for the ``model-index``.
    scores: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    training: str = ""  # a sentence on the recovery
    held_out: str = ""  # a Markdown table of results on held-out samples


def write_card(folder: Path, model: PreTrainedModel, plan: Plan | None, facts: CardFacts) -> None:
    """Write a checkpoint's card; license and first original come from the original's own card."""
    base = base_card(facts.base)
    sees = Parts(model).family.vision is not None
    task = "image-text-to-text" if sees else "text-generation"
    original = facts.base if is_hub_id(facts.base) else base.get("base_model")
    text_config = text_config_of(model.config)
    heads = [n for n in MULTI_TOKEN_FIELDS if plan is not None and hasattr(text_config, n)]
    results = [  # name and type of the data are the same
        EvalResult(task, name, name, metric, round(value, 2))
        for name, (metric, value) in facts.scores.items()
    ]
    data = ModelCardData(
        base_model=original,
        library_name="transformers",
        license=base.get("license"),
        pipeline_tag=task,
        tags=_TAGS,
        model_name=facts.name if facts.scores else None,
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=facts.name,
        base=data.base_model or Path(facts.base).name,
        params=sum(p.numel() for p in model.parameters()),
        plan=plan,
        facts=facts,
        auto_class=auto_class(model.config).__name__,
        processor="AutoProcessor" if sees else "AutoTokenizer",
        needs_code=is_uneven(model.config),
        layout=layout_of(model.config),
        without_heads=next(iter(heads), ""),
        transformers=transformers.__version__,
    )
    card.save(folder / CARD_FILE)


def base_card(model: str) -> dict[str, Any]:
    """Metadata of a model's own card; empty if it has none or cannot be reached."""
    if not model:
        return {}
    path: str | Path | None = Path(model) / CARD_FILE
    if is_hub_id(model):
        path = file_if_reachable(model, CARD_FILE)
    if path is None or not Path(path).is_file():
        return {}
    try:
        head = read_text(path, "card", 2**22).lstrip("\ufeff \n").split("\n---", 1)[0]
        values = parse_yaml(head.removeprefix("---")) if head.startswith("---") else {}
    except (ConfigError, ValueError):
        return {}
    named = {name: values.get(name) for name in _INHERITED} if isinstance(values, dict) else {}
    return {name: value for name, value in named.items() if _is_short(value)}


def _is_short(value: Any) -> bool:
    """Whether a value of a card is a short text, or a list of some."""
    texts = value if isinstance(value, list) and len(value) < 100 else [value]
    return all(isinstance(text, str) and 0 < len(text) < 200 for text in texts)


def is_hub_id(model: str) -> bool:
    """Whether a name is that of a model on the hub, and not a folder here."""
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return bool(model) and not Path(model).exists()
