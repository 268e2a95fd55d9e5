"""Check a checkpoint's files before they are used, find weights in them, and write them.

`check_folder` comes before any reading. A folder it accepts may still fail in transformers;
`unreadable` then raises in one line. `origins_in_files` and `write_weights` depend on the insides
of transformers; each names the version that it was tried with.
"""

import copy
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub import errors as hub
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, dynamic_module_utils
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)
from transformers.utils import hub as hub_files
from transformers.utils.hub import cached_file

from slimvlm.core import errors
from slimvlm.core.documents import read_object, read_text
from slimvlm.core.errors import ConfigError, shortened
from slimvlm.core.tables import read_table
from slimvlm.models.hidden import require_finite_values

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
ADAPTER, LORA_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TEMPLATE = "chat_template.jinja"
TABLES: dict[str, Any] = read_table(__file__, "files.yaml")
"""What files may say, which of them are read, and what errors of the hub mean."""
SETTINGS: list[str] = TABLES["settings"]
_HUB_ID = r"\w[\w.-]*/[\w.-]+"
_ONLY = ["tokenizer.json"]  # the tokenizer that is checked before it is read, and thus no other
_MOST_SETTINGS, _MOST_TEMPLATE = 64 * 2**20, 2**20  # bytes of settings, and of a chat template


@contextmanager
def unreadable(model: str | Path, what: str) -> Iterator[None]:
    """Raise a one-line `ConfigError` where a library inside cannot read ``what`` of a model."""
    try:
        with errors.panics_raised():
            yield
    except errors.SlimError:
        raise
    except Exception as error:  # broken files make libraries raise almost anything
        if errors.is_out_of_memory(error):
            raise
        message = f"{what} cannot be read ({errors.one_line(error)[: errors.LONGEST]})"
        cause: BaseException | None = None if Path(model).is_dir() else error
        while cause is not None:  # transformers wraps what the hub's library raises
            cures = TABLES["hub_errors"].items()
            message = next(
                (c for kind, c in cures if isinstance(cause, getattr(hub, kind))), message
            )
            cause = cause.__cause__ or cause.__context__
        raise ConfigError(f"model {str(model)!r}: {message}") from error


@contextmanager
def alone(model: str | Path, trust_remote_code: bool = False) -> Iterator[None]:
    """Let transformers read no other model, ask nothing and load no kernels inside."""
    # relies on: ``cached_files`` finds all files, and ``_get_config_dict`` reads all configurations
    place, plain = split_revision(model)[0], vars(PreTrainedConfig)["_get_config_dict"].__func__
    search = hub_files.cached_files

    def found(path_or_repo_id: str | Path, *given: Any, **named: Any) -> Any:
        if str(path_or_repo_id) != place and not trust_remote_code:
            message = f"names another, {shortened(str(path_or_repo_id))}, which is not read"
            raise ConfigError(f"model {str(model)!r}: {message}")
        return search(path_or_repo_id, *given, **named)

    def described(kind: Any, *given: Any, **named: Any) -> tuple[Any, Any]:
        values, rest = plain(kind, *given, **named)
        return _without_kernels(values), rest

    with ExitStack() as stack:
        for owner, name, value in (
            (hub_files, "cached_files", found),
            (PreTrainedConfig, "_get_config_dict", classmethod(described)),
            (dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 0),  # seconds to wait for an answer
        ):
            stack.callback(setattr, owner, name, vars(owner)[name])
            setattr(owner, name, value)
        yield


def _without_kernels(values: Any) -> Any:
    if isinstance(values, dict):
        kept = {k: v for k, v in values.items() if not re.fullmatch(TABLES["unread"], k)}
        return {key: _without_kernels(value) for key, value in kept.items()}
    return [*map(_without_kernels, values)] if isinstance(values, list) else values


def split_revision(model: str | Path) -> tuple[str, dict[str, Any]]:
    """Split ``OWNER/NAME@REVISION`` into a hub id and arguments; a folder keeps its name."""
    name, sign, revision = str(model).partition("@")
    if not sign or not re.fullmatch(_HUB_ID, name) or Path(model).exists():
        return str(model), {}
    if ".." in revision or not re.fullmatch(r"\w[\w./-]{0,199}", revision, re.ASCII):
        raise ConfigError(f"model {name!r}: revision {shortened(revision)} cannot be one")
    return name, {"revision": revision}


