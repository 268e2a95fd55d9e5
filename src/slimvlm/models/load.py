"""Read models, processors and configurations from folders and the hub, in their right class."""

import copy
import importlib
import logging
import shutil
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import metadata_load, metadata_save, snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, import_utils

from slimvlm.core.documents import digest, identity_of_files, read_object
from slimvlm.core.errors import ConfigError, UnsupportedModelError, shortened
from slimvlm.core.files import cache_dir, file_name, held, new_folder, path_of
from slimvlm.core.options import LoadConfig
from slimvlm.core.progress import num_ranks, to_log
from slimvlm.data.chat import tokenizer_of
from slimvlm.data.templates import check_tokenizer
from slimvlm.models import modeling_pruned
from slimvlm.models.anatomy import Anatomy, read_anatomy
from slimvlm.models.devices import device_named
from slimvlm.models.families import BACKBONES, FAMILIES
from slimvlm.models.files import (
    ADAPTER,
    LORA_WEIGHTS,
    SETTINGS,
    TABLES,
    TEMPLATE,
    alone,
    check_folder,
    file_if_reachable,
    read_adapter,
    split_revision,
    unreadable,
    weight_files,
    write_merged,
)
from slimvlm.models.modeling_pruned import PREFIX, cut_layers_, standardise_
from slimvlm.models.parts import Parts, backbone_of, family_of, text_config_of

_WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""Fields of the text configuration of which layers may have their own values."""
_PACKED, _SPARE = 16, 2**20
"""Weights that one stored number can hold, quantised, and weights that files may lack."""
_OF_PROCESSORS = {*TABLES["of_processors"]}  # every processor and tokenizer has one of them
# native classes read these of the whole model, on purpose, before layers are cut to their own
logging.getLogger("transformers.integrations.heterogeneity").setLevel(logging.ERROR)


def resolve(model: str | Path) -> str:
    """Find the folder or hub id of a user's ``MODEL``; ``demo`` is built when first used."""
    if str(model) == "demo":
        from slimvlm.demo.build import build_demo

        return str(build_demo())
    path, name = path_of(model, "model"), split_revision(model)[0]
    if (path / "checkpoint" / "config.json").is_file():
        return str(path / "checkpoint")  # a run folder
    if (path / ADAPTER).is_file():
        return _merged(path.absolute(), tuple(f.lstat().st_mtime_ns for f in path.iterdir()))
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    looks_local = looks_local or Path(name).parent.is_dir()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model {str(model)!r}: the folder has no config.json")
    elif looks_local or path.exists():
        raise ConfigError(f"model {str(model)!r}: no such folder")
    return str(model)


@cache
def _merged(adapter: Path, stamp: tuple[int, ...]) -> str:
    """Return a folder in the cache: the base model of an adapter, with the adapter in its weights.

    A tokenizer and settings that lie beside the adapter replace the base's. ``stamp`` tells one
    state of the adapter from another.
    """
    base, values = read_adapter(adapter)
    config = load_config(base)
    require_full_precision(config, "merged with an adapter")
    source, known = folder_of(base), {*SETTINGS, *_OF_PROCESSORS, TEMPLATE, "merges.txt"}
    words = [file for file in sorted(adapter.iterdir()) if file.name in known]
    files = [source, adapter / ADAPTER, adapter / LORA_WEIGHTS, *words]
    made_from = [identity_of_files(path.name, str(path)) for path in files]
    target = cache_dir() / "merged" / f"{file_name(adapter.name)}-{digest([made_from])[:16]}"
    if num_ranks() > 1 and not target.exists():
        raise ConfigError(f"model {str(adapter)!r}: merge it first: slimvlm inspect {adapter}")
    with held(target, wait=600):
        if not target.exists():
            with new_folder(target) as folder:
                write_merged(adapter, values, source, empty_model(config), folder)
                for path in (*source.iterdir(), *words):
                    if path.suffix in (".json", ".jinja", ".model", ".txt", ".md"):
                        shutil.copy(path, folder)
                if not Path(base).is_dir():
                    (card := folder / "README.md").touch()
                    original = {"base_model": split_revision(base)[0]}
                    metadata_save(card, (metadata_load(card) or {}) | original)
    to_log(f"adapter {str(adapter)!r} is merged into its base {base!r}, in {str(target)!r}")
    return str(target)


