"""Find the parts of a model: its rows of data, its decoder layers, the matrices of units."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn

from slimvlm.core.errors import UnsupportedModelError
from slimvlm.models.families import (
    BACKBONES,
    FAMILIES,
    TOWERS,
    Backbone,
    Family,
    Projection,
    Stack,
    backbone_row,
    family_row,
)


@dataclass(frozen=True)
class Matrix:
    """Location of a `Projection`'s weight: its module, and the parameter's name there."""

    owner: nn.Module
    name: str
    projection: Projection
    is_of_experts: bool = False  # whether it holds a matrix for each expert

    @property
    def weight(self) -> nn.Parameter:
        """``[O, C]``, or with experts ``[E, O, C]`` (``[E, C, O]`` if transposed)."""
        weight = getattr(self.owner, self.name)
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of a linear module, if it has one."""
        return self.owner.bias if isinstance(self.owner, nn.Linear) else None

    @property
    def width(self) -> int:
        """Channels along the divided dimension."""
        return self.weight.shape[self.projection.axis]


class Parts:
    """The parts of a model, looked up once: its rows of data and its modules."""

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        self.family, self.row = family_of(config.model_type), backbone_of(config)
        self.text_config: Any = text_config_of(config)
        self.text_model: Any = model.get_submodule(self.family.backbone)
        self.layers: nn.ModuleList = getattr(self.text_model, self.row.layers)
        norm = "" if config.model_type in TOWERS else self.row.final_norm  # which a tower lacks
        self.norm: nn.Module = self.text_model.get_submodule(norm)
        self.head: Any = model.get_submodule(self.family.head)
        obeyed = self.text_config if self.family.caps_logits else None
        self.logit_scale: float = getattr(obeyed, "logit_scale", 1.0)
        self.logit_cap: float | None = getattr(obeyed, "final_logit_softcapping", None)

    def token_matrices(self) -> tuple[nn.Embedding, nn.Linear]:
        """Return embedding and head, with a row for each token; tied ones share their weight."""
        embedding = self.text_model.get_submodule("embed_tokens")
        assert isinstance(embedding, nn.Embedding)
        assert isinstance(self.head, nn.Linear)
        return embedding, self.head

    def matrices(self) -> Iterator[tuple[int, Matrix]]:
        """Yield every matrix that units own parts of, experts' too, with its layer's index."""
        for index, layer in enumerate(self.layers):
            attention, mlp, _ = layer_matrices(layer, self.row)
            yield from ((index, matrix) for matrix in (*attention, *mlp))

    def projections(self) -> Iterator[tuple[int, Projection, nn.Linear]]:
        """Yield the linear modules among `matrices`: (layer index, its row of data, the module)."""
        for index, matrix in self.matrices():
            if isinstance(matrix.owner, nn.Linear):
                yield index, matrix.projection, matrix.owner

    def stacks(self) -> Iterator[tuple[Stack, nn.Linear | nn.Embedding]]:
        """Yield the weights outside the layers that hold a slice for each layer."""
        for stack in self.row.layer_stacks:
            module = getattr(self.text_model, stack.path, None)
            if module is not None:
                yield stack, module


def family_of(model_type: str) -> Family:
    """Look up the family row for a configuration's ``model_type``."""
    if (row := family_row(model_type)) is None:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not known. Known: {', '.join(sorted(FAMILIES))}. "
            "docs/add-a-family.md shows how to add one"
        )
    return row


def text_config_of(config: Any) -> Any:
    """Return the part of a configuration that describes the language backbone."""
    family = family_of(config.model_type)
    return config if family.text_config is None else getattr(config, family.text_config)


def backbone_of(config: Any) -> Backbone:
    """Look up the backbone row for a configuration."""
    text_type = text_config_of(config).model_type
    if (row := backbone_row(text_type)) is None:
        raise UnsupportedModelError(
            f"language model type {text_type!r} inside {config.model_type!r} is not known. Known: "
            f"{', '.join(sorted(BACKBONES))}. docs/add-a-family.md shows how to add one"
        )
    return row


def tower_path(config: Any) -> str | None:
    """Return the path of a model's vision tower whose MLPs are known; None without one."""
    kind = getattr(getattr(config, "vision_config", None), "model_type", None)
    return family_of(config.model_type).vision if kind in TOWERS else None


def part_at(model: nn.Module, path: str) -> nn.Parameter | nn.Module | None:
    """Return a module or parameter by its path; None where a model lacks it."""
    part: Any = model
    for step in path.split("."):
        part = getattr(part, step, None)
    return part if isinstance(part, nn.Parameter | nn.Module) else None


def parameters_below(model: nn.Module, path: str) -> list[nn.Parameter]:
    """List parameters below a path, which may itself be a parameter or absent in this model."""
    part = part_at(model, path)
    if isinstance(part, nn.Parameter):
        return [part]
    return [] if part is None else list(part.parameters())


def layer_matrices(
    layer: nn.Module, row: Backbone
) -> tuple[list[Matrix], list[Matrix], list[Matrix]]:
    """Find the matrices of attention and MLP, and what has an entry for each expert, of a layer."""

    def found(wanted: Sequence[Projection]) -> list[Matrix]:
        present, missing = list[Matrix](), list[str]()
        for projection in wanted:
            part = part_at(layer, projection.path)
            if isinstance(part, nn.Linear):
                present.append(Matrix(part, "weight", projection))
            elif isinstance(part, nn.Parameter):
                parent, _, name = projection.path.rpartition(".")
                owner = layer.get_submodule(parent)
                present.append(Matrix(owner, name, projection, is_of_experts=True))
            else:
                missing.append(projection.path)
        if present and missing:
            raise UnsupportedModelError(
                f"{type(layer).__name__} lacks {missing[0]!r}, which its row of families.yaml names"
            )
        return present

    stays_whole = row.whole_mlp_if is not None and attrgetter(row.whole_mlp_if)(layer)
    experts = () if row.experts is None else row.experts.entries
    own = getattr(layer, "self_attn", None)  # with norms over all heads, or a list of them
    is_bound = getattr(own, "qk_norm_type", None) == "olmo"
    is_bound |= type(getattr(own, "q_layernorm", None)).__name__.endswith("PerHead")
    attention, mlp = () if is_bound else row.attention, () if stays_whole else row.mlp
    return found(attention), found(mlp), found(experts)


def context_of(config: Any) -> int | None:
    """Return the most tokens that a model reads; None where its configuration does not say."""
    found = getattr(text_config_of(config), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def shares_keys(config: Any) -> bool:
    """Whether the last layers of a model read keys and values of earlier ones."""
    field = backbone_of(config).shared_tail
    return field is not None and getattr(text_config_of(config), field) > 0
