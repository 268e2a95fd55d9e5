"""Write Hugging Face checkpoint folders, from memory or from files, and read each one back."""

import random
import re
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from slimvlm.core.documents import parse_yaml, read_text
from slimvlm.core.errors import ConfigError, ReloadError, SlimError, raised_as
from slimvlm.core.files import mark_checkpoint, new_folder, require_free, write_text
from slimvlm.core.tables import read_table
from slimvlm.data import chat
from slimvlm.data.samples import Message, Sample
from slimvlm.models import load as models
from slimvlm.models import modeling_pruned
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.devices import free_memory
from slimvlm.models.files import file_if_reachable, split_revision
from slimvlm.models.hidden import evaluating
from slimvlm.models.losses import CHUNK
from slimvlm.models.parts import Parts, context_of, text_config_of
from slimvlm.models.pictures import PictureBudget, llama_cpp_option
from slimvlm.models.serving import check as check_serving
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import MULTI_TOKEN_FIELDS, prune_, reader_of
from slimvlm.pruning.layout import Reader, layout_of, write_model
from slimvlm.pruning.tokens import trimmed_processor
from slimvlm.pruning.walk.result import Weights
from slimvlm.scoring.criteria import CRITERIA
from slimvlm.scoring.layerwise import open_checkpoint

