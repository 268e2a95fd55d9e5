"""Write Hugging Face checkpoint folders. Every one is read back and compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from slimvlm.core.errors import ReloadError
from slimvlm.core.files import mark_checkpoint, new_folder
from slimvlm.data import chat
from slimvlm.data.chat import tokenizer_of
from slimvlm.data.samples import Message, Sample
from slimvlm.models import modeling_pruned
from slimvlm.models.classes import (
    auto_class,
    auto_map_of,
    is_quantized,
    is_uneven,
    set_class_,
)
from slimvlm.models.cost import free_memory
from slimvlm.models.hidden import evaluating
from slimvlm.models.load import load_processor
from slimvlm.models.losses import CHUNK
from slimvlm.planning.plan import Plan
from slimvlm.pruning.card import CardFacts, write_card
from slimvlm.pruning.layout import lay_out, write_processor
from slimvlm.pruning.tokens import trimmed_processor
from slimvlm.pruning.uneven import padded

PLAN_FILE = "slimvlm_plan.json"
_PROBE = " Plain words, žluťoučký kůň,\n\t日本語, ελληνικά, 🙂 and  1234567890"


def save(
    model: PreTrainedModel,
    processor: Any,
    out: str | Path,
    plan: Plan | None = None,
    force: bool = False,
    pad: bool = False,
    also: Callable[[Path], None] | None = None,
    facts: CardFacts | None = None,
) -> None:
    """Write a checkpoint that plain ``from_pretrained`` loads, and prove it.

    If the layers have different widths, ``from_pretrained`` needs ``trust_remote_code=True``: the
    folder then holds ``modeling_pruned.py``, which cuts the native class to these widths. Or they
    are padded.

    Where a layout is known that older transformers and engines read, too, the files have it
    (`slimvlm.pruning.layout`).

    The folder is written beside its place and read back; logits on a probe (with a picture, if
    the model sees) must agree before it is renamed.

    Args:
        model: The model.
        processor: Its processor or tokenizer; None writes none.
        out: The new folder.
        plan: The plan that made the model; stored as ``slimvlm_plan.json``. If it removed tokens,
            the processor is written without them; one that still has them stays as it is.
        force: Whether an existing folder may be replaced.
        pad: Whether layers of different widths are filled up with zeros to the widest, which
            loads everywhere without code but is as large and slow as the widest layer.
        also: Writes what else belongs into the folder.
        facts: What the model card, ``README.md``, says beside what was removed; by default the
            original is what the model was loaded from.

    Raises:
        ConfigError: If the folder exists.
        OutputError: If another run writes there, or the disk is full or read-only.
        ReloadError: If what was written does not load back to the same model.
    """
    set_class_(model)
    processor = trimmed_processor(processor, plan)
    written = padded(model) if pad and is_uneven(model.config) else model
    with new_folder(out, force) as folder:
        written.save_pretrained(folder)
        lay_out(folder, written.config)
        known = facts or CardFacts(base=model.config._name_or_path, name=Path(out).name)
        write_beside_weights(folder, written, processor, plan, known)
        check_reload(model, processor, folder)
        if also is not None:
            also(folder)
        mark_checkpoint(folder)


def write_beside_weights(
    folder: Path, model: PreTrainedModel, processor: Any, plan: Plan | None, facts: CardFacts
) -> None:
    """What a checkpoint folder holds beside weights, configuration and code.

    Raises:
        ReloadError: If a tokenizer that lost tokens reads back as another one.
    """
    if processor is not None:
        write_processor(processor, folder)
        if plan is not None and plan.tokens is not None:
            _check_tokenizer(folder, model, processor, len(plan.tokens))
    if plan is not None:
        plan.save(folder / PLAN_FILE)
    write_card(folder, model, plan, facts)


def _check_tokenizer(folder: Path, model: PreTrainedModel, processor: Any, count: int) -> None:
    again = tokenizer_of(load_processor(str(folder), model.config))
    ours = tokenizer_of(processor)
    if again.get_vocab() != ours.get_vocab() or len(again) != count:
        raise ReloadError(f"{str(folder)!r}: the tokenizer reads back with other tokens")
    for text in (_PROBE, chat.render(processor, probe_messages(processor))):
        told = [words.decode(words(text)["input_ids"]) for words in (again, ours)]
        if told[0] != told[1]:
            raise ReloadError(f"{str(folder)!r}: the tokenizer that reads back changes texts")


@torch.no_grad()
def check_reload(model: PreTrainedModel, processor: Any, folder: str | Path) -> None:
    """Load a written folder with the plain Auto class and compare it with the live model.

    The logits of the last positions are compared: in them is everything that stands before. The
    only code that the folder may hold, and that runs here, is slimvlm's own.

    Raises:
        ReloadError: If keys are missing or left over, or logits differ by more than rounding.
    """
    batch = {k: v.to(model.device) for k, v in probe(model, processor).items()}
    with evaluating(model):
        expected = _last_logits(model, batch)
    try:
        config = AutoConfig.from_pretrained(folder)
        place = {"device_map": {"": str(model.device)}} if is_quantized(config) else {}
        again, report = auto_class(config).from_pretrained(
            folder,
            dtype=model.dtype,
            trust_remote_code=_holds_only_our_code(folder, config),
            output_loading_info=True,
            **place,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ReloadError(f"{str(folder)!r} does not load back: {error}") from error
    problems = {name: sorted(map(str, keys)) for name, keys in report.items() if keys}
    if problems:
        raise ReloadError(f"{str(folder)!r} loads with wrong keys: {problems}")
    is_divided = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    if is_divided:  # it fits on no single card
        found = _last_logits(again.eval(), {name: value.cpu() for name, value in batch.items()})
    else:
        found = _logits_beside(model, again.eval(), batch)
    most = 0.1 if is_divided else 1e-3  # kernels of two devices round otherwise
    difference = float((found - expected).abs().max())
    if not difference <= most * max(float(expected.abs().max()), 1.0):
        raise ReloadError(f"{str(folder)!r} loads back to other logits (difference {difference})")


def _logits_beside(
    model: PreTrainedModel, again: PreTrainedModel, batch: dict[str, Tensor]
) -> Tensor:
    """Run a model that was read back where the live one is, which makes room if it has to."""
    place = model.device
    if 1.2 * model.get_memory_footprint() < free_memory(place):
        return _last_logits(again.to(place), batch)  # type: ignore[arg-type]
    model.to("cpu")  # type: ignore[arg-type]
    try:
        return _last_logits(again.to(place), batch)  # type: ignore[arg-type]
    finally:
        again.to("meta")  # type: ignore[arg-type]
        model.to(place)  # type: ignore[arg-type]


def _last_logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """What the model's own forward pass says at the last positions."""
    logits: Tensor = model(**batch, logits_to_keep=CHUNK).logits
    return logits.float().cpu()


