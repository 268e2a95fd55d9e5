"""Hooks that captures share: on inputs of the writing matrices, on gradients of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from slimvlm.families import INPUT_COLUMNS, Projection
from slimvlm.geometry import projections


def consumers(model: nn.Module) -> Iterator[tuple[int, Projection, nn.Linear]]:
    """Every matrix that writes to the residual stream: its input columns belong to units."""
    for index, projection, linear in projections(model):
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


@contextmanager
def hooked_weights(
    model: nn.Module, on_gradient: Callable[[str, int, Tensor], None]
) -> Iterator[None]:
    """Only the matrices that units own get gradients; each is handed over as soon as it is there.

    ``on_gradient(name, divided dimension, weight)`` must free ``weight.grad`` when done with it.
    """
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        for index, projection, linear in projections(model):
            linear.weight.requires_grad_(True)
            call = partial(on_gradient, f"{index}.{projection.path}", projection.dim)
            stack.callback(linear.weight.register_post_accumulate_grad_hook(call).remove)
            stack.callback(setattr, linear.weight, "grad", None)
        yield
