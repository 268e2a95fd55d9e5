"""Hooks that captures share: on inputs of the writing matrices, on gradients of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from slimvlm.core.errors import UnsupportedModelError
from slimvlm.models.anatomy import decoder_layers, matrices
from slimvlm.models.families import INPUT_COLUMNS, Projection
from slimvlm.models.hidden import layer_input, with_layer_input


def hookable(model: nn.Module) -> Iterator[tuple[int, Projection, nn.Linear]]:
    """Every matrix that units own parts of: (layer index, its row of data, the module).

    Raises:
        UnsupportedModelError: If one belongs to experts, which are no modules that hooks could see.
    """
    for index, matrix in matrices(model):
        if not isinstance(matrix.owner, nn.Linear):
            raise UnsupportedModelError(
                f"layer {index} has experts ({matrix.projection.path!r}), whose inputs and "
                "gradients no hook sees: score width by magnitude or random, or prune depth"
            )
        yield index, matrix.projection, matrix.owner


def consumers(model: nn.Module) -> Iterator[tuple[int, Projection, nn.Linear]]:
    """Every matrix that writes to the residual stream: its input columns belong to units.

    Raises:
        UnsupportedModelError: If one belongs to experts.
    """
    for index, projection, linear in hookable(model):
        if projection.dim == INPUT_COLUMNS:
            yield index, projection, linear


@contextmanager
def on_consumers(
    model: nn.Module, call: Callable[[int, Projection, Tensor], Tensor | None]
) -> Iterator[None]:
    """Hook the input of every matrix that writes to the residual stream.

    ``call(layer index, projection, input)`` may return another input.
    """

    def before(index: int, projection: Projection, module: nn.Module, args: Any) -> Any:
        changed = call(index, projection, args[0])
        return None if changed is None else (changed,)

    with ExitStack() as stack:
        for index, projection, linear in consumers(model):
            hook = linear.register_forward_pre_hook(partial(before, index, projection))
            stack.callback(hook.remove)
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter needs a gradient inside; flags are put back afterwards."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@dataclass(frozen=True)
class Product:
    """A matrix that units own a part of, in a backward pass.

    The gradient of sample ``j`` is ``dy[j]ᵀ x[j]``. It is left to the receiver to compute it, whole
    or in parts.

    Attributes:
        name: ``<layer index>.<path of the matrix>``.
        dim: The dimension that units divide.
        weight: ``[O, I]``.
        x: ``[B, T, I]`` its input.
        dy: ``[B, T, O]`` gradient of its output.
    """

    name: str
    dim: int
    weight: Tensor
    x: Tensor
    dy: Tensor


@contextmanager
def on_products(model: nn.Module, call: Callable[[Product], None]) -> Iterator[None]:
    """Hand over every matrix that units own as soon as the backward pass has come to it.

    No parameter needs or gets a gradient: they are flags that are put back afterwards.
    """
    inputs: dict[str, Tensor] = {}

    def start(module: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden = layer_input(args, kwargs)
        if hidden.requires_grad:
            return None
        return with_layer_input(args, kwargs, hidden.detach().requires_grad_())

    def after(name: str, dim: int, module: nn.Linear, args: Any, output: Tensor) -> None:
        inputs[name] = args[0].detach()

        def on_gradient(dy: Tensor) -> None:
            call(Product(name, dim, weight_of(module), inputs.pop(name), dy))

        if output.requires_grad:
            output.register_hook(on_gradient)

    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        first = decoder_layers(model)[0].register_forward_pre_hook(start, with_kwargs=True)
        stack.callback(first.remove)
        for index, projection, linear in hookable(model):
            name = f"{index}.{projection.path}"
            hook = linear.register_forward_hook(partial(after, name, projection.dim))
            stack.callback(hook.remove)
        yield


def weight_of(owner: Any, name: str = "weight") -> Tensor:
    """A parameter, also where accelerate has put it aside until its module runs."""
    weight: Tensor = getattr(owner, name).detach()
    return owner._hf_hook.weights_map[name] if weight.is_meta else weight
