"""Where the parts of a model are: its rows of data, its decoder layers, the matrices of units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn

from slimvlm.core.errors import UnsupportedModelError
from slimvlm.models.families import BACKBONES, FAMILIES, Backbone, Family, Projection, Stack


@dataclass(frozen=True)
class Matrix:
    """Where the weight of a `Projection` lives: in a linear module, or a parameter by itself.

    Attributes:
        owner: The module that holds the parameter.
        name: The parameter's name in it.
        projection: Its row of data.
    """

    owner: nn.Module
    name: str
    projection: Projection

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
    def is_of_experts(self) -> bool:
        """Whether it holds a matrix for each expert; one that neurons or KV groups divide."""
        return not isinstance(self.owner, nn.Linear)

    @property
    def width(self) -> int:
        """Channels along the divided dimension."""
        return self.weight.shape[self.projection.axis]


def family_of(model_type: str) -> Family:
    """The family row for a configuration's ``model_type``.

    Raises:
        UnsupportedModelError: If there is none; the message lists the known ones.
    """
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not known. Known: {known}. "
            "docs/add-a-family.md shows how to add one"
        )
    return FAMILIES[model_type]


def text_config_of(config: Any) -> Any:
    """The part of a configuration that describes the language backbone."""
    family = family_of(config.model_type)
    return config if family.text_config is None else getattr(config, family.text_config)


def backbone_of(config: Any) -> Backbone:
    """The backbone row for a configuration.

    Raises:
        UnsupportedModelError: If the language model's type has no row.
    """
    text_type = text_config_of(config).model_type
    if text_type not in BACKBONES:
        known = ", ".join(sorted(BACKBONES))
        raise UnsupportedModelError(
            f"language model type {text_type!r} inside {config.model_type!r} is not known. "
            f"Known: {known}. docs/add-a-family.md shows how to add one"
        )
    return BACKBONES[text_type]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers of a model."""
    layers = model.get_submodule(family_of(_config(model).model_type).backbone).layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def final_norm(model: nn.Module) -> nn.Module:
    """The norm after the last decoder layer."""
    config = _config(model)
    text_model = model.get_submodule(family_of(config.model_type).backbone)
    return text_model.get_submodule(backbone_of(config).final_norm)


def token_matrices(model: nn.Module) -> tuple[nn.Embedding, nn.Linear]:
    """The embedding and the head, which have a row for each token; tied ones share their weight."""
    family = family_of(_config(model).model_type)
    embedding = model.get_submodule(family.backbone).get_submodule("embed_tokens")
    head = model.get_submodule(family.head)
    assert isinstance(embedding, nn.Embedding)
    assert isinstance(head, nn.Linear)
    return embedding, head


def matrices(model: nn.Module) -> Iterator[tuple[int, Matrix]]:
    """Every weight matrix that units own parts of, experts' too, with its layer's index."""
    row = backbone_of(_config(model))
    for index, layer in enumerate(decoder_layers(model)):
        for of_unit in unit_matrices(layer, row):
            yield from ((index, matrix) for matrix in of_unit)


def stacks(model: nn.Module) -> Iterator[tuple[Stack, nn.Linear | nn.Embedding]]:
    """The weights outside the layers that hold a slice for each layer."""
    text_model = model.get_submodule(family_of(_config(model).model_type).backbone)
    for stack in backbone_of(_config(model)).layer_stacks:
        module = getattr(text_model, stack.path, None)
        if module is not None:
            yield stack, module


def projections(model: nn.Module) -> Iterator[tuple[int, Projection, nn.Linear]]:
    """The linear modules among `matrices`: (layer index, its row of data, the module)."""
    for index, matrix in matrices(model):
        if isinstance(matrix.owner, nn.Linear):
            yield index, matrix.projection, matrix.owner


def part_at(model: nn.Module, path: str) -> nn.Parameter | nn.Module | None:
    """A module or parameter by its path; None where a model lacks it."""
    parent, _, name = path.rpartition(".")
    part = getattr(model.get_submodule(parent), name, None)
    return part if isinstance(part, nn.Parameter | nn.Module) else None


def parameters_below(model: nn.Module, path: str) -> list[nn.Parameter]:
    """Parameters below a path, which may itself be a parameter or absent in this model."""
    part = part_at(model, path)
    if isinstance(part, nn.Parameter):
        return [part]
    return [] if part is None else list(part.parameters())


def matrices_of(layer: nn.Module, wanted: Sequence[Projection]) -> list[Matrix]:
    """The matrices of a layer for some rows of data: all of them or none.

    Raises:
        UnsupportedModelError: If the layer has some of them only.
    """
    found = [_matrix(layer, projection) for projection in wanted]
    present = [matrix for matrix in found if matrix is not None]
    if present and len(present) < len(found):
        missing = wanted[found.index(None)].path
        raise UnsupportedModelError(
            f"{type(layer).__name__} has no {missing!r}, which its row of families.py names"
        )
    return present


def _matrix(layer: nn.Module, projection: Projection) -> Matrix | None:
    parent, _, name = projection.path.rpartition(".")
    owner: Any = layer
    for step in parent.split("."):
        owner = getattr(owner, step, None)
    part = getattr(owner, name, None)
    if isinstance(part, nn.Linear):
        return Matrix(part, "weight", projection)
    return Matrix(owner, name, projection) if isinstance(part, nn.Parameter) else None


def unit_matrices(layer: nn.Module, row: Backbone) -> tuple[list[Matrix], list[Matrix]]:
    """The matrices of a layer that KV groups own parts of, and those of neurons.

    Raises:
        UnsupportedModelError: If the layer has some of a row's matrices only.
    """
    stays_whole = row.whole_mlp_if is not None and attrgetter(row.whole_mlp_if)(layer)
    return matrices_of(layer, row.attention), [] if stays_whole else matrices_of(layer, row.mlp)


def expert_entries(layer: nn.Module, row: Backbone) -> list[Matrix]:
    """Everything in a layer that has an entry for each expert; empty if it has no experts.

    Raises:
        UnsupportedModelError: If the layer has some of it only.
    """
    return [] if row.experts is None else matrices_of(layer, row.experts.entries)


def _config(model: nn.Module) -> Any:
    return model.config


def context_of(config: Any) -> int | None:
    """Tokens that a model reads at most; None where its configuration does not say."""
    found = getattr(text_config_of(config), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def hands_on(config: Any) -> bool:
    """Whether the last layers of a model read keys and values of earlier ones."""
    field = backbone_of(config).shared_tail
    return field is not None and getattr(text_config_of(config), field) > 0
