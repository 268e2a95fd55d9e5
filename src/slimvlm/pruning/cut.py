"""Apply a plan to a live model, and express it as a Hugging Face configuration beforehand."""

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from slimvlm.core.errors import ConfigError, ImpossiblePlanError, UnsupportedModelError
from slimvlm.models import load as models
from slimvlm.models.anatomy import (
    LAYER_UNITS,
    Anatomy,
    channels_of,
    read_anatomy,
    read_states,
    unit_of,
)
from slimvlm.models.families import INPUT_COLUMNS, OUTPUT_ROWS, Projection
from slimvlm.models.hidden import layer_input
from slimvlm.models.modeling_pruned import READS_GLOBAL, set_counts_
from slimvlm.models.parts import (
    Parts,
    family_of,
    layer_matrices,
    part_at,
    text_config_of,
    tower_path,
)
from slimvlm.planning.plan import Kept, Plan
from slimvlm.pruning.tokens import renumber_config_, renumber_modules_, require_named_tokens
from slimvlm.scoring.layerwise import LazyCheckpoint

MULTI_TOKEN_FIELDS = ("mtp_num_hidden_layers", "num_nextn_predict_layers")
"""Fields with the number of multi-token prediction layers, which transformers does not read."""

_FROM_PYTHON = (
    "from Python any number by prune_(model, plan, allow_uneven=True): such files need "
    "trust_remote_code=True"
)


def smaller_text_config(
    config: PreTrainedConfig, plan: Plan, uneven: bool = False
) -> PreTrainedConfig:
    """Build the pruned model's language configuration; ``uneven`` gives layers their own widths."""
    old: PreTrainedConfig = text_config_of(config)
    after, row = plan.after, plan.before.backbone
    new: PreTrainedConfig = copy.deepcopy(old)
    if row.can_be_uneven:
        new.per_layer_config = None
        vars(new).pop(READS_GLOBAL, None)
    if plan.needs_retype:
        target = CONFIG_MAPPING[after.text_type]
        known = target().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
        kept = {name: value for name, value in new.to_dict().items() if name in known}
        new = target(**{**kept, **row.retype_fields})
        new._attn_implementation = old._attn_implementation
    # fields with a value for each layer, or with numbers of layers
    new.num_hidden_layers = len(plan.layers)
    if row.shared_tail is not None:
        first = old.num_hidden_layers - getattr(old, row.shared_tail)
        setattr(new, row.shared_tail, sum(index >= first for index in plan.layers))
    for name in row.layer_lists:
        if (given := getattr(old, name, None)) is not None:
            setattr(new, name, [given[index] for index in plan.layers])
    for name in row.layer_indices:
        if (given := getattr(old, name, None)) is not None:
            setattr(new, name, [place for place, i in enumerate(plan.layers) if i in given])
    for name in row.layer_maps:
        given = {int(index): value for index, value in old.to_dict().get(name, {}).items()}
        setattr(new, name, {place: given[i] for place, i in enumerate(plan.layers) if i in given})
    for name in MULTI_TOKEN_FIELDS:
        if getattr(old, name, None):
            setattr(new, name, 0)
    renumber_config_(new, plan)
    if uneven:
        own = [_changed_widths(new, after.with_layers([shape])) for shape in after.layers]
        if head_dims := {fields.pop("head_dim") for fields in own if "head_dim" in fields}:
            (new.head_dim,) = head_dims
        new.per_layer_config = dict(enumerate(own))
        setattr(new, READS_GLOBAL, True)
        return new
    for name, value in _changed_widths(new, after).items():
        setattr(new, name, value)
    return new


def with_renumbered(
    config: PreTrainedConfig, text_config: PreTrainedConfig, plan: Plan
) -> PreTrainedConfig:
    """Change the whole configuration of the original into that of the pruned model."""
    renumber_config_(config, plan)
    if plan.tower is not None:
        narrow_tower_config_(config, plan.tower)
    if (name := family_of(config.model_type).text_config) is None:
        return text_config
    setattr(config, name, text_config)
    return config