def _holds_only_our_code(folder: str | Path, config: PreTrainedConfig) -> bool:
    """Whether a folder is of the uneven format and its Python file is the one of this package."""
    ours = Path(modeling_pruned.__file__)
    copied = Path(folder) / ours.name
    return (
        is_uneven(config)
        and getattr(config, "auto_map", None) == auto_map_of(config)
        and copied.is_file()
        and copied.read_bytes() == ours.read_bytes()
    )


def probe(model: PreTrainedModel, processor: Any) -> dict[str, Tensor]:
    """A small input for comparing two copies of a model: a picture and a question if it sees."""
    if processor is not None and getattr(processor, "chat_template", None) is not None:
        sees = chat.can_see(processor)
        picture = Image.linear_gradient("L").resize((96, 96)).convert("RGB")
        inputs = chat.encode_samples(
            processor, [Sample("probe", probe_messages(processor), (picture,) * sees)]
        )
        inputs.pop("labels")
        return inputs
    generator = torch.Generator().manual_seed(0)
    vocabulary = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    ids = torch.randint(3, max(vocabulary // 2, 4), (1, 16), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def probe_messages(processor: Any) -> tuple[Message, ...]:
    """A question and its answer, with a picture for a processor that takes some."""
    parts = [{"type": "image"}] * chat.can_see(processor)
    return (
        {"role": "user", "content": [*parts, {"type": "text", "text": "What is shown here?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A field of colours."}]},
    )