CARD_FILE = "README.md"
PLAN_FILE = "slimvlm_plan.json"
FIRST_PLAN_FILE = "slimvlm_first_plan.json"  # of the original, where a later plan pruned further
PROBE_TEXT = " Plain words, žluťoučký kůň,\n\t日本語, ελληνικά, 🙂 and  1234567890"
_MOST = 2**14  # tokens of a probe: an image of 96 x 96 has a few thousand at most
_COMPARED = 24  # tensors that are compared bit by bit when a folder is read back
_CARDS = read_table(__file__, "cards.yaml")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Facts for a model card that the checkpoint itself does not hold."""

    base: str  # the model that this one was made from: a hub id or a folder
    name: str
    command: str = ""
    share: Mapping[str, float | None] | None = None  # AVG-%: percent, low, high
    kinds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # the same of each kind
    held_out: str = ""  # a Markdown table of results on test samples
    results: str = ""  # a Markdown table
    scores: Mapping[str, tuple[str, float]] = field(default_factory=dict)  # metric, percent
    training: tuple[str, str, int] | None = None  # trained parts, loss, number of samples
    data: str | None = None  # as the user named it; only a hub id is written
    format: tuple[str, ...] = ()  # type of rounded weights, and the library that reads them
    files: tuple[str, ...] = ()  # GGUF files: the language model, and the vision tower if written
    is_text_of: str = ""  # type of the whole model, where only its language model is written
    pictures: PictureBudget | None = None  # if images take fewer tokens than the base's
    copied: bool = False  # whether weights and configuration are the base's files


def save(
    model: PreTrainedModel,
    processor: Any,
    out: str | Path,
    plan: Plan | None = None,
    force: bool = False,
    also: Callable[[Path], None] | None = None,
    facts: CardFacts | None = None,
) -> None:
    """Write a checkpoint that plain ``from_pretrained`` loads, and check that it does.

    If the layers have different widths, ``from_pretrained`` needs ``trust_remote_code=True``: the
    folder then holds ``modeling_pruned.py``, which cuts the native class to these widths. Where a
    layout is known that older transformers and engines read, the files have it (`pruning.layout`).

    The folder is written under a temporary name and read back; logits on a probe (with an image for
    a VLM) must agree before it is renamed to ``out``. With ``force`` it replaces an existing one.

    The ``plan`` that pruned the model is stored as ``slimvlm_plan.json``; if it removed tokens, a
    copy of the ``processor`` without them is written. ``also`` may write further files into the
    folder. ``facts`` are for the model card; by default the original is the model's own source.

    Raises:
        ConfigError: If the folder exists.
        OutputError: If another run writes there, or the disk is full or read-only.
        ReloadError: If the folder does not load back to the same model.
    """
    models.set_class_(model)
    processor = trimmed_processor(processor, plan)

    def check(folder: Path) -> CardFacts:
        check_reload(model, processor, folder)
        if also is not None:
            also(folder)
        return facts or CardFacts(base=model.config._name_or_path, name=Path(out).name)

    write_folder(out, model, processor, plan, check, force=force)


def prune_checkpoint(
    model: str | Path,
    plan: Plan,
    out: str | Path,
    dtype: str = "auto",
    force: bool = False,
    allow_uneven: bool = False,
    trust_remote_code: bool = False,
    weights: Weights = MappingProxyType({}),
    tower_weights: Weights = MappingProxyType({}),
    describe: Callable[[Path], CardFacts] | None = None,
) -> None:
    """`slimvlm.prune_` and `slimvlm.save` for a checkpoint that does not fit in memory.

    Tensors are cut out of the original's safetensors files one by one; one weight file of the new
    checkpoint (1 GB) is in memory at a time. The folder is read back before it gets its name: every
    name and shape is compared with the configuration, some tensors bit by bit.

    ``model`` is a folder, a hub id or ``demo``; ``dtype`` is the data type to write (``auto``: as
    stored). With ``trust_remote_code``, code in the checkpoint runs. ``weights`` are parameters
    that are no slices of the original's, such as a walk's, ``tower_weights`` those of the vision
    tower; ``describe`` gets the written folder and
    returns facts for the model card. All else is as for `slimvlm.prune_` and `slimvlm.save`.

    Raises:
        SlimError: As `slimvlm.prune_` and `slimvlm.save` do, or if files cannot be read.
        NumericalError: If a weight is NaN or infinite, or becomes so in the data type.
    """
    require_free(out, force)
    checkpoint = open_checkpoint(model, dtype, trust_remote_code)
    config = checkpoint.model.config
    processor = models.load_processor(str(checkpoint.folder), config, trust_remote_code)
    processor = trimmed_processor(processor, plan)
    smaller = models.empty_model(config, checkpoint.model.dtype)
    smaller._weight_conversions = checkpoint.model._weight_conversions
    if (generation := models.generation_of(checkpoint.folder)) is not None:
        smaller.generation_config = generation
    prune_(smaller, plan, allow_uneven)
    read = reader_of(checkpoint, plan, weights, tower_weights)

    def check(folder: Path) -> CardFacts:
        """Read all names and shapes back, and the bits of some tensors."""
        again = open_checkpoint(folder, dtype)
        if unused := again.unused[:3]:
            raise ReloadError(f"{str(folder)!r} holds weights that nothing reads: {unused}")
        found = read_anatomy(again.model)
        after = plan.after
        ours = after.layers, after.backbone_params, after.tower or found.tower
        if (found.layers, found.backbone_params, found.tower) != ours:
            raise ReloadError(f"{str(folder)!r} has other shapes than the plan")
        names = list(smaller.state_dict())
        for name in random.Random(0).sample(names, min(_COMPARED, len(names))):
            if not torch.equal(again.read(name), read(name)):
                raise ReloadError(f"{str(folder)!r}: {name!r} reads back differently")
        facts = CardFacts(base=config._name_or_path, name=Path(out).name)
        return facts if describe is None else describe(folder)

    write_folder(out, smaller, processor, plan, check, read, force)


def write_folder(
    out: str | Path,
    model: PreTrainedModel,
    processor: Any,
    plan: Plan | None,
    check: Callable[[Path], CardFacts],
    read: Reader | None = None,
    force: bool = False,
) -> None:
    """Write a checkpoint folder, which gets its name after ``check`` has read it back."""
    with new_folder(out, force) as folder:
        where = repr(str(folder))
        write_model(folder, model, processor, read)
        if plan is not None:
            plan.save(folder / PLAN_FILE)
            if processor is not None and plan.tokens is not None:
                again = chat.tokenizer_of(models.load_processor(str(folder), model.config))
                ours, count = chat.tokenizer_of(processor), len(plan.tokens)
                if again.get_vocab() != ours.get_vocab() or len(again) != count:
                    raise ReloadError(f"{where}: the tokenizer reads back with other tokens")
                texts = [PROBE_TEXT]
                with suppress(SlimError):
                    texts.append(chat.render(processor, probe_messages(processor)))
                for text in texts:
                    found, known = (t.decode(t(text)["input_ids"]) for t in (again, ours))
                    if found != known:
                        raise ReloadError(f"{where}: the tokenizer that reads back changes texts")
        write_card(folder, model, plan, check(folder), processor)
        mark_checkpoint(folder)


@torch.no_grad()
def check_reload(model: PreTrainedModel, processor: Any, folder: str | Path) -> None:
    """Load a written folder with the plain Auto class; compare its logits with the live model's."""
    batch = {k: v.to(model.device) for k, v in probe(model, processor).items()}
    with evaluating(model):
        expected = last_logits(model, batch)
    again: Any = read_back(folder, model)
    is_divided = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    live: Any = model
    device = live.device
    if is_divided:  # it fits on no single card
        found = last_logits(again, {name: value.cpu() for name, value in batch.items()})
    elif 1.2 * model.get_memory_footprint() < free_memory(device):
        found = last_logits(again.to(device), batch)
    else:  # the live one leaves the device for a while
        live.to("cpu")
        try:
            found = last_logits(again.to(device), batch)
        finally:
            again.to("meta")
            live.to(device)
    # kernels of two devices round otherwise
    require_same_logits(folder, found, expected, 0.1 if is_divided else 1e-3)