def narrow_tower_config_(config: Any, plan: Plan) -> None:
    """Change the whole configuration of the original into one with the plan's vision tower."""
    row, vision = plan.before.backbone, config.vision_config
    (width,) = {len(plan.neurons[index]) for index in plan.layers}
    setattr(vision, row.neuron_field, width)
    if len(plan.layers) == plan.before.num_layers:
        return
    states = read_states(config, plan.before.num_layers)
    setattr(vision, row.depth_field, len(plan.layers))
    for name in row.layer_indices:
        if (given := getattr(vision, name, None)) is not None:
            setattr(vision, name, [plan.layers.index(i) for i in given if i in plan.layers])
    owner, _, field = row.reads.rpartition(".")
    holder = attrgetter(owner)(config) if owner else config
    if (given := getattr(holder, field, None)) is None:
        return
    # positive numbers: engines that compute only what is read take -1 for another state
    left = [sum(index < state for index in plan.layers) - row.first_state for state in states]
    is_last = given == -1 and left[0] == len(plan.layers)
    if not is_last:
        setattr(holder, field, left if isinstance(given, list | tuple) else left[0])


def lost_heads(config: PreTrainedConfig) -> str | None:
    """Describe the multi-token heads that pruning removes; None if there are none."""
    for name in MULTI_TOKEN_FIELDS:
        if getattr(text_config_of(config), name, None):
            return f"multi-token heads: transformers does not read them, so {name} becomes 0"
    return None


def _changed_widths(text_config: Any, after: Anatomy) -> dict[str, Any]:
    """Return the fields, with new values, that differ from the widths of the layers."""
    changed: dict[str, Any] = {}
    for kv_heads, queries_per_group, head_dim in after.attention_shapes:
        heads = {"num_attention_heads": kv_heads * queries_per_group}
        heads["num_key_value_heads"] = kv_heads
        if any(getattr(text_config, name, count) != count for name, count in heads.items()):
            changed = {**heads, "head_dim": head_dim}
    row = after.backbone
    if row.experts is not None:
        for experts in after.expert_counts:
            if getattr(text_config, row.experts.count_field) != experts:
                changed[row.experts.count_field] = experts
    if row.neuron_field in row.layer_lists:
        rows = zip(after.layers, getattr(text_config, row.neuron_field), strict=True)
        widths = [shape.intermediate_size or whole for shape, whole in rows]
        return {**changed, row.neuron_field: widths}
    for neurons in after.mlp_widths:
        if getattr(text_config, row.neuron_field) != neurons:
            changed |= {row.neuron_field: neurons, **row.width_fields}
    return changed


_COUNTS = {
    "neuron": ("intermediate_dim", "intermediate_size", "expert_dim"),
    "expert": ("num_experts",),
}
"""Attributes of experts' modules and routers that hold the number of a kind of unit."""


