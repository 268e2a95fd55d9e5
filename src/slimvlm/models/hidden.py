"""Run models, also those divided among processes (FSDP2), without the logits of all positions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from slimvlm.core.errors import NumericalError
from slimvlm.core.progress import is_first_rank
from slimvlm.models.devices import weight_of
from slimvlm.models.losses import Head
from slimvlm.models.parts import Parts


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the hidden states among the arguments of a decoder layer's call."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def main_stream(hidden: Tensor) -> Tensor:
    """Return ``[B, T, D]`` of what may be several streams ``[S, B, T, D]`` (AltUp of Gemma 3n)."""
    return hidden[0] if hidden.ndim == 4 else hidden


def layer_output(output: Any) -> Tensor:
    """Return the hidden states of a decoder layer's output: alone, or first in a tuple."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode inside, and each of its modules back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters inside, and put their ``requires_grad`` flags back afterwards."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_()


def device_of(model: nn.Module) -> torch.device:
    """Find the device of inputs: the first weights', or the one of a ``device_map``."""
    sent_to = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    if sent_to is not None:
        return torch.device(sent_to)
    devices = (p.device for p in model.parameters() if not p.is_meta)  # some may lie in files
    return next(devices, torch.device("cpu"))


def as_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Move the tensors among inputs to the model's device, and images to its data type."""
    moved, device = dict(inputs), device_of(model)
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            moved[name] = value.to(device, model.dtype if value.is_floating_point() else None)
    return moved


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else inside; its hooks run as before."""
    own = vars(module).get("forward")  # where accelerate or another replacement has put one
    try:
        setattr(module, "forward", forward)  # noqa: B010
        yield
    finally:
        delattr(module, "forward")
        if own is not None:
            setattr(module, "forward", own)  # noqa: B010


def all_finite(values: Tensor) -> bool:
    """Whether there is neither NaN nor infinity, from the extremes, without a copy."""
    extremes = values.detach().aminmax() if values.numel() else ()
    return all(bool(torch.isfinite(value)) for value in extremes)


def require_finite_values(values: Tensor, where: str) -> None:
    """Raise `NumericalError` if NaN or infinity is among values; ``where`` is for the message."""
    if not all_finite(values):
        raise NumericalError(f"NaN or infinity in {where}")


def hidden_states(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layers: Sequence[int] = (),
    runner: nn.Module | None = None,
) -> list[Float[Tensor, "B T D"]]:
    """Compute the hidden state after the last norm, and those after some (ascending) layers."""
    caught: dict[int, Tensor] = {}
    parts = Parts(model)
    modules = [*(parts.layers if layers else ()), parts.norm]
    wanted = (len(modules) - 1, *layers)

    def catch(index: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for layer in layers:
            if layer < index:  # one that did not run changes nothing
                caught.setdefault(layer, main_stream(layer_input(args, kwargs)))
        if index in wanted:
            caught[index] = main_stream(layer_output(output))

    with ExitStack() as stack:
        for index, module in enumerate(modules):
            hook = module.register_forward_hook(partial(catch, index), with_kwargs=True)
            stack.enter_context(hook)
        if isinstance(runner, DistributedDataParallel):
            runner(**inputs, use_cache=False, logits_to_keep=1)
        elif is_sharded(model):  # its own forward pass gathers the weights
            model(**inputs, use_cache=False, logits_to_keep=1)
        else:
            if hasattr(model, "ct_decompress_hook"):
                # compressed-tensors decompresses when the whole model is called; this is a part
                quantizer: Any = model.hf_quantizer
                quantizer.compressor.decompress_model(model)
            model.base_model(**inputs, use_cache=False)
    return [caught[index] for index in wanted]


def head_of(model: PreTrainedModel) -> Head:
    """Return the language-model head as a function, with Cohere 2's scale and Gemma 2's cap."""
    parts = Parts(model)
    module, scale, cap = parts.head, parts.logit_scale, parts.logit_cap
    head: Head = module
    if is_sharded(model):
        # the pass before left its weights gathered; its hooks would start another forward pass
        head = lambda hidden: F.linear(hidden, module.weight, module.bias)  # noqa: E731
    if scale == 1 and cap is None and len(set(getattr(model, "hf_device_map", {}).values())) < 2:
        return head
    # a tied head may lie on another device than the final norm
    return lambda hidden: _capped(head(hidden).to(hidden.device), scale, cap)


@dataclass(frozen=True)
class HeadWeights:
    """The function of `head_of` without its model: matrix, bias, factor of logits, soft cap."""

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Compute logits."""
        return _capped(F.linear(hidden, self.weight, self.bias), self.scale, self.cap)


def head_on(device: torch.device, head: Head) -> Head:
    """Move weights of a head to a device; the head of a model in memory stays there."""
    if not isinstance(head, HeadWeights):
        return head
    bias = None if head.bias is None else head.bias.to(device)
    return replace(head, weight=head.weight.to(device), bias=bias)


def head_weights_of(model: PreTrainedModel) -> HeadWeights:
    """Return the head of a model in memory that is not sharded. Its tensors are the model's own."""
    parts = Parts(model)
    bias: Tensor | None = None if parts.head.bias is None else parts.head.bias.detach()
    return HeadWeights(weight_of(parts.head), bias, parts.logit_scale, parts.logit_cap)


def _capped(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    if scale != 1:
        logits = logits * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are divided among processes."""
    from transformers.distributed.fsdp import is_fsdp_managed_module

    return bool(is_fsdp_managed_module(model))


def hold_in_(model: PreTrainedModel, dtype: torch.dtype, learning_only: bool = False) -> None:
    """Cast parameters, unless sharded; buffers such as rotary frequencies stay exact."""
    if is_sharded(model):
        return
    for parameter in model.parameters():
        if parameter.requires_grad or not learning_only:
            parameter.data = parameter.data.to(dtype)


def gathered_weights(sharded: PreTrainedModel) -> dict[str, Tensor]:
    """Gather a sharded model's weights on the first process's CPU; all processes must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    reshard(sharded)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(sharded, options=options)
    return weights if is_first_rank() else {}


def reshard(model: nn.Module) -> None:
    """Free the weights that a pass has left gathered."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
