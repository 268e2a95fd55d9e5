"""Read and write Hugging Face checkpoint folders. Every written one is read back and compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from slimvlm import chat, modeling_pruned
from slimvlm.cards import CardFacts, write_card
from slimvlm.compat import require_known, rewrite_for_older
from slimvlm.config import Dtype
from slimvlm.configs import (
    auto_class,
    auto_map_of,
    check_widths,
    empty_model,
    is_uneven,
    uneven_class,
)
from slimvlm.errors import ConfigError, ReloadError
from slimvlm.geometry import Anatomy, backbone_of, family_of, read_anatomy
from slimvlm.manifest import write_manifest
from slimvlm.outputs import new_folder
from slimvlm.plan import Plan
from slimvlm.ranks import local_rank
from slimvlm.samples import Sample
from slimvlm.sharding import shard_config
from slimvlm.uneven import padded, set_class_

PLAN_FILE = "slimvlm_plan.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def resolve(model: str | Path) -> str:
    """The folder or hub id that a user's ``MODEL`` means; ``demo`` is built when first used.

    Raises:
        ConfigError: If it is a folder that does not exist or has no ``config.json``.
    """
    if str(model) == "demo":
        from slimvlm.demo.build import build_demo

        return str(build_demo())
    path = Path(model)
    if (path / "checkpoint" / "config.json").is_file():
        return str(path / "checkpoint")  # a run folder
    looks_local = str(model).startswith((".", "/", "~")) or str(model).count("/") != 1
    looks_local = looks_local or path.parent.is_dir()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model {str(model)!r}: the folder has no config.json")
    elif looks_local or path.exists():
        raise ConfigError(f"model {str(model)!r}: no such folder")
    return str(model)


def load_config(model: str | Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read a model's configuration and check that slimvlm knows it; no weights are read.

    Raises:
        ConfigError: If it cannot be found or read.
        UnsupportedModelError: If no family row matches.
    """
    name = resolve(model)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            name, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, HFValidationError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        where = "" if Path(name).is_dir() else "no such folder, and not found on the hub; "
        raise ConfigError(
            f"model {str(model)!r}: {where}config cannot be read ({reason})"
        ) from error
    family_of(config.model_type)
    backbone_of(config)
    check_widths(config)
    return config