def prune_(model: PreTrainedModel, plan: Plan, allow_uneven: bool = False) -> None:
    """Prune a model by a plan, in place: afterwards it is an ordinary smaller model.

    The new configuration is built and checked before any weight is touched. Query heads are removed
    with their KV head, fused matrices are cut inside their blocks, biases are cut with their rows,
    and the biases of output projections remain. Layers are renumbered for the cache. If the head
    count needs it (`Plan.needs_retype`), the language model is retyped: Llama to Mistral, which
    computes the same.

    A plain configuration cannot express layers of different widths. The model then becomes the
    subclass of its class in ``modeling_pruned.py``, and ``save_pretrained`` also writes that file.
    With ``allow_uneven``, so do equal layers whose head count cannot be configured. Loading such
    files needs ``trust_remote_code=True``.

    Raises:
        ConfigError: If the plan is for another model.
        ImpossiblePlanError: If the configuration class cannot express the shape.
    """
    text_config = require_expressible(model, plan, allow_uneven)
    prune_tower_(model, plan.tower)
    embedding, head = Parts(model).token_matrices()
    is_tied = head.weight is embedding.weight
    _cut_(cuts_of(model, plan))
    if is_tied:
        head.weight = embedding.weight
    parts = Parts(model)
    kept, text_model = [parts.layers[i] for i in plan.layers], parts.text_model
    text_model.layers = nn.ModuleList(kept)
    for name in plan.before.backbone.live_lists:
        setattr(text_model, name, [getattr(text_model, name)[i] for i in plan.layers])
    for index, layer in enumerate(kept):
        for module in layer.modules():  # renumbered for the cache
            if "layer_idx" in vars(module):
                module.layer_idx = index  # type: ignore[assignment]
    # every module gets the new configuration, and copies of counts
    old = text_config_of(model.config)
    model.config = with_renumbered(model.config, text_config, plan)
    for module in model.modules():
        if vars(module).get("config") is old:
            module.config = text_config  # type: ignore[assignment]
    renumber_modules_(model, plan)
    for name in plan.before.backbone.layer_indices:
        if hasattr(text_model, name):
            setattr(text_model, name, getattr(text_config, name))
    if "first_kv_shared_layer_idx" in vars(text_model):
        shared: int = getattr(text_config, plan.before.backbone.shared_tail or "")
        text_model.first_kv_shared_layer_idx = plan.after.num_layers - shared
    for layer, shape in zip(text_model.layers, plan.after.layers, strict=True):
        if shape.num_kv_heads:
            attention = layer.get_submodule("self_attn")
            set_counts_(attention, text_config, shape.num_heads, shape.num_kv_heads)
    models.set_class_(model)
    if plan.needs_retype:
        models.retype_modules_(model, old, text_config)


def prune_tower_(model: nn.Module, plan: Plan | None) -> None:
    """Cut the vision tower of a model, in place; its configuration is changed with the model's."""
    if plan is None:
        return
    tower = tower_of(model)
    _cut_(cuts_of_tower(tower, plan))
    parts, row = Parts(tower), plan.before.backbone
    setattr(parts.text_model, row.layers, nn.ModuleList(parts.layers[i] for i in plan.layers))
    for name in row.layer_indices:
        if name in vars(tower):
            given = getattr(tower, name)
            setattr(tower, name, [plan.layers.index(i) for i in given if i in plan.layers])


def tower_of(model: nn.Module) -> Any:
    """Return a model's vision tower; raise if it has none whose layers are known."""
    if (path := tower_path(model.config)) is None:
        raise UnsupportedModelError("the model has no vision tower whose layers are known")
    return model.get_submodule(path)


def require_expressible(
    model: PreTrainedModel, plan: Plan, allow_uneven: bool = False
) -> PreTrainedConfig:
    """Build the pruned language model's configuration; refuse the plans that `prune_` refuses."""
    models.require_full_precision(model.config, "pruned")
    require_match(model, plan)
    require_named_tokens(model, plan)
    uneven = not plan.after.is_uniform or (allow_uneven and plan.file_format == "uneven")
    if uneven and not plan.before.backbone.can_be_uneven:
        told = f"plan: layers of {plan.before.text_type!r} must stay equally wide"
        raise ImpossiblePlanError(f"{told}. Plan with allocation 'uniform'")
    config, text_config = model.config, smaller_text_config(model.config, plan, uneven)
    if not uneven:
        legal = plan.before.legal_neurons()
        for neurons in plan.after.mlp_widths:
            if neurons not in legal:
                nearest = sorted(sorted(legal, key=lambda count: abs(count - neurons))[:2])
                near = ", ".join(map(str, nearest))
                near += f", or {_FROM_PYTHON}" if plan.before.backbone.can_be_uneven else ""
                told = f"{plan.before.model_type!r} cannot be configured with {neurons} neurons"
                raise ImpossiblePlanError(f"plan: {told} in a layer. Possible near it: {near}")
    cause: Exception | None = None
    try:
        checked = type(text_config).from_dict(text_config.to_dict())
        whole = with_renumbered(copy.deepcopy(config), checked, plan)
        found = read_anatomy(models.empty_model(whole))
    except (StrictDataclassError, ValueError, RuntimeError, ZeroDivisionError) as error:
        cause, why = error, str(error).strip().splitlines()[-1]
    else:
        after = plan.after
        towers = found.tower, after.tower
        if (found.layers, found.backbone_params) == (after.layers, after.backbone_params):
            if towers[0] == towers[1] or plan.before.tower is None:  # of a plan from before towers
                return text_config
            kind = plan.before.model_type
            raise ImpossiblePlanError(f"plan: {kind!r} cannot be configured with such a tower")
        why = "a model built from the new configuration has other shapes"
    groups, *_ = [shape[0] for shape in plan.after.attention_shapes] or [0]
    told = f"plan: {plan.before.text_type!r} cannot be configured with {groups} KV groups ({why})"
    possible = ", ".join(map(str, plan.before.legal_kv_heads()))
    raise ImpossiblePlanError(f"{told}. Possible: {possible}, or {_FROM_PYTHON}") from cause