def read_back(folder: str | Path, model: PreTrainedModel) -> PreTrainedModel:
    """Load a written folder with the plain Auto class; refuse missing and unexpected keys."""
    kinds = (OSError, RuntimeError, ValueError, SafetensorError)
    with raised_as(ReloadError, kinds, f"{str(folder)!r} does not load back:"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        place = {"device_map": {"": str(model.device)}} if models.is_quantized(config) else {}
        code = Path(modeling_pruned.__file__)
        copied = Path(folder) / code.name
        # the only code that may be in the folder, and that runs here, is slimvlm's own
        named = getattr(config, "auto_map", None)
        is_ours = models.is_uneven(config) and named == models.auto_map_of(config)
        is_ours = is_ours and copied.is_file() and copied.read_bytes() == code.read_bytes()
        again, report = models.auto_class(config).from_pretrained(
            folder, dtype=model.dtype, trust_remote_code=is_ours, output_loading_info=True, **place
        )
    problems = {name: sorted(map(str, keys)) for name, keys in report.items() if keys}
    if problems:
        raise ReloadError(f"{str(folder)!r} loads with wrong keys: {problems}")
    loaded: PreTrainedModel = again.eval()
    return loaded


def require_same_logits(
    folder: str | Path, found: Tensor, expected: Tensor, most: float = 1e-3
) -> None:
    """Refuse logits that differ by more than a share of the largest one."""
    difference = float((found - expected).abs().max())
    if not difference <= most * max(float(expected.abs().max()), 1.0):
        raise ReloadError(f"{str(folder)!r} loads back to other logits (difference {difference})")


def last_logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Run the model's own forward pass; return logits of the last positions."""
    logits: Tensor = model(**batch, logits_to_keep=CHUNK).logits
    return logits.float().cpu()


def probe(model: PreTrainedModel, processor: Any) -> dict[str, Tensor]:
    """Make a short chat to compare two copies, or random tokens if its template cannot write it."""
    if processor is not None and getattr(processor, "chat_template", None) is not None:
        sees = chat.can_see(processor)
        picture = Image.linear_gradient("L").resize((96, 96)).convert("RGB")
        sample = Sample("probe", probe_messages(processor), (picture,) * sees)
        with suppress(SlimError):
            inputs = chat.encode_samples(processor, [sample])
            inputs.pop("labels")
            if inputs["input_ids"].shape[1] <= min(context_of(model.config) or _MOST, _MOST):
                return inputs
    generator = torch.Generator().manual_seed(0)
    vocabulary = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    ids = torch.randint(3, max(vocabulary // 2, 4), (1, 16), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def probe_messages(processor: Any) -> tuple[Message, ...]:
    """Make a question and its answer, with an image if the processor takes some."""
    parts = [{"type": "image"}] * chat.can_see(processor)
    return (
        {"role": "user", "content": [*parts, {"type": "text", "text": "What is shown here?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A field of colours."}]},
    )


def plan_of(model: str | Path) -> Plan | None:
    """Read the plan that pruned a model from its folder; None if there is none."""
    path = Path(models.resolve(model)) / PLAN_FILE
    return Plan.load(path) if path.is_file() else None


def write_card(
    folder: Path, model: PreTrainedModel, plan: Plan | None, facts: CardFacts, processor: Any = None
) -> None:
    """Write a model's card; original, license and data are inherited from its base's card."""
    config, shape, handed_on = model.config, read_anatomy(model), base_card(facts.base)
    copy_licenses(facts.base, folder)
    first = _first_plan(facts.base, plan, folder)
    data = handed_on.pop("datasets", [])
    if "slimvlm" not in handed_on.pop("tags", ()):
        data = []  # those of the original's own training
    if facts.data is not None and "/" in facts.data and is_hub_id(facts.data):
        data = [*dict.fromkeys([*data, facts.data])]
    if is_hub_id(facts.base):
        handed_on["base_model"] = split_revision(facts.base)[0]
    if "base_model" in handed_on:
        handed_on["base_model_relation"] = "quantized" if facts.format else "finetune"
    is_smaller = bool(plan or facts.format or facts.pictures or facts.is_text_of)
    is_rounded = (bool(facts.format) or models.is_quantized(config)) and not facts.files
    sees = Parts(model).family.vision is not None and len(facts.files) != 1
    task = "image-text-to-text" if sees else "text-generation"
    tags = ["slimvlm", *["pruned"] * (plan is not None), *["compressed"] * is_smaller]
    tags += [config.model_type, *["text-only"] * bool(facts.is_text_of)]
    results = [  # name and type of the data are the same
        EvalResult(task, name, name, metric, round(value, 2))
        for name, (metric, value) in facts.scores.items()
    ]
    words = [  # a card may be published: paths are shortened to their last part
        ",".join(w if is_hub_id(w) else Path(w).name or w for w in word.split(","))
        for word in shlex.split(facts.command)
    ]
    card = ModelCard.from_template(
        ModelCardData(
            **handed_on,
            datasets=data or None,
            library_name="gguf" if facts.files else "transformers",
            pipeline_tag=task,
            tags=[*tags, *facts.format, *["gguf"] * bool(facts.files)],
            model_name=facts.name if facts.scores else None,
            eval_results=results or None,
        ),
        template_path=str(Path(__file__).with_name("model_card.md.jinja")),
        facts=facts,
        base=Path(facts.base).name,
        command=shlex.join(words),
        shape=shape,
        plan=plan,
        first=first,
        is_smaller=is_smaller,
        criteria=CRITERIA,
        found=check_serving(shape, ("vllm", "sglang", "gguf"), is_rounded),
        llama_cpp_option=llama_cpp_option(processor, config),
        auto_class=models.auto_class(config).__name__,
        needs_code=models.is_uneven(config),
        layout=None if facts.format else layout_of(config),
        heads=[n for n in MULTI_TOKEN_FIELDS if plan and hasattr(text_config_of(config), n)],
        transformers=transformers.__version__,
    )
    write_text(folder / CARD_FILE, re.sub(r"\n{3,}", "\n\n", card.content).strip() + "\n")


def copy_licenses(base: str, folder: Path) -> None:
    """Copy the license and notices of a model into a folder made from it, as most require."""
    for name in _CARDS["licenses"] if base and (is_hub_id(base) or Path(base).is_dir()) else ():
        with suppress(ConfigError, OSError):  # the hub may be out of reach
            path, target = Path(file_if_reachable(base, name) or ""), folder / name
            leads_out = Path(base).is_dir() and path.resolve().parent != Path(base).resolve()
            if path.is_file() and not leads_out and not target.exists():
                write_text(target, read_text(path, "license", 2**22))


def _first_plan(base: str, plan: Plan | None, folder: Path) -> Plan | None:
    """Return the plan whose ``before`` is the original; store it if an earlier run pruned."""
    for name in (FIRST_PLAN_FILE, PLAN_FILE) if base else ():
        with suppress(SlimError):  # an unreadable one must not end finished work
            if (path := Path(base) / name).is_file() and (earlier := Plan.load(path)) != plan:
                earlier.save(folder / FIRST_PLAN_FILE)
                return earlier
    return plan


def base_card(model: str) -> dict[str, Any]:
    """Read what a model's card passes on; empty if there is none or it cannot be reached."""
    is_some = bool(model) and (is_hub_id(model) or Path(model).is_dir())
    try:
        if not is_some or (path := file_if_reachable(model, CARD_FILE)) is None:
            return {}
        head = read_text(path, "card", 2**22).lstrip("\ufeff \n").split("\n---", 1)[0]
        values = parse_yaml(head.removeprefix("---")) if head.startswith("---") else {}
    except (ConfigError, ValueError, OSError):
        return {}
    found: dict[str, Any] = {}
    for name, pattern in _CARDS["inherited"].items() if isinstance(values, dict) else ():
        value = values.get(name)  # a short text, or a list of some
        texts = value if isinstance(value, list) and 0 < len(value) < 100 else [value]
        if all(isinstance(t, str) and re.fullmatch(pattern, t, re.ASCII) for t in texts):
            found[name] = texts if name in ("datasets", "tags") else value
    return found


def is_hub_id(name: str) -> bool:
    """Whether a name is that of a model or a data set on the hub, and not a path here."""
    pattern, repository = _CARDS["inherited"]["base_model"], split_revision(name)[0]
    return bool(re.fullmatch(pattern, repository, re.ASCII)) and not Path(name).exists()
