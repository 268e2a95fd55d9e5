"""Express a plan as a Hugging Face configuration, and check that it can be read back."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from slimvlm.core.errors import ImpossiblePlanError
from slimvlm.models.anatomy import Anatomy, read_anatomy
from slimvlm.models.classes import UNEVEN_FIELD, WIDTHS, empty_model, with_text_config
from slimvlm.models.parts import text_config_of
from slimvlm.planning.plan import Plan
from slimvlm.pruning.tokens import renumber_config_

MULTI_TOKEN_FIELDS = ("mtp_num_hidden_layers", "num_nextn_predict_layers")
"""Fields with the number of multi-token prediction layers, which transformers does not read."""

_FROM_PYTHON = (
    "from Python any number by prune_(model, plan, allow_uneven=True), whose files need "
    "trust_remote_code=True"
)


def smaller_text_config(
    config: PreTrainedConfig, plan: Plan, uneven: bool = False
) -> PreTrainedConfig:
    """Build the language-model configuration of the pruned model; the given one is left alone.

    With ``uneven``, each layer gets its own entry in `UNEVEN_FIELD`. The fields for all layers then
    stay, so that the rules of the configuration class hold for them.
    """
    old: PreTrainedConfig = text_config_of(config)
    after = plan.after
    new: PreTrainedConfig = copy.deepcopy(old)
    vars(new).pop(UNEVEN_FIELD, None)
    if plan.needs_retype:
        new = _retyped(new, after.text_type, plan.before.backbone.retype_fields)
    for name, value in _of_kept_layers(old, plan).items():
        setattr(new, name, value)
    for name in multi_token_fields(old):
        setattr(new, name, 0)
    renumber_config_(new, plan)
    if uneven:
        rows = []
        for shape in after.layers:
            counts = (shape.num_heads, shape.num_kv_heads, shape.intermediate_size)
            named = zip(WIDTHS, counts, strict=True)  # a layer without such units keeps the field
            rows.append({name: count or getattr(old, name, 1) for name, count in named})
        setattr(new, UNEVEN_FIELD, rows)
        return new
    for name, value in _changed_widths(new, after).items():
        setattr(new, name, value)
    return new


def validate(config: PreTrainedConfig, text_config: PreTrainedConfig, plan: Plan) -> None:
    """Refuse a shape that the configuration class refuses or ignores; builds it without weights."""
    if not getattr(text_config, UNEVEN_FIELD, None):
        legal = plan.before.legal_neurons()
        for neurons in plan.after.mlp_widths:
            if neurons not in legal:
                nearest = sorted(sorted(legal, key=lambda count: abs(count - neurons))[:2])
                also = f", or {_FROM_PYTHON}" if plan.before.backbone.can_be_uneven else ""
                raise ImpossiblePlanError(
                    f"plan: {plan.before.model_type!r} cannot be configured with {neurons} neurons "
                    f"in a layer; the nearest that it can have: {', '.join(map(str, nearest))}"
                    + also
                )
    elif not plan.before.backbone.can_be_uneven:
        raise ImpossiblePlanError(
            f"plan: layers of {plan.before.text_type!r} must stay equally wide, since "
            "modeling_pruned.py cannot cut them one by one. Plan with allocation 'uniform'"
        )
    try:
        checked = type(text_config).from_dict(text_config.to_dict())
        whole = with_renumbered(copy.deepcopy(config), checked, plan)
        found = read_anatomy(empty_model(whole))
    except (StrictDataclassError, ValueError, RuntimeError, ZeroDivisionError) as error:
        first_line = str(error).strip().splitlines()[-1]
        raise ImpossiblePlanError(_refusal(plan, first_line)) from error
    if (found.layers, found.backbone_params) != (plan.after.layers, plan.after.backbone_params):
        raise ImpossiblePlanError(
            _refusal(plan, "a model built from the new configuration has other shapes")
        )


def with_renumbered(
    config: PreTrainedConfig, text_config: PreTrainedConfig, plan: Plan
) -> PreTrainedConfig:
    """Change the whole configuration of the original into that of the pruned model."""
    renumber_config_(config, plan)
    return with_text_config(config, text_config)


def multi_token_fields(text_config: Any) -> list[str]:
    """List the set fields of `MULTI_TOKEN_FIELDS`; a pruned checkpoint lacks their weights."""
    return [name for name in MULTI_TOKEN_FIELDS if getattr(text_config, name, None)]


def lost_heads(config: PreTrainedConfig) -> str | None:
    """Describe the multi-token heads that pruning drops; None if there are none."""
    fields = multi_token_fields(text_config_of(config))
    if not fields:
        return None
    return f"multi-token heads: transformers does not read them, so {fields[0]} becomes 0"


def _lists(text_config: Any, names: Sequence[str]) -> list[str]:
    return [name for name in names if getattr(text_config, name, None) is not None]


def _of_kept_layers(old: PreTrainedConfig, plan: Plan) -> dict[str, Any]:
    """Values of per-layer fields for the layers that stay."""
    row, values = plan.before.backbone, old.to_dict()
    lists = {n: [getattr(old, n)[i] for i in plan.layers] for n in _lists(old, row.layer_lists)}
    numbers = {
        name: [new for new, i in enumerate(plan.layers) if i in getattr(old, name)]
        for name in _lists(old, row.layer_indices)
    }
    maps: dict[str, Any] = {}
    for name in row.layer_maps:
        given = {int(index): value for index, value in values.get(name, {}).items()}
        maps[name] = {new: given[i] for new, i in enumerate(plan.layers) if i in given}
    counts = {"num_hidden_layers": len(plan.layers)}
    if row.shared_tail is not None:
        first = old.num_hidden_layers - getattr(old, row.shared_tail)
        counts[row.shared_tail] = sum(index >= first for index in plan.layers)
    return {**counts, **lists, **numbers, **maps}


def _changed_widths(text_config: Any, after: Anatomy) -> dict[str, Any]:
    """Fields whose values differ from the widths of the layers."""
    changed: dict[str, Any] = {}
    for kv_heads, queries_per_group, head_dim in after.attention_shapes:
        heads = {
            "num_attention_heads": kv_heads * queries_per_group,
            "num_key_value_heads": kv_heads,
        }
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


def _retyped(text_config: Any, model_type: str, fields: Any) -> PreTrainedConfig:
    values = text_config.to_dict()
    target = CONFIG_MAPPING[model_type]
    dropped = {"model_type", "architectures", "transformers_version"}
    dropped |= set(values) - set(target().to_dict())
    kept = {name: value for name, value in values.items() if name not in dropped}
    new: PreTrainedConfig = target(**{**kept, **fields})
    new._attn_implementation = text_config._attn_implementation
    return new


def _refusal(plan: Plan, why: str) -> str:
    legal = plan.before.legal_kv_heads()
    counts = [shape[0] for shape in plan.after.attention_shapes] or [0]
    return (
        f"plan: {plan.before.text_type!r} cannot be configured with {counts[0]} KV groups "
        f"({why}). KV groups that it can have: {', '.join(map(str, legal))}, or {_FROM_PYTHON}"
    )