@dataclass(frozen=True)
class Cut:
    """The kept channels of one parameter."""

    owner: nn.Module
    name: str
    dim: int
    keep: Tensor
    count: tuple[str, int] | None = None  # kind and number of units, where the module repeats it


def cuts_of(model: nn.Module, plan: Plan) -> Iterator[Cut]:
    """List the cuts of a plan's backbone: token rows, kept layers, weights with slices for them."""
    if plan.tokens is not None:
        keep = torch.tensor(plan.tokens)
        for module in Parts(model).token_matrices():
            yield Cut(module, "weight", 0, keep)
            if getattr(module, "bias", None) is not None:
                yield Cut(module, "bias", 0, keep)
    for index in plan.layers:
        yield from cuts_of_layer(model, plan, index)
    for stack, holder in Parts(model).stacks():
        if stack.rows is not None and plan.tokens is not None:
            yield Cut(holder, "weight", 0, torch.tensor(plan.tokens))
        slices = torch.arange(holder.weight.shape[stack.dim]).view(plan.before.num_layers, -1)
        yield Cut(holder, "weight", stack.dim, slices[list(plan.layers)].flatten())


def cuts_of_layer(
    model: nn.Module, plan: Plan, index: int, units: Collection[str] = LAYER_UNITS
) -> Iterator[Cut]:
    """List the cuts of a kept layer; a weight of experts may have two."""
    layer, row = Parts(model).layers[index], plan.before.backbone
    for matrix in chain(*layer_matrices(layer, row)):
        projection = matrix.projection
        unit, keep = unit_of(projection), kept_channels(plan, index, projection)
        if len(keep) == matrix.width or unit not in units:
            continue
        is_repeated = unit == "expert" or matrix.is_of_experts
        count = (unit, len(plan.kept(unit)[index])) if is_repeated else None
        yield Cut(matrix.owner, matrix.name, projection.axis, keep, count)
        if projection.dim == OUTPUT_ROWS and matrix.bias is not None:
            yield Cut(matrix.owner, "bias", 0, keep)


def cuts_of_tower(tower: nn.Module, plan: Plan) -> Iterator[Cut]:
    """List the cuts of a plan for a vision tower, and of the head that shares its width."""
    for index in plan.layers:
        yield from cuts_of_layer(tower, plan, index)
    keep = torch.arange(len(plan.neurons[plan.layers[0]]))  # of a head that nobody reads
    for projection in plan.before.backbone.of_same_width:
        if isinstance(part := part_at(tower, projection.path), nn.Linear):
            yield Cut(part, "weight", projection.axis, keep)
            if projection.dim == OUTPUT_ROWS:
                yield Cut(part, "bias", 0, keep)


