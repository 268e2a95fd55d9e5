"""Inputs of a matrix, kept so that the modules before it need not run again.

C input channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from slimvlm.models.hidden import replaced_forward

MOST_BYTES = 2**29
"""Inputs of a matrix that are kept at most; more are computed again."""


def most_kept(free: float) -> float:
    """Bytes of a matrix's inputs that are kept at most, where so many are free."""
    return min(MOST_BYTES, free / 8)


@dataclass(frozen=True)
class KeptInputs:
    """The inputs of the matrix that a block, attention or MLP, ends with."""

    block: nn.Module  # returns the output of the matrix
    linear: nn.Linear  # the matrix, as it is when it is asked
    extra: int  # further outputs of the block, all of them None
    values: dict[int, Float[Tensor, "... C"]]  # inputs of the matrix, by batch
    held: Callable[[Tensor], Tensor]  # puts a tensor where the values are kept

    @contextmanager
    def replayed(self, place: int) -> Iterator[None]:
        """Let the block compute only its last matrix, for one batch."""

        def answer(*args: Any, **kwargs: Any) -> Any:
            output = self.linear(self.values[place].to(self.linear.weight.device))
            return (output, *[None] * self.extra) if self.extra else output

        with replaced_forward(self.block, answer):
            yield

    def cut_(self, keep: Int[Tensor, " K"]) -> None:
        """Keep some channels only."""
        for place, value in self.values.items():
            self.values[place] = self.held(value.to(keep.device)[..., keep])


def extra_outputs(block: nn.Module, linear: nn.Linear, run: Callable[[], Any]) -> int | None:
    """Count a block's further outputs as ``run`` runs it; None if it ends with another matrix."""
    given: list[Any] = []
    with ExitStack() as stack:
        for module in (linear, block):
            stack.enter_context(
                module.register_forward_hook(lambda module, args, output: given.append(output))
            )
        run()
    of_linear, of_block = given[0], given[-1]
    if len(given) > 2:
        return None
    first, *others = of_block if isinstance(of_block, tuple) else (of_block,)
    is_that = first is of_linear and all(other is None for other in others)
    return len(others) if is_that else None