def folder_of(model: str | Path) -> Path:
    """Return the folder of a model; files of a hub id are downloaded."""
    name = resolve(model)
    if Path(name).is_dir():
        return Path(name)
    repository, revision = split_revision(name)
    with unreadable(model, "files"):
        return Path(snapshot_download(repository, **revision))


def load_config(model: str | Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read a model's configuration and check that slimvlm knows it; no weights are read."""
    name = resolve(model)
    where = "" if Path(name).is_dir() else "no such folder, and not found on the hub; "
    with unreadable(model, f"{where}config"), alone(name, trust_remote_code):
        check_folder(name, trust_remote_code)
        place, how = split_revision(name)
        values = PreTrainedConfig.get_config_dict(place, **how)[0]
        kind = values.get("model_type")
        if kind is not None and kind not in transformers.CONFIG_MAPPING and kind not in FAMILIES:
            raise UnsupportedModelError(
                f"model {str(model)!r}: model_type {shortened(kind)} needs trust_remote_code, and "
                "slimvlm prunes classes of transformers alone. Take a version that loads without "
                "(often named -hf), or try slimvlm convert"
            )
        if isinstance(kind, str):  # parts of unknown types are refused before they are configured
            family = family_of(kind)
            for part, reader in transformers.CONFIG_MAPPING[kind].sub_configs.items():
                named = values.get(part)
                of_part = named.get("model_type") if isinstance(named, dict) else None
                known = BACKBONES if part == family.text_config else family.tower_types
                if reader is AutoConfig and of_part is not None and of_part not in known:
                    raise UnsupportedModelError(
                        f"{part} inside {kind!r}: model_type {shortened(of_part)} is not known. "
                        f"Known: {', '.join(sorted(known))}"
                    )
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            place, trust_remote_code=trust_remote_code, **how
        )
        config._name_or_path = name  # with the revision
        backbone_of(config)
        check_widths_(config)
    return config


def anatomy(model: PreTrainedModel | PreTrainedConfig | str | Path) -> Anatomy:
    """Read the anatomy of a model, a configuration, or a folder or hub id (not its weights).

    Raises:
        ConfigError: If a folder or id cannot be read.
        UnsupportedModelError: If slimvlm does not know the family.
    """
    if isinstance(model, nn.Module):
        return read_anatomy(model)
    config = model if isinstance(model, PreTrainedConfig) else load_config(model)
    backbone_of(config)
    with unreadable(config._name_or_path, "config"):
        check_widths_(config)
        return read_anatomy(empty_model(config))