def reader_of(
    checkpoint: LazyCheckpoint,
    plan: Plan,
    weights: Mapping[tuple[int, str], Tensor],
    tower_weights: Mapping[tuple[int, str], Tensor],
) -> Callable[[str], Tensor]:
    """Return a function that cuts parameters of the pruned model out of files, by their names.

    Those of layers, by number in the original and path, that are no slices are given.
    """
    model = checkpoint.model
    names = {id(module): name for name, module in model.named_modules()}
    cuts: dict[str, list[Cut]] = defaultdict(list)
    for cut in cuts_of(model, plan):
        cuts[f"{names[id(cut.owner)]}.{cut.name}"].append(cut)
    given = {names[id(Parts(model).layers)]: (plan, weights)}
    if plan.tower is not None:
        tower = tower_of(model)
        given[names[id(Parts(tower).layers)]] = (plan.tower, tower_weights)
        for cut in cuts_of_tower(tower, plan.tower):
            cuts[f"{names[id(cut.owner)]}.{cut.name}"].append(cut)

    def read(name: str) -> Tensor:
        for layers, (its_plan, its_weights) in given.items():
            if match := re.fullmatch(rf"{re.escape(layers)}\.(\d+)\.(.+)", name):
                place = its_plan.layers[int(match[1])], match[2]
                if place in its_weights:
                    return its_weights[place].to(model.dtype)
                name = f"{layers}.{place[0]}.{place[1]}"
                break
        tensor = checkpoint.read(name)
        for cut in cuts.get(name, ()):
            tensor = tensor.index_select(cut.dim, cut.keep)
        return tensor

    return read


def cut_layer_(
    model: nn.Module, plan: Plan, index: int, units: Collection[str] = LAYER_UNITS
) -> None:
    """Cut one layer, in place; the model runs only layer by layer until all of it is cut."""
    _cut_(cuts_of_layer(model, plan, index, units))
    shape, groups = plan.before.layers[index], len(plan.kv_groups[index])
    if groups < shape.num_kv_heads and "kv_group" in units:
        attention: Any = Parts(model).layers[index].get_submodule("self_attn")
        heads = shape.num_heads // shape.num_kv_heads * groups
        config = copy.copy(attention.config)
        config.num_attention_heads, config.num_key_value_heads = heads, groups
        set_counts_(attention, config, heads, groups)


def _cut_(cuts: Iterable[Cut]) -> None:
    for cut in list(cuts):
        owner: Any = cut.owner
        parameter = getattr(owner, cut.name)
        kept = parameter.detach().index_select(cut.dim, cut.keep.to(parameter.device))
        setattr(owner, cut.name, nn.Parameter(kept, parameter.requires_grad))
        if isinstance(owner, nn.Linear):
            owner.out_features, owner.in_features = owner.weight.shape
        elif isinstance(owner, nn.Embedding):
            owner.num_embeddings, owner.embedding_dim = owner.weight.shape
        unit, count = cut.count or ("", 0)
        for name in set(_COUNTS.get(unit, ())) & set(vars(owner)):
            setattr(owner, name, count)


def mask_(model: PreTrainedModel, plan: Plan) -> None:
    """Switch off the removed units of a plan without changing any shape, in place.

    The columns of ``o_proj`` and ``down_proj`` that read removed units become zero. Removed layers
    become zero altogether, and a hook returns their input. Routers score removed experts with minus
    infinity. Removed tokens are zero in the embedding, and a hook sets their logits to minus
    infinity. `prune_` is tested against this slow and obvious form of a plan.
    """
    require_match(model, plan)
    parts = Parts(model)
    with torch.no_grad():
        _mask_layers_(parts, plan)
        if plan.tower is not None:
            _mask_layers_(Parts(tower_of(model)), plan.tower)
        for index in plan.layers:
            layer = parts.layers[index]
            for matrix in layer_matrices(layer, parts.row)[2]:
                if matrix.weight.ndim == 2 and len(plan.experts[index]) < matrix.width:
                    path, _, _ = matrix.projection.path.rpartition(".")
                    _route_without(layer.get_submodule(path), matrix.weight, plan.experts[index])
        if plan.tokens is not None:
            embedding, head = parts.token_matrices()
            lost = _removed(len(embedding.weight), plan.tokens)
            for holder in (embedding, *(holder for stack, holder in parts.stacks() if stack.rows)):
                holder.weight[lost.to(holder.weight.device)] = 0
            head.register_forward_hook(
                lambda module, args, logits: logits.masked_fill(lost.to(logits.device), -torch.inf)
            )


