"""The kept units: a `Plan`, which can be saved, edited by hand and applied again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from slimvlm.core.documents import built, read_object
from slimvlm.core.errors import ConfigError, ImpossiblePlanError, raised_as
from slimvlm.core.files import write_text
from slimvlm.models.anatomy import LAYER_UNITS, WIDTH_UNITS, Anatomy, LayerShape
from slimvlm.models.families import backbone_row, family_row

AXES = ("depth", "width", "both")

Kept = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The kept units of every layer."""

    before: Anatomy
    """The model that the plan is for."""
    layers: Kept
    """Kept layers."""
    kv_groups: tuple[Kept, ...]
    """For each original layer its kept KV groups; empty where the layer is removed."""
    neurons: tuple[Kept, ...]
    """Likewise its kept neurons."""
    axis: str
    """``depth``, ``width`` or ``both``."""
    asked_ratio: float | None = None
    """The requested ratio, None for a plan made by hand."""
    criteria: Mapping[str, str] = field(default_factory=dict)
    """Criterion used for each unit."""
    tokens: Kept | None = None
    """Ids of the kept tokens; None for all."""
    experts: tuple[Kept, ...] = ()
    """For each original layer its kept experts; empty where the layer is removed or has none.
    Without any entry, the kept layers keep all."""
    tower: "Plan | None" = None
    """The kept layers and neurons of the vision tower; None if all of it stays."""

    def __post_init__(self) -> None:
        before = self.before
        _check_tower(self.tower, before)
        if not self.experts:
            counts = [s.num_experts if i in self.layers else 0 for i, s in enumerate(before.layers)]
            object.__setattr__(self, "experts", tuple(tuple(range(count)) for count in counts))
        if self.axis not in AXES:
            raise ConfigError(f"plan: axis {self.axis!r} must be one of: {', '.join(AXES)}")
        if any(len(self.kept(unit)) != before.num_layers for unit in LAYER_UNITS):
            told = f"must have {before.num_layers} entries, one for each original layer"
            raise ConfigError(f"plan: kv_groups, neurons and experts {told}")
        checks = [("layers", self.layers, before.num_layers, self.layers != ())]
        for index, shape in enumerate(before.layers):
            for unit in LAYER_UNITS:
                kept, count = self.kept(unit)[index], shape.units(unit)
                has_some = index in self.layers and count > 0
                checks.append((f"{unit}s[{index}]", kept, count, has_some == bool(kept)))
        known = {(id(row), n): (row, n) for _, row, n, _ in checks}  # layers may share a tuple
        good = {place for place, its in known.items() if _are_indices(*its)}
        for name, kept, count, right_emptiness in checks:
            if not right_emptiness or (id(kept), count) not in good:
                told = f"sorted, unique, below {count}, and empty only where the layer is removed"
                raise ConfigError(f"plan: {name} must be {told}")
        taken = before.experts_per_token
        for index, experts in enumerate(self.experts):
            if 0 < len(experts) < taken:
                told = f"keeps {len(experts)}, but each token takes {taken}"
                raise ImpossiblePlanError(f"plan: experts[{index}] {told}")
        model, why = repr(before.model_type), before.why_tokens_stay
        if self.tokens is not None and why is not None:
            raise ImpossiblePlanError(f"plan: tokens of {model} cannot be removed, since {why}")
        most = before.vocab_size
        if self.tokens is not None and not (self.tokens and _are_indices(self.tokens, most)):
            raise ConfigError(f"plan: tokens must be at least one, sorted, unique and below {most}")
        if missing := sorted(set(before.pinned_layers) - set(self.layers)):
            told = f"layers {missing} of {model} must stay, since {before.why_pinned}"
            raise ImpossiblePlanError(f"plan: {told}")
        for kind in sorted({*before.kinds} - {before.layers[i].kind for i in self.layers}):
            told = f"no layer of {model} with {kind} stays"
            raise ImpossiblePlanError(f"plan: {told}; at least one of {before.kinds[kind]} must")

    @classmethod
    def everything(cls, anatomy: Anatomy) -> "Plan":
        """The plan that removes nothing."""
        every = cache(lambda count: tuple(range(count)))
        groups, neurons = (
            tuple(every(shape.units(unit)) for shape in anatomy.layers) for unit in WIDTH_UNITS
        )
        return cls(anatomy, tuple(range(anatomy.num_layers)), groups, neurons, "both", 0.0)

    def with_units(self, index: int, kept: Mapping[str, Kept]) -> "Plan":
        """Return the plan with other units kept of a layer; kinds that are not named stay."""
        rows: dict[str, Any] = {}
        for unit, units in kept.items():
            row = self.kept(unit)
            rows[f"{unit}s"] = (*row[:index], units, *row[index + 1 :])
        return replace(self, **rows)

    def kept(self, unit: str) -> tuple[Kept, ...]:
        """For each original layer its kept units of a kind."""
        return {"kv_group": self.kv_groups, "neuron": self.neurons, "expert": self.experts}[unit]

    @property
    def tower_layers(self) -> Kept:
        """The kept layers of the vision tower; none without one."""
        return () if self.kept_tower is None else self.kept_tower.layers

    @property
    def tower_neurons(self) -> tuple[Kept, ...]:
        """For each of its original layers the kept neurons."""
        return () if self.kept_tower is None else self.kept_tower.neurons

    @property
    def kept_tower(self) -> "Plan | None":
        """The plan of the tower, where nothing of it goes as well; None without one."""
        whole = self.before.tower
        return self.tower or (None if whole is None else Plan.everything(whole))

    @property
    def shapes(self) -> dict[int, LayerShape]:
        """The kept layers by their original number, with the units that they keep."""
        layers = self._of_kept_tokens.layers
        return {
            index: layers[index].with_units(*(len(self.kept(unit)[index]) for unit in LAYER_UNITS))
            for index in self.layers
        }

    @property
    def after(self) -> Anatomy:
        """The smaller model's anatomy."""
        pinned = tuple(self.layers.index(i) for i in self.before.pinned_layers)
        after = replace(self._narrowed, pinned_layers=pinned)
        read = self.before.num_layers - self.before.unread
        after = replace(after, unread=sum(index >= read for index in self.layers))
        after = replace(after, embedding_params=after.embedding_params - self._lost_in_head)
        if self.tower is not None:
            tower = self.tower.after
            lost = self.tower.before.backbone_params - tower.backbone_params
            vision_params = self.before.vision_params - lost
            after = replace(after, tower=tower, vision_params=vision_params)
        return after.retyped() if self.needs_retype else after

    @property
    def ratio(self) -> float:
        """Share of the backbone's parameters that the plan removes."""
        of_tokens = self.before.backbone_params - self._of_kept_tokens.backbone_params
        lost = self._lost_in_layers + of_tokens + self._lost_in_head
        return lost / self.before.backbone_params

    @property
    def decoder_ratio(self) -> float:
        """Share of the decoder layers' parameters that the plan removes: without embeddings."""
        return self._lost_in_layers / sum(shape.params for shape in self._of_kept_tokens.layers)

    @property
    def cuts_layers(self) -> bool:
        """Whether anything of the decoder layers is removed."""
        return self._lost_in_layers > 0

    @property
    def _lost_in_layers(self) -> int:
        kept = sum(shape.params for shape in self.shapes.values())
        return sum(shape.params for shape in self._of_kept_tokens.layers) - kept

    @property
    def _lost_in_head(self) -> int:
        if not (each := self.before.head_neuron_params):
            return 0
        return (self.before.mlp_widths[-1] - self._narrowed.mlp_widths[-1]) * each

    @property
    def _of_kept_tokens(self) -> Anatomy:
        return self.before if self.tokens is None else self.before.with_tokens(len(self.tokens))

    @property
    def _narrowed(self) -> Anatomy:
        return self._of_kept_tokens.with_layers(list(self.shapes.values()))

    @property
    def needs_retype(self) -> bool:
        """Whether the head count needs the freer configuration type of the backbone's row."""
        after = self._narrowed
        if not self.before.retypable or not after.is_uniform:
            return False
        return self.before.hidden_size % after.layers[0].num_heads != 0

    @property
    def file_format(self) -> Literal["native", "uneven"]:
        """How the model is written: plainly, or with the Python file for layers' own widths."""
        after, before = self._narrowed, self.before
        is_legal = after.is_uniform
        if is_legal and after.mlp_widths:
            is_legal = after.mlp_widths[0] in before.legal_neurons()
        if is_legal and after.attention_shapes:
            kv_heads, queries_per_group, head_dim = after.attention_shapes[0]
            if before.backbone.head_rule == "fixed":
                is_legal = kv_heads * queries_per_group * head_dim == before.hidden_size
            else:
                is_legal = kv_heads in before.legal_kv_heads()
        return "native" if is_legal else "uneven"

    def summary(self) -> str:
        """Describe in one line what is removed and kept, and what loading needs."""
        groups = sorted({len(self.kv_groups[i]) for i in self.layers} - {0})
        neurons = sorted({len(self.neurons[i]) for i in self.layers} - {0})
        asked = "" if self.asked_ratio is None else f" (requested {self.asked_ratio:.2%})"
        others = ""
        if (fewer := self._narrowed.expert_counts) and fewer != self.before.expert_counts:
            others = f", {_span(fewer)} of {_span(self.before.expert_counts)} experts"
        stay = self._narrowed.kinds
        for kind, count in self.before.kinds.items():
            if len(stay) > 1 and 2 * stay[kind] <= count:
                others += f", only {stay[kind]} of {count} layers with {kind}"
        if self.tokens is not None:
            others += f", {len(self.tokens):,} of {self.before.vocab_size:,} vocabulary tokens"
        if self.file_format == "uneven":
            others += "; layers of different widths: needs trust_remote_code=True"
        layers = f"{len(self.layers)} of {self.before.num_layers} layers"
        widths = f"{_span(groups)} KV groups and {_span(neurons)} neurons per layer"
        if (tower := self.tower) is not None:
            spans = [_span(each.mlp_widths) for each in (tower.after, tower.before)]
            kept = f"{len(tower.layers)} of {tower.before.num_layers} layers"
            others += f"; removes {tower.ratio:.2%} of the vision tower, which keeps {kept}"
            others += f" with {spans[0]} of {spans[1]} neurons"
        removed = f"removes {self.ratio:.2%} of the backbone{asked}"
        return f"{removed}; keeps {layers}, {widths}{others}"

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values, for JSON."""
        rows = (f"{unit}s" for unit in LAYER_UNITS)
        names = ("axis", "asked_ratio", "ratio", "criteria", "layers", *rows, "tokens")
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        values["criteria"] = dict(self.criteria)
        values["tower"] = None if self.tower is None else self.tower.to_dict()
        return {"format": "slimvlm-plan/1", **values, "before": asdict(self.before)}

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        write_text(Path(path), json.dumps(self.to_dict()) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan, which may be edited by hand; raise ConfigError if it is not possible."""
        return cls.from_dict(read_object(path, "plan"), f"plan {str(path)!r}")

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "plan") -> "Plan":
        """Make a plan of the values that `to_dict` gives; ``where`` begins error messages."""
        return cls._of_file(built(PlanFile, values, where), where)

    @classmethod
    def _of_file(cls, file: "PlanFile", where: str) -> "Plan":
        before = file.before
        if family_row(before.model_type) is None or backbone_row(before.text_type) is None:
            kinds = f"{before.model_type!r} and {before.text_type!r}"
            raise ConfigError(f"{where}: before names the unknown model types {kinds}")
        impossible = [
            s
            for s in before.layers
            if (s.num_kv_heads and not s.queries_per_group)
            or s.num_experts * s.expert_neuron_params > s.neuron_params
            or (s.num_experts and before.backbone.experts is None)
        ]
        tower = before.tower
        if tower is not None and (
            family_row(tower.model_type) is None or tower.unread >= len(tower.layers)
        ):
            impossible = [*tower.layers]
        if impossible or (before.retypable and before.backbone.retype is None):
            raise ConfigError(f"{where}: before describes no {before.model_type!r} that there is")
        values = {each.name: getattr(file, each.name) for each in fields(cls)}
        if file.tower is not None:
            with raised_as(ConfigError, ConfigError, f"{where}: tower:"):
                values["tower"] = cls._of_file(file.tower, where)
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class PlanFile:
    """What `Plan.save` writes."""

    format: Literal["slimvlm-plan/1"]
    axis: Literal["depth", "width", "both"]
    asked_ratio: Annotated[float, Field(ge=0, lt=1)] | None
    ratio: float
    criteria: Mapping[str, str]
    layers: Kept
    kv_groups: tuple[Kept, ...]
    neurons: tuple[Kept, ...]
    before: Anatomy
    tokens: Kept | None = None
    experts: tuple[Kept, ...] = ()
    tower: "PlanFile | None" = None


