"""Count what an image becomes, and choose how many tokens: the knobs of `Family.pictures`."""

import copy
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache, wraps
from math import ceil, prod
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from slimvlm.core.errors import ConfigError, DataError, SlimError, UnsupportedModelError
from slimvlm.data import chat
from slimvlm.data.read import picture_tokens
from slimvlm.data.samples import Sample, open_image
from slimvlm.models import load as models
from slimvlm.models.cost import Picture
from slimvlm.models.devices import digest_of_tensors, free_memory
from slimvlm.models.families import Knob
from slimvlm.models.parts import family_of, text_config_of

SHOWN = 32  # images, spread over the data, whose sizes decide
_PIXELS = ("pixel_values", "image_pixel_values", "flattened_patches")  # as processors name them
_TOKEN_IDS = ("image_token_id", "image_token_index", "image_patch_id")
_EDGES = (  # patches along the edge of what becomes one token; of ratios the inverse
    *("spatial_merge_size", "scale_factor", "downsample_factor", "downsample_ratio"),
    *("pixel_shuffle_ratio", "hidden_stride"),
)
_LIMITS = ("image_seq_length", "mm_tokens_per_image")  # of the tokens of an image
_CLASSED = ("clip_vision_model", "internvl_vision", "llama4_vision_model", "mllama_vision_model")
"""Types of towers that read a class token beside the patches of each tile."""


@lru_cache(maxsize=16)
def picture_of(model: str, trust_remote_code: bool = False) -> Picture:
    """Count what an image of usual size is for a model in a folder or on the hub."""
    config, processor = models.load_config(model, trust_remote_code), None
    with suppress(SlimError):
        processor = models.load_processor(models.resolve(model), config, trust_remote_code)
    return usual_picture(config, processor)