def load(
    model: str | Path,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    shard: bool = False,
    attn_implementation: str | None = None,
    device_map: str | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Load a model and its processor as native transformers objects.

    Args:
        model: A folder (a LoRA adapter's is merged into its base), a hub id with or without
            ``@REVISION``, or ``demo``.
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        device: Where to put it; by default this process's accelerator, else the CPU.
        trust_remote_code: Whether code that lies in the checkpoint may run. Layers of different
            widths need none here: slimvlm has that code itself and never runs the folder's copy.
        shard: Divide the weights among the processes that ``torchrun`` started (FSDP2).
        attn_implementation: A name that transformers knows, which chooses by default.
        device_map: ``auto``, ``balanced``, ``balanced_low_0`` or ``sequential`` divides the model
            over all GPUs, then the host and a disk.

    Returns:
        The model in evaluation mode, and its processor (its tokenizer, for a text model).

    Raises:
        ConfigError: If it cannot be found or read, or there is no such device.
        UnsupportedModelError: If slimvlm does not know the family.
    """
    requested: Any = {"attn_implementation": attn_implementation, "device_map": device_map}
    LoadConfig(**(requested | {"dtype": dtype, "device": None if device is None else str(device)}))
    place = device_named(device)
    config = load_config(model, trust_remote_code)
    check_attention(model, config, attn_implementation)
    name, kind = resolve(model), class_of(config)
    repository, how = split_revision(name)
    how |= {key: value for key, value in requested.items() if value is not None} | {"dtype": dtype}
    if is_quantized(config):  # some quantisers take the current card by default
        how.setdefault("device_map", {"": str(place)})
    if shard:  # FSDP2 gathers a layer when it runs, everything else once for each step
        from transformers.distributed.configuration_utils import DistributedConfig

        if num_ranks() < 2:
            raise ConfigError("shard needs several processes: start the command with torchrun")
        layers = {f"{family_of(config.model_type).backbone}.layers.*": "free_full_weight"}
        how["distributed_config"] = DistributedConfig(fsdp_size=num_ranks(), fsdp_plan=layers)
    skeleton = require_buildable(name, config)
    reporter = logging.getLogger("transformers.modeling_utils")
    was_disabled, reporter.disabled = reporter.disabled, True  # it would print names in the files
    try:
        with unreadable(model, "weights"), alone(repository, trust_remote_code):
            loaded, report = kind.from_pretrained(
                repository,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **how,
            )
    finally:
        reporter.disabled = was_disabled
    is_placed = not how.keys().isdisjoint(("device_map", "distributed_config"))
    _check_loaded(f"model {str(model)!r}", report, skeleton, None if is_placed else loaded)
    set_class_(loaded)
    loaded.config._name_or_path = name
    loaded.generation_config = plain_generation(loaded.generation_config)
    if not shard and device_map is None:  # parts lie where they belong
        loaded = loaded.to(place)
    return loaded.eval(), load_processor(name, config, trust_remote_code)


def _check_loaded(
    where: str, report: dict[str, Any], skeleton: PreTrainedModel, loaded: PreTrainedModel | None
) -> None:
    """Refuse weights that are missing or misshapen, or two matrices where one should be tied."""
    problems = [(key, "are missing") for key in sorted(report["missing_keys"])]
    problems += [(key[0], "have another shape") for key in sorted(report["mismatched_keys"])]
    if problems:
        (first, problem), more = problems[0], f" and {len(problems) - 1} more" * (len(problems) > 1)
        raise ConfigError(f"{where}: weights {shortened(first)}{more} {problem}")
    if unused := sorted(report["unexpected_keys"]):
        to_log(f"{where}: {len(unused)} tensors are not read: {shortened(unused[0])}")
    ties = [
        (head := model.get_output_embeddings()) is not None
        and head.weight is model.get_input_embeddings().weight
        for model in (skeleton, loaded)
        if model is not None
    ]
    if ties == [True, False]:
        message = "config.json says tie_word_embeddings, but the files hold two different matrices"
        raise ConfigError(f"{where}: {message}; say false to keep both")


def load_as(
    options: LoadConfig, model: str | Path, device: str | None = None, shard: bool = False
) -> tuple[PreTrainedModel, Any]:
    """Load a model with options, on their device unless another one is given."""
    how = vars(options.part(LoadConfig))
    if device is not None:
        how |= {"device": device, "device_map": None}
    return load(model, **how, shard=shard)


def require_buildable(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    """Refuse a model with pickled, malformed or far too few weights; return it without storage."""
    with unreadable(name, "config"):
        skeleton = empty_model(config)
        skeleton.tie_weights()
    described = sum(p.numel() for p in skeleton.parameters())
    if not Path(name).is_dir():
        return skeleton
    stored = 0
    with unreadable(name, "weights"):
        for path in dict.fromkeys(weight_files(Path(name)).values()):
            with safe_open(path, framework="pt") as file:
                stored += sum(prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    if described > _PACKED * stored + _SPARE:
        raise ConfigError(
            f"model {name!r}: config.json describes {described:,} weights, and its files "
            f"hold {stored:,}"
        )
    return skeleton


def load_processor(name: str, config: PreTrainedConfig, trust_remote_code: bool = False) -> Any:
    """Read the processor of a model that sees, else its tokenizer; None if absent."""
    sees = family_of(config.model_type).vision is not None
    auto = transformers.AutoProcessor if sees else transformers.AutoTokenizer
    here = {path.name for path in Path(name).iterdir()} if Path(name).is_dir() else _OF_PROCESSORS
    if not name or not here & _OF_PROCESSORS:
        return None
    with unreadable(name, "tokenizer"):
        if (file := file_if_reachable(name, "tokenizer.json")) is not None:
            check_tokenizer(Path(file), name)
    kind = "processor" if sees else "tokenizer"
    with unreadable(name, kind), alone(name, trust_remote_code):
        place, how = split_revision(name)
        processor = auto.from_pretrained(place, trust_remote_code=trust_remote_code, **how)
        tokenizer_of(processor)("a")  # some settings fail at the first word
    return processor


class _Published(GenerationConfig):
    """Settings as others published them, which are saved although some have no effect together."""

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        super().validate(user_set_attributes=user_set_attributes)


def plain_generation(config: GenerationConfig | None) -> GenerationConfig:
    """Keep the known settings of a generation configuration, which may come with a model."""
    values = {} if config is None else config.to_dict()
    for name, value in values.items():
        numbers = value if isinstance(value, list) else [value]
        is_id = all(type(number) is int for number in numbers)
        if name.endswith("_token_id") and value is not None and not is_id:
            told = f"generation_config.json: {name} {shortened(value)}"
            raise ConfigError(f"{told} must be a token id, or a list of some")
    return _Published.from_dict({k: v for k, v in values.items() if k in TABLES["generation"]})


def generation_of(folder: str | Path) -> GenerationConfig | None:
    """Read the generation configuration of a model's folder or hub id; None without one."""
    path = file_if_reachable(str(folder), GENERATION_CONFIG_NAME)
    if path is None:
        return None
    with unreadable(folder, GENERATION_CONFIG_NAME):
        return plain_generation(GenerationConfig.from_dict(read_object(path, "model")))


def check_models(options: LoadConfig, *models: str) -> None:
    """Refuse devices that are absent and models that cannot be read, before any weight is read."""
    device_named(options.device)
    for model in models:
        config = load_config(model, options.trust_remote_code)
        check_attention(model, config, options.attn_implementation)


def check_attention(model: str | Path, config: PreTrainedConfig, name: str | None) -> None:
    """Refuse a kind of attention that this machine or the model's class lacks; else set it."""
    if name is None:
        return
    # without their package, transformers fetches code from the hub
    is_there = getattr(import_utils, f"is_flash_attn_{name[-1]}_available", lambda: True)
    if not is_there():
        raise ConfigError(f"attn_implementation {name!r} needs its package, flash-attn, and a GPU")
    with unreadable(model, f"config with attn_implementation {name!r}"):
        config._attn_implementation = name
        empty_model(config)


def require_full_precision(config: PreTrainedConfig, what: str) -> None:
    """Refuse to change weights that are quantised; ``what`` is the change, for the message."""
    if is_quantized(config):
        raise ConfigError(
            f"model: its weights are quantised, so it cannot be {what}. Quantise last: take the "
            "checkpoint from before"
        )


def require_undivided(
    model: Any, what: str, on_one_device: bool = False, field: str = "model"
) -> None:
    """Refuse to change a model partly on host or disk or, ``on_one_device``, on several devices."""
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if "disk" in places or (len(places) > 1 and (on_one_device or "cpu" in places)):
        raise ConfigError(
            f"{field}: its device_map divides it over {', '.join(sorted(places))}, so it cannot be "
            f"{what}. Load it without device_map; a CPU will do"
        )


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model's modules and configuration; the copy has the same tensors."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def is_quantized(config: PreTrainedConfig) -> bool:
    """Whether a configuration says that weights are stored in another type than they compute in."""
    return getattr(config, "quantization_config", None) is not None


def is_uneven(config: PreTrainedConfig) -> bool:
    """Whether a configuration gives decoder layers their own widths."""
    return text_config_of(config).is_heterogeneous and backbone_of(config).can_be_uneven


def check_widths_(config: PreTrainedConfig) -> None:
    """Check layers' own widths in a configuration from a file."""
    if not is_uneven(config):
        return
    standardise_(config)
    text_config, literal = text_config_of(config), backbone_of(config).width_fields
    most = {name: getattr(text_config, name) for name in _WIDTHS}
    for index, fields in text_config.to_dict()["per_layer_config"].items():
        for name, value in fields.items():
            is_width = type(value) is int and 1 <= value <= most.get(name, 0)
            if not is_width and (name, value) not in literal.items():
                limits = ", ".join(f"{name} (1 to {limit})" for name, limit in most.items())
                raise ConfigError(
                    f"config: per_layer_config[{int(index)}] is {fields!r} but may give {limits}"
                )


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the Auto class that plain transformers code would load this model with."""
    sees = family_of(config.model_type).vision is not None
    if sees and type(config) in transformers.AutoModelForImageTextToText._model_mapping:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def class_of(config: PreTrainedConfig) -> Any:
    """Return the class whose ``from_pretrained`` reads a model; layers of their own are cut."""
    auto = auto_class(config)
    if not is_uneven(config):
        return auto
    name = f"{PREFIX}{auto._model_mapping[type(config)].__name__}"
    made: type[PreTrainedModel] = getattr(modeling_pruned, name)
    made.register_for_auto_class(auto.__name__)  # so that save_pretrained copies the file
    return made


def auto_map_of(config: PreTrainedConfig) -> dict[str, str]:
    """Make the ``auto_map`` that lets plain transformers code find the uneven classes."""
    file = modeling_pruned.__name__.rpartition(".")[2]
    autos: tuple[Any, ...] = (auto_class(config), transformers.AutoModel)
    native = {auto.__name__: auto._model_mapping[type(config)].__name__ for auto in autos}
    return {auto: f"{file}.{PREFIX}{name}" for auto, name in native.items()}


def empty_model(
    config: PreTrainedConfig, dtype: torch.dtype | None = None, with_buffers: bool = False
) -> PreTrainedModel:
    """Build a model without its weights; ``with_buffers`` computes the buffers that no file has."""
    given = {} if dtype is None else {"dtype": dtype}
    with init_empty_weights() if with_buffers else torch.device("meta"):
        build = getattr(class_of(config), "_from_config" if is_uneven(config) else "from_config")
        model: PreTrainedModel = build(copy.deepcopy(config), **given)
    return model


def set_class_(model: PreTrainedModel) -> None:
    """Give a model its native or uneven class by its config, instead of a checkpoint's own code."""
    config: Any = model.config
    if is_uneven(config):
        standardise_(config)
        model.__class__ = class_of(config)
        config.auto_map = auto_map_of(config)
        cut_layers_(model)
    elif type(model).__name__.startswith(PREFIX):
        model.__class__ = type(model).__bases__[0]
        vars(config).pop("auto_map", None)


def retype_modules_(model: PreTrainedModel, old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """Give the language model's modules the classes of another type that computes the same.

    Relies on: a type's classes lie in ``models.<type>.modeling_<type>``, are called after its
    configuration (``LlamaConfig``, ``LlamaMLP``), and have the same attributes in both types. Tried
    with transformers 5.24.
    """
    source, target = (
        importlib.import_module(f".models.{kind}.modeling_{kind}", "transformers")
        for kind in (old.model_type, new.model_type)
    )
    old_prefix, new_prefix = (type(each).__name__.removesuffix("Config") for each in (old, new))
    family = Parts(model).family
    root = model if family.text_config is None else model.get_submodule(family.backbone)
    for module in root.modules():
        name = type(module).__name__
        if getattr(source, name, None) is type(module) and name.startswith(old_prefix):
            module.__class__ = getattr(target, new_prefix + name.removeprefix(old_prefix))