def _check_tower(tower: Plan | None, before: Anatomy) -> None:
    """Refuse a tower's plan that is for another one or that no configuration can express."""
    if tower is None:
        return
    if tower.before != before.tower:
        raise ConfigError("plan: tower is for another vision tower")
    if why := why_tower_stays(before):
        raise ImpossiblePlanError(f"plan: {why}")
    if len({len(tower.neurons[index]) for index in tower.layers}) > 1:
        raise ImpossiblePlanError("plan: all layers of the vision tower must be equally wide")


def why_tower_stays(anatomy: Anatomy) -> str:
    """Say why nothing of a model's vision tower can be removed; empty if something can."""
    if anatomy.tower is not None:
        why, kind = anatomy.tower.backbone.why_whole, anatomy.tower.model_type
        return "" if why is None else f"the vision tower {kind!r} must stay whole: {why}"
    if anatomy.vision_params:
        return f"the layers of {anatomy.model_type!r}'s vision tower are not known"
    return f"{anatomy.model_type!r} has no vision tower"


def _are_indices(kept: Sequence[Any], count: int) -> bool:
    if not set(map(type, kept)) <= {int} or list(kept) != sorted(set(kept)):
        return False
    return not kept or 0 <= kept[0] <= kept[-1] < count


def _span(values: Sequence[Any]) -> str:
    ends = dict.fromkeys((*values[:1], *values[-1:]))
    return "-".join(f"{value:,}" for value in ends) or "0"
