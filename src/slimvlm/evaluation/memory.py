"""What the tensors of a live model take in memory: its weights, and the peak of a run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


def stored_bytes(*modules: nn.Module) -> int:
    """Bytes of all weights and of what stands beside quantised ones (scales); shared ones once."""
    tensors = (tensor for module in modules for tensor in _state(module))
    storages = (part.untyped_storage() for tensor in tensors for part in _plain_parts(tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class PeakMemory(TorchDispatchMode):
    """Counts bytes of the tensors that operations make while it is active, and their peak.

    It sees every tensor on every device, but not what a kernel allocates for itself. Operations are
    slow meanwhile.

    Attributes:
        peak_bytes: Most bytes that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._alive_bytes = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._weights: set[int] = set()

    def without(self, model: nn.Module) -> PeakMemory:
        """Do not count a model's weights when operations return views of them."""
        tensors = (part for tensor in _state(model) for part in _plain_parts(tensor))
        self._weights = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        return self

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation and count what it made."""
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                for part in _plain_parts(value):
                    self._count(part.untyped_storage())
        return result

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop counting."""
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._known.clear()

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known or storage.data_ptr() in self._weights:
            return
        self._known.add(storage)
        self._alive_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._alive_bytes)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, num_bytes: int) -> None:
        self._alive_bytes -= num_bytes


def _state(module: nn.Module) -> Iterator[Tensor]:
    """Tensors that a checkpoint would hold; for quantised modules that is more than parameters."""
    for value in module.state_dict().values():
        if isinstance(value, Tensor):
            yield value


def _plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _plain_parts(getattr(tensor, name))