def load(
    model: str | Path,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    shard: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Load a model and its processor as native transformers objects.

    Args:
        model: A folder, a hub id, or ``demo``.
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        device: Where to put it; by default this process's GPU, else the CPU.
        trust_remote_code: Whether code that lies in the checkpoint may run. Layers of different
            widths need none here: slimvlm has that code itself and never runs the folder's copy.
        shard: Divide the weights among the processes that ``torchrun`` started (FSDP2); each reads
            its part alone.

    Returns:
        The model in evaluation mode, and its processor (its tokenizer, for a text model).

    Raises:
        ConfigError: If it cannot be found or read.
        UnsupportedModelError: If slimvlm does not know the family.
    """
    if dtype not in get_args(Dtype):
        raise ConfigError(f"dtype {dtype!r} must be one of: {', '.join(get_args(Dtype))}")
    config = load_config(model, trust_remote_code)
    name = resolve(model)
    _require_safetensors(Path(name))
    source: Any = uneven_class(config) if is_uneven(config) else auto_class(config)
    divided = {"distributed_config": shard_config(config)} if shard else {}
    try:
        loaded, report = source.from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **divided,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model {str(model)!r}: weights cannot be read ({reason})") from error
    if report["missing_keys"]:
        first, *rest = sorted(report["missing_keys"])
        raise ConfigError(
            f"model {str(model)!r}: weights lack {first!r}"
            + (f" and {len(rest)} more" * bool(rest))
        )
    set_class_(loaded)
    if not shard:  # shards lie where they belong
        loaded = loaded.to(torch.device(device) if device is not None else default_device())
    return loaded.eval(), load_processor(name, config, trust_remote_code)


def _require_safetensors(folder: Path) -> None:
    """Pickled weights run code when they are read: only ``convert`` does that, and safely."""
    pickled = [file for end in PICKLED for file in folder.glob(f"*{end}")]
    if pickled and not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"model {str(folder)!r}: {min(pickled).name!r} is a pickle, and only safetensors are "
            "read. Use slimvlm convert for checkpoints in an original format"
        )


def default_device() -> torch.device:
    """This process's GPU if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank())


def load_processor(name: str, config: PreTrainedConfig, trust_remote_code: bool = False) -> Any:
    """The processor of a model that sees, the tokenizer of one that does not; None if absent."""
    sees = family_of(config.model_type).vision is not None
    auto = transformers.AutoProcessor if sees else transformers.AutoTokenizer
    try:
        return auto.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def anatomy(model: PreTrainedModel | PreTrainedConfig | str | Path) -> Anatomy:
    """The anatomy of a model, a configuration, or a folder or hub id (its weights stay unread).

    Raises:
        ConfigError: If a folder or id cannot be read.
        UnsupportedModelError: If slimvlm does not know the family.
    """
    if isinstance(model, nn.Module):
        return read_anatomy(model)
    config = model if isinstance(model, PreTrainedConfig) else load_config(model)
    family_of(config.model_type)
    backbone_of(config)
    check_widths(config)
    return read_anatomy(empty_model(config))


def save(
    model: PreTrainedModel,
    processor: Any,
    out: str | Path,
    plan: Plan | None = None,
    force: bool = False,
    pad: bool = False,
    also: Callable[[Path], None] | None = None,
    facts: CardFacts | None = None,
    compat: bool = False,
) -> None:
    """Write a checkpoint that plain ``from_pretrained`` loads, and prove it.

    If the layers have different widths, ``from_pretrained`` needs ``trust_remote_code=True``: the
    folder then holds ``modeling_pruned.py``, which cuts the native class to these widths. Or they
    are padded.

    The folder is written beside its place and read back; logits on a probe (with a picture, if
    the model sees) must agree before it is renamed. ``slimvlm_manifest.json`` lists its files, for
    `slimvlm.manifest.verify`.

    Args:
        model: The model.
        processor: Its processor or tokenizer; None writes none.
        out: The new folder.
        plan: The plan that made the model; stored as ``slimvlm_plan.json``.
        force: Whether an existing folder may be replaced.
        pad: Whether layers of different widths are filled up with zeros to the widest, which
            loads everywhere without code but is as large and slow as the widest layer.
        also: Writes what else belongs into the folder.
        facts: What the model card, ``README.md``, says beside what was removed; by default the
            original is what the model was loaded from.
        compat: Whether transformers 4.57 and 5.0 must read the files, too; see `slimvlm.compat`.

    Raises:
        ConfigError: If the folder exists, or ``compat`` is not known to work for this model.
        OutputError: If another run writes there, or the disk is full or read-only.
        ReloadError: If what was written does not load back to the same model.
    """
    set_class_(model)
    written = padded(model) if pad and is_uneven(model.config) else model
    if compat:
        require_known(written.config)
    with new_folder(out, force) as folder:
        written.save_pretrained(folder)
        if compat:
            rewrite_for_older(folder)
        known = facts or CardFacts(base=model.config._name_or_path, name=Path(out).name)
        write_beside_weights(folder, written, processor, plan, known)
        check_reload(model, processor, folder)
        if also is not None:
            also(folder)
        write_manifest(folder)


def write_beside_weights(
    folder: Path, model: PreTrainedModel, processor: Any, plan: Plan | None, facts: CardFacts
) -> None:
    """What a checkpoint folder holds beside weights, configuration and code."""
    if processor is not None:
        processor.save_pretrained(folder)
    if plan is not None:
        plan.save(folder / PLAN_FILE)
    write_card(folder, model, plan, facts)


def require_writable(shape: Anatomy) -> None:
    """Check that a plain configuration can write a shape down.

    Raises:
        ConfigError: If the layers have different widths.
    """
    if not shape.is_uniform:
        raise ConfigError(
            "plan: layers of different widths cannot be written as a plain checkpoint. Plan "
            "without protect, or with axis 'depth'"
        )


@torch.no_grad()
def check_reload(model: PreTrainedModel, processor: Any, folder: str | Path) -> None:
    """Load a written folder with the plain Auto class and compare it with the live model.

    The only code that it may hold, and that runs here, is slimvlm's own.

    Raises:
        ReloadError: If keys are missing or left over, or logits differ by more than rounding.
    """
    was_training = model.training
    model.eval()
    batch = {k: v.to(model.device) for k, v in probe(model, processor).items()}
    expected = model(**batch).logits.float().cpu()
    try:
        config = AutoConfig.from_pretrained(folder)
        again, report = auto_class(config).from_pretrained(
            folder,
            dtype=model.dtype,
            trust_remote_code=_holds_only_our_code(folder, config),
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ReloadError(f"{str(folder)!r} does not load back: {error}") from error
    problems = {name: sorted(map(str, keys)) for name, keys in report.items() if keys}
    if problems:
        raise ReloadError(f"{str(folder)!r} loads with wrong keys: {problems}")
    again.eval().to(model.device)
    found = again(**batch).logits.float().cpu()
    model.train(was_training)
    difference = float((found - expected).abs().max())
    if not difference <= 1e-3 * max(float(expected.abs().max()), 1.0):
        raise ReloadError(f"{str(folder)!r} loads back to other logits (difference {difference})")


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
        parts = [{"type": "image"}] * sees + [{"type": "text", "text": "What is shown here?"}]
        messages = (
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": "A field of colours."}]},
        )
        picture = Image.linear_gradient("L").resize((96, 96)).convert("RGB")
        inputs = chat.encode_samples(processor, [Sample("probe", messages, (picture,) * sees)])
        inputs.pop("labels")
        return inputs
    generator = torch.Generator().manual_seed(0)
    vocabulary = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    ids = torch.randint(3, max(vocabulary // 2, 4), (1, 16), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