def check_folder(model: str | Path, trusts: bool = False) -> None:
    """Refuse a model with unsafe files or absurd numbers. No weight is read.

    Refused are links out of the folder (but to the hub's cache), an index that names anything but
    safetensors files in it, adapters, and malformed files. Of a hub id the small files are read.
    """
    small = (CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, *SETTINGS)
    folder = Path(model)
    if not folder.is_dir():
        found = [file_if_reachable(str(model), name) for name in (*small, ADAPTER)]
        if (first := found[0] or found[-1]) is None:
            return
        folder = Path(first).parent
    where = f"model {str(model)!r}"
    _require_no_links(folder, where)
    if (folder / ADAPTER).exists():
        raise ConfigError(f"{where}: {ADAPTER} makes it an adapter; give the folder of hf download")
    for name in (CONFIG_NAME, GENERATION_CONFIG_NAME, *SETTINGS):
        if (folder / name).exists() or name == CONFIG_NAME:
            values = read_object(folder / name, "model", _MOST_SETTINGS)
            _require_plausible(values, f"{where}: {name}:", trusts=trusts)
            if values.get("fast_tokenizer_files", _ONLY) != _ONLY:
                raise ConfigError(f"{where}: {name}: fast_tokenizer_files must be {_ONLY}")
    if (folder / TEMPLATE).exists():
        read_text(folder / TEMPLATE, "model", _MOST_TEMPLATE)
    if (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        weight_files(folder)


def _require_no_links(folder: Path, where: str) -> None:
    """Refuse links that lead out of a folder, but to the hub's cache, and what is no file."""
    allowed = [folder.resolve()]
    if allowed[0].parent.name == "snapshots":  # of the hub's cache
        allowed.append(allowed[0].parent.parent / "blobs")
    for path in folder.rglob("*"):
        with unreadable(folder, path.name):  # a link to itself
            target = path.resolve()
        if path.is_symlink() and not any(map(target.is_relative_to, allowed)):
            raise ConfigError(f"{where}: {path.name!r} is a link that leads out of the folder")
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ConfigError(f"{where}: {path.name!r} is neither a file nor a folder")


def read_adapter(folder: Path) -> tuple[str, dict[str, Any]]:
    """Check a folder that PEFT wrote; return the id or folder of its base, and its settings.

    Refused by name is all that could change more than ``W + scale * B @ A`` says.
    """
    where = f"model {str(folder)!r}"
    _require_no_links(folder, where)
    values = read_object(folder / ADAPTER, "model", 2**20)
    names = ("init_lora_weights", "base_model_name_or_path", "revision")
    start, base, revision = map(values.get, names)
    odd = [name for name, value in values.items() if value and name not in TABLES["lora"]]
    odd += [] if values.get("peft_type") == "LORA" else ["peft_type"]
    odd += [] if start in TABLES["keeps_base"] else ["init_lora_weights"]
    if odd:
        value = shortened(values.get(odd[0]))
        raise ConfigError(f"{where}: {ADAPTER}: {odd[0]} {value} is not merged here; use PEFT")
    weights = {f.name for f in folder.iterdir() if f.suffix in (".bin", ".safetensors")}
    if others := weights - {*TABLES["beside_adapter"]}:
        raise ConfigError(f"{where}: next to {ADAPTER} lies {min(others)!r}, which is not merged")
    if isinstance(base, str) and Path(base).is_dir() and not (Path(base) / ADAPTER).exists():
        return base, values
    if not isinstance(base, str) or not re.fullmatch(_HUB_ID, base) or Path(base).exists():
        message = (
            f"base_model_name_or_path {shortened(base)} must be a model's folder here or hub id"
        )
        raise ConfigError(f"{where}: {ADAPTER}: {message}")
    return f"{base}@{revision}" if revision else base, values


def write_merged(
    adapter: Path, values: Mapping[str, Any], source: Path, skeleton: Any, folder: Path
) -> None:
    """Write the weights of a base model with an adapter's in them, one file at a time."""
    files, changes = weight_files(source), dict[str, tuple[Tensor, ...]]()
    with unreadable(adapter, LORA_WEIGHTS):
        for name, tensor in load_file(adapter / LORA_WEIGHTS).items():
            changes[name.removeprefix("base_model.model.")] = (tensor,)
        for module in [n.removesuffix(".lora_A.weight") for n in changes if ".lora_A." in n]:
            (a,), (b,) = (changes.pop(f"{module}.lora_{side}.weight") for side in "AB")
            scale = values["lora_alpha"] / len(a) ** (0.5 if values.get("use_rslora") else 1)
            changes[f"{module}.weight"] = (scale * b.float(), a.float())
        theirs, ours = origins_in_files(skeleton, files), origins_in_files(skeleton, changes)
        users = Counter(origin.keys for origin in theirs.values())
        if unknown := changes.keys() - {key for each in ours.values() for key in each.keys}:
            raise ValueError(f"{min(unknown)!r} is for no weight of the base")
        by_key: dict[str, tuple[Tensor, ...]] = {}
        for name, origin in ours.items():
            keys, convert = theirs[name]
            if users[keys] > 1 or not isinstance(convert, itemgetter):
                raise ValueError(f"the base ties or stacks {name!r}")
            by_key[keys[0]] = changes[origin.keys[0]]
    for path in dict.fromkeys(files.values()):
        tensors = load_file(path)
        for key in tensors.keys() & by_key.keys():
            old, change = tensors[key], by_key[key]
            with unreadable(adapter, LORA_WEIGHTS):
                shape = reduce(torch.matmul, (each.to("meta") for each in change)).shape
                if shape != old.shape or (len(change) > 1 and old.dim() != 2):
                    raise ValueError(f"{key!r} becomes {list(shape)}, not {list(old.shape)}")
            made = reduce(torch.matmul, change)
            tensors[key] = (made if len(change) == 1 else old.float() + made).to(old.dtype)
            require_finite_values(tensors[key], f"weight {key!r}")
        save_file(tensors, folder / path.name, {"format": "pt"})


def weight_files(folder: Path) -> dict[str, Path]:
    """Find the file of each tensor of a checked folder, by its name in the files."""
    where, index = f"model {str(folder)!r}", folder / SAFE_WEIGHTS_INDEX_NAME
    single = folder / SAFE_WEIGHTS_NAME
    if single.exists() or not index.exists():
        pickled = [file.name for file in folder.iterdir() if file.suffix in _PICKLED]
        if pickled and not single.exists():
            raise ConfigError(
                f"{where}: {min(pickled)!r} is a pickle, and only safetensors are read. Use "
                "slimvlm convert for checkpoints in an original format"
            )
        with unreadable(folder, "weights"), safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    rows = read_object(index, "model", _MOST_SETTINGS).get("weight_map")
    if not isinstance(rows, dict) or not rows:
        raise ConfigError(f"{where}: {index.name}: weight_map must map weights to files")
    for file in {str(name): name for name in rows.values()}.values():
        is_name = isinstance(file, str) and Path(file).name == file and "\\" not in file
        if not is_name or not file.endswith(".safetensors"):
            raise ConfigError(
                f"{where}: {index.name}: weight_map names {shortened(file)}, but weights must be "
                "safetensors files in the folder itself"
            )
        if not (folder / file).is_file():
            raise ConfigError(f"{where}: weights cannot be read ({file!r} is missing)")
    return {key: folder / file for key, file in rows.items()}


def _require_plausible(values: Any, where: str, name: str = "", trusts: bool = False) -> None:
    """Check every number and every name of code, at any depth; trusted code has any name."""
    if isinstance(values, dict):
        is_timm = name == "model_args"
        odd = values.keys() - TABLES["timm"] if is_timm else values.keys() & TABLES["never"]
        if odd:
            raise ConfigError(f"{where} {shortened(min(odd))} names what is not read; remove it")
        longest = values.get("longest_edge")
        are_areas = isinstance(longest, int) and longest > 2**12  # of Qwen's processors
        for key, value in values.items():
            _require_plausible(value, where, key + " area" * (are_areas and "_edge" in key), trusts)
    elif isinstance(values, list):
        for value in values:
            _require_plausible(value, where, name, trusts)
    elif isinstance(values, int | float) and not isinstance(values, bool):
        row = next((row for row in TABLES["limits"] if re.fullmatch(row[0], name)), None)
        if row is not None and not row[1] <= values <= row[2]:
            limits = f"{row[1]} to {row[2]:,}"
            raise ConfigError(f"{where} {name} {shortened(values)} must be {limits}")
    elif isinstance(values, str) and (name == "architecture" or not trusts):
        for names, pattern in TABLES["texts"].items():
            if re.fullmatch(names, name) and not re.fullmatch(pattern, values):
                raise ConfigError(f"{where} {name} {shortened(values)} names what is not run here")


class Origin(NamedTuple):
    """Names in a checkpoint's files, and the function that makes a parameter of their tensors."""

    keys: tuple[str, ...]
    convert: Callable[[Sequence[Tensor]], Tensor]


def origins_in_files(model: Any, keys: Iterable[str]) -> dict[str, Origin]:
    """Find every parameter in a checkpoint's files, by its name in the model.

    Relies on: `get_model_conversion_mapping` lists what ``from_pretrained`` renames and computes
    (it stacks experts that lie in files one by one), and ``save_pretrained`` undoes those in
    ``_weight_conversions``, which is set here. Tried with transformers 5.24.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, loading.WeightConverter)]
    if any(len(each.target_patterns) > 1 for each in converters):
        kind = model.config.model_type
        raise errors.UnsupportedModelError(f"model_type {kind!r} cannot be read with low memory")
    state, prefix = model.state_dict(), model.base_model_prefix
    named: dict[str, dict[str, str | None]] = defaultdict(dict)
    for key in sorted(keys, key=loading.dot_natural_key):  # as they are stacked
        target, pattern = loading.rename_source_key(key, renamings, converters, prefix, state)
        named[target][key] = pattern
    found: dict[str, Origin] = {}
    for target, patterns in named.items():
        keys = tuple(patterns)
        used = [each for each in converters if patterns[keys[-1]] in each.source_patterns]
        if target in state and used:
            found[target] = Origin(keys, partial(_converted, model, target, patterns, used[0]))
        elif target in state:
            found[target] = Origin(keys[-1:], itemgetter(0))
    model._weight_conversions = [entry for entry in conversions if entry._was_used]
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        if source in found:
            found.setdefault(target, found[source])
    return found


def _converted(
    model: Any, target: str, patterns: Mapping[str, Any], plain: Any, tensors: Sequence[Tensor]
) -> Tensor:
    converter = copy.deepcopy(plain)
    for (key, pattern), tensor in zip(patterns.items(), tensors, strict=True):
        converter.add_tensor(target, key, str(pattern), tensor)
    (made,) = converter.convert(target, model=model, config=model.config).values()
    return cast(Tensor, made[0] if isinstance(made, list) else made)


def file_if_reachable(model: str, name: str) -> str | None:
    """Find a file of a model's folder, or of a hub id in the cache or on the hub; None without."""
    if (folder := Path(model)).is_dir():
        return str(folder / name) if (folder / name).is_file() else None
    causes = ("gated_repo", "missing_entries", "connection_errors")
    quiet: dict[str, Any] = {f"_raise_exceptions_for_{cause}": False for cause in causes}
    repository, revision = split_revision(model)
    path: str | None = cached_file(repository, name, **quiet, **revision)
    return path


def write_weights(
    model: Any, read: Callable[[str], Tensor], folder: Path, shard_bytes: int
) -> None:
    """Write a model that has no storage; each tensor is read by its name for its file alone.

    Relies on: ``save_pretrained`` takes a model with a device map and a hook of Accelerate for one
    whose weights lie on a disk, asks the hook for them, and holds one file in memory. Tried with
    transformers 5.24.
    """
    model.hf_device_map = {"": "disk"}
    learned = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    model._hf_hook = SimpleNamespace(weights_map=_FiniteWeights(read, learned))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*offloaded modules.*")
        model.save_pretrained(folder, max_shard_size=shard_bytes)


@dataclass(frozen=True)
class _FiniteWeights:
    """Return weights by name; raise on NaN or infinity in a parameter. Buffers may have bounds."""

    read: Callable[[str], Tensor]
    learned: Container[str]

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.read(name)
        if name in self.learned and tensor.is_floating_point():
            require_finite_values(tensor, f"weight {name!r} as {tensor.dtype}")
        return tensor