def usual_picture(config: Any, processor: Any = None) -> Picture:
    """Count what an image of usual size becomes by a processor, else by the configuration."""
    vision = getattr(config, "vision_config", None)
    if family_of(config.model_type).vision is None or vision is None:
        return Picture()
    step, extra = _pair(getattr(vision, "patch_size", None)), vision.model_type in _CLASSED
    reads_aside = bool(getattr(text_config_of(config), "cross_attention_layers", None))
    if chat.can_see(processor):
        with suppress(SlimError, AttributeError, TypeError, ValueError):  # refuses it, or is unlike
            inputs = chat.encode_questions(processor, [chat.plain_question(processor)])
            tokens = picture_tokens(processor, chat.USUAL_SIZE)
            ids = torch.tensor([getattr(config, name, None) or -1 for name in _TOKEN_IDS])
            features = int(torch.isin(inputs["input_ids"], ids).sum()) or tokens
            tiles, reach = _patches(inputs, step, extra)
            patches = tiles * reach or features
            return Picture(patches, reach or features, patches if reads_aside else features, tokens)
    height, width = _pair(getattr(vision, "image_size", None)) or chat.USUAL_SIZE[::-1]
    patches = 256 if step is None else (height // step[0]) * (width // step[1])
    named = [getattr(part, name, None) for name in _EDGES for part in (config, vision)]
    edge = next(filter(None, named), 1)
    limits = [getattr(config, name, None) or patches for name in _LIMITS]
    features = min(round(patches / max(edge, 1 / edge) ** 2), *limits)
    reach = patches + extra
    return Picture(reach, reach, reach if reads_aside else features, 1 if reads_aside else features)


def _pair(value: Any) -> tuple[int, int] | None:
    """Return height and width of a setting that is one number or two; None if it is neither."""
    values = [*value] if isinstance(value, list | tuple) else [value]
    return (values[0], values[-1]) if values[0] else None


def _patches(
    inputs: Mapping[str, Tensor], step: tuple[int, int] | None, extra: bool
) -> tuple[int, int]:
    """Count the tiles of encoded images, and what a tower reads of each; 0 if it is not known."""
    if (grids := inputs.get("image_grid_thw")) is not None:
        return len(grids), int(grids[0].prod())
    pixels = next((inputs[name] for name in _PIXELS if name in inputs), torch.empty(0, 0))
    if pixels.ndim >= 4 and pixels.shape[-3] == 3:  # images; others are patches already
        *tiles, _, height, width = pixels.shape
        return prod(tiles), 0 if step is None else (height // step[0]) * (width // step[1]) + extra
    *tiles, patches, _ = pixels.shape
    return prod(tiles), patches


@contextmanager
def seen_once(model: PreTrainedModel, known: dict[str, Any]) -> Iterator[None]:
    """Compute the features of images once for each input inside, and keep them in ``known``.

    This holds for the model and for copies that have the same parameters outside the backbone,
    which must not change. Features stay in memory until half of what is free now is taken.
    """
    kind: Any = type(model.base_model)
    cpu = torch.device("cpu")
    compute = getattr(kind, "get_image_features", None)
    if compute is None:
        yield
        return
    backbone = family_of(model.config.model_type).backbone.removeprefix(model.base_model_prefix)

    def outside(owner: nn.Module) -> list[int]:
        named = owner.named_parameters()
        return [id(each) for name, each in named if not f".{name}".startswith(f"{backbone}.")]

    ours, least = outside(model.base_model), free_memory(cpu) // 2

    @wraps(compute)
    def features(owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if outside(owner) != ours:
            return compute(owner, *args, **kwargs)
        given = {**{str(place): value for place, value in enumerate(args)}, **kwargs}
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        others = repr([pair for pair in sorted(given.items()) if pair[0] not in tensors])
        key = digest_of_tensors(tensors) + others
        if key in known:
            return send_to_device(known[key], next(iter(tensors.values())).device)
        output = compute(owner, *args, **kwargs)
        if isinstance(output, ModelOutput) and free_memory(cpu) > least:
            read = {n: v for n, v in output.items() if n not in ("hidden_states", "attentions")}
            known[key] = send_to_device(type(output)(**read), cpu)
        return output

    kind.get_image_features = features
    try:
        yield
    finally:
        kind.get_image_features = compute


@dataclass(frozen=True)
class PictureBudget:
    """Settings of a processor with which images take at most a share of their tokens."""

    share: float  # of today's
    settings: Mapping[str, Any]  # of the image processor that are changed, a dot before keys
    tokens: float  # of an image on average, with the marks around it
    tokens_before: float  # the same, without the settings
    size: tuple[int, int]  # of the median image

    def __str__(self) -> str:
        """Complete a sentence such as "images take 64 tokens ..."."""
        changes = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return f"{self.tokens:.0f} tokens in place of {self.tokens_before:.0f}, by {changes}"

    def apply_(self, model: PreTrainedModel, processor: Any) -> Any:
        """Change a model's configuration; return a processor that fits, the given one stays."""
        ours = vars(model.config)
        ours.update({name: value for name, value in self.settings.items() if name in ours})
        return with_settings(processor, self.settings)


def knobs_of(config: Any) -> tuple[Knob, ...]:
    """Return the knobs of a model's family; refuse a family without, and say why."""
    family = family_of(config.model_type)
    found = "it takes no images" if family.vision is None else family.pictures
    if isinstance(found, str):
        raise UnsupportedModelError(f"{config.model_type} has no image-token budget: {found}")
    return found


def with_settings(processor: Any, settings: Mapping[str, Any]) -> Any:
    """Return a processor with some other settings, a dot before keys; the given one stays."""
    made, values = copy.copy(processor), processor.image_processor.to_dict()
    for field, value in settings.items():
        name, _, key = field.partition(".")
        values[name] = {**values[name], key: value} if key else value
    made.image_processor = type(processor.image_processor).from_dict(values)
    return made


def steps_down(processor: Any, knobs: Sequence[Knob]) -> list[dict[str, Any]]:
    """List settings from today's, which change nothing, to those with the fewest tokens."""
    values, found = processor.image_processor.to_dict(), list[dict[str, Any]]([{}])
    parts = [(name, part) for name, part in values.items() if isinstance(part, dict)]
    values |= {f"{name}.{key}": value for name, part in parts for key, value in part.items()}
    for knob in knobs:
        before, now, below = found[-1], values.get(knob.field), list[Any]()
        if now and knob.way == "pixels":
            lowest = now / 16 if now <= 2**12 else 1  # of an edge or an area
            smaller = dict.fromkeys(int(now * 0.99**step) for step in range(1, 1000))
            below = [value for value in smaller if value >= lowest]
        elif now and knob.way == "grids":
            areas = sorted({h * w for h, w in now}, reverse=True)
            below = [[[h, w] for h, w in now if h * w <= most] for most in areas[1:]]
        elif now:
            below = [value for value in knob.way if value < now]
        least = knob.field.replace("longest", "shortest").replace("max_", "min_")
        for value in below:
            lowered = {least: min(values[least], value)} if values.get(least) else {}
            found.append({**before, **lowered, knob.field: value})
    return found


def budgets_for(
    config: Any, processor: Any, samples: Sequence[Sample]
) -> Callable[[float], PictureBudget]:
    """Look at some data's images; return a function that finds the best settings for a share."""
    knobs = knobs_of(config)
    pictures = [picture for sample in samples for picture in sample.images]
    if not pictures:
        raise DataError("data: no sample has an image, so there is no image-token budget")
    sizes = [open_image(each).size for each in pictures[:: -(-len(pictures) // SHOWN)]]
    steps, names = steps_down(processor, knobs), " and ".join(knob.field for knob in knobs)

    @cache
    def counts(step: int) -> list[int]:
        changed = with_settings(processor, steps[step])
        of_size = {size: picture_tokens(changed, size) for size in set(sizes)}
        return [of_size[size] for size in sizes]

    order: Sequence[int] = range(len(steps))
    if len(steps) < 2 * SHOWN:  # with fewer tiles some images take more tokens
        order = sorted(order, key=lambda step: -sum(counts(step)))
    full, least = sum(counts(0)), sum(counts(order[-1]))
    if least == full:
        message = f"its processor has no {names} by which images take fewer tokens"
        raise UnsupportedModelError(f"{config.model_type} has no image-token budget: {message}")

    def choose(share: float) -> PictureBudget:
        if not least <= share * full <= full:
            lowest = ceil(1000 * least / full) / 1000
            of = f"{full / len(sizes):.0f} tokens of this data's images"
            message = f"must be from {lowest} to 1: {names} leave that of the {of}"
            raise ConfigError(f"image-token budget {share} {message}")
        step = order[bisect_left(order, -share * full, key=lambda i: -sum(counts(i)))]
        means = sum(counts(step)) / len(sizes), full / len(sizes)
        return PictureBudget(share, steps[step], *means, sorted(sizes)[len(sizes) // 2])

    return choose


def llama_cpp_option(processor: Any, config: Any) -> str:
    """Return llama.cpp's option for as many tokens, as it reads no processor; empty if unknown."""
    made: Any = getattr(processor, "image_processor", None)
    if not hasattr(made, "merge_size") or "glm" in config.model_type:  # GLM also counts frames
        return ""
    most = made.size["longest_edge"] // (made.patch_size * made.merge_size) ** 2
    return f"--image-max-tokens {most}"