def _mask_layers_(parts: Parts, plan: Plan) -> None:
    """Switch off the removed layers, and the inputs of matrices that read removed units."""

    def pass_on(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = layer_input(args, kwargs)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    for index, layer in enumerate(parts.layers):
        if index not in plan.layers:
            for parameter in layer.parameters():
                parameter.zero_()
            layer.register_forward_hook(pass_on, with_kwargs=True)
    for index, matrix in parts.matrices():
        if matrix.projection.dim == INPUT_COLUMNS and index in plan.layers:
            removed = _removed(matrix.width, kept_channels(plan, index, matrix.projection))
            shape = [1] * matrix.weight.ndim
            shape[matrix.projection.axis] = matrix.width
            matrix.weight.masked_fill_(removed.view(shape).to(matrix.weight.device), 0)


def _route_without(router: Any, weight: Tensor, kept: Kept) -> None:
    """Let a router score removed experts with minus infinity."""
    removed, forward = _removed(len(weight), kept).to(weight.device), router.forward

    class Masked(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kw: Any = None) -> Any:
            result = func(*args, **(kw or {}))
            is_routing = func is F.linear and args[1] is weight
            return result.masked_fill(removed, -torch.inf) if is_routing else result

    def route(*args: Any, **kwargs: Any) -> Any:
        with Masked():
            return forward(*args, **kwargs)

    router.forward = route


def require_match(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan for another model, and a model without all its weights in place."""
    models.require_undivided(model, "pruned")
    anatomy = read_anatomy(model)
    if anatomy.layers != plan.before.layers or anatomy.model_type != plan.before.model_type:
        shapes: list[str] = []
        for each in (plan.before, anatomy):
            groups = max(shape.num_kv_heads for shape in each.layers)
            neurons = max(shape.intermediate_size for shape in each.layers)
            experts = "".join(f", {count} experts" for count in each.expert_counts)
            layers = f"{each.model_type} with {each.num_layers} layers"
            shapes.append(f"{layers}, {groups} KV groups, {neurons} neurons{experts}")
        raise ConfigError("plan: made for {}, but the model is {}".format(*shapes))
    if plan.tower is not None and plan.tower.before != anatomy.tower:
        raise ConfigError("plan: made for a model with another vision tower")
    expected, count = plan.before.vocab_size, anatomy.vocab_size
    if plan.tokens is not None and count != expected:
        raise ConfigError(f"plan: made for {expected:,} tokens, but the model has {count:,}")
    for stack, holder in Parts(model).stacks():
        if plan.tokens is not None and stack.rows and len(holder.weight) != count:
            rows = f"{stack.path} has {len(holder.weight):,} rows"
            told = f"{rows}, the vocabulary {count:,} tokens"
            raise ConfigError(f"plan: no token can be removed: {told}")


def kept_channels(plan: Plan, index: int, projection: Projection) -> Tensor:
    """List the channels of a matrix of layer ``index`` that a plan keeps along its axis."""
    units = plan.kept(unit_of(projection))[index]
    return channels_of(projection, plan.before.layers[index], units)


def _removed(count: int, kept: Kept | Tensor) -> Tensor:
    """Return a mask of the indices that are not kept."""
    removed = torch.ones(count, dtype=torch.bool)
    removed[torch.as_tensor(kept, dtype=torch.long)] = False
    return removed
