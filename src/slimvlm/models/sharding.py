"""A model divided among the processes that ``torchrun`` started, by transformers' own FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from slimvlm.core.errors import ConfigError
from slimvlm.core.processes import is_first_rank, num_ranks
from slimvlm.models.parts import family_of


def shard_config(config: PreTrainedConfig) -> Any:
    """What ``from_pretrained`` needs to divide a model among all processes.

    Each decoder layer is gathered when it runs; everything else is gathered once for each step.

    Raises:
        ConfigError: If there is one process alone.
    """
    from transformers.distributed.configuration_utils import DistributedConfig

    if num_ranks() < 2:
        raise ConfigError("shard needs several processes: start the command with torchrun")
    layers = f"{family_of(config.model_type).backbone}.layers.*"
    return DistributedConfig(fsdp_size=num_ranks(), fsdp_plan={layers: "free_full_weight"})


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are divided among processes."""
    from transformers.distributed.fsdp import is_fsdp_managed_module

    return bool(is_fsdp_managed_module(model))


@dataclass(frozen=True)
class Whole:
    """A model that lies in one piece in this process's memory."""

    model: PreTrainedModel

    def run(self, inputs: Mapping[str, Any]) -> None:
        """Run all but the head, which would only be in the way."""
        if hasattr(self.model, "ct_decompress_hook"):
            # compressed-tensors widens weights when the whole model is called, and this is a part
            quantizer: Any = self.model.hf_quantizer
            quantizer.compressor.decompress_model(self.model)
        self.model.base_model(**inputs, use_cache=False)

    def head(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """The module itself."""
        return module

    def move_(self, device: torch.device) -> None:
        """Put the weights on a device."""
        self.model.to(device)  # type: ignore[arg-type]

    def hold_in_(self, dtype: torch.dtype, learning_only: bool = False) -> None:
        """Hold parameters in a data type; buffers such as rotary frequencies stay exact."""
        for parameter in self.model.parameters():
            if parameter.requires_grad or not learning_only:
                parameter.data = parameter.data.to(dtype)

    def merge_lora(self, trained: Any) -> PreTrainedModel:
        """As PEFT does."""
        plain: PreTrainedModel = trained.merge_and_unload()
        return plain


@dataclass(frozen=True)
class Sharded:
    """A model whose weights are divided among processes: they stay where and what they are."""

    model: PreTrainedModel

    def run(self, inputs: Mapping[str, Any]) -> None:
        """Run the model's own forward pass, which gathers the weights, with one row of logits."""
        self.model(**inputs, use_cache=False, logits_to_keep=1)

    def head(self, module: Any) -> Callable[[Tensor], Tensor]:
        """The head once more after the forward pass, which left its weights gathered.

        The module's own hooks would take this for another forward pass of the model's last part.
        """
        return lambda inputs: F.linear(inputs, module.weight, module.bias)

    def move_(self, device: torch.device) -> None:
        """Nothing: shards lie where they belong."""

    def hold_in_(self, dtype: torch.dtype, learning_only: bool = False) -> None:
        """Nothing: shards keep the data type that they were read in."""

    @torch.no_grad()
    def merge_lora(self, trained: Any) -> PreTrainedModel:
        """Each process adds LoRA to its part.

        Every process holds all of LoRA, and the product of its matrices is added in the place of
        the shards.
        """
        from peft.tuners.lora import Linear as LoraLinear
        from torch.distributed.tensor import distribute_tensor

        _reshard(trained)
        for module in trained.modules():
            if isinstance(module, LoraLinear):
                weight: Any = module.get_base_layer().weight
                for name in module.active_adapters:
                    change = module.get_delta_weight(name).to(weight.dtype)
                    shards = distribute_tensor(change, weight.device_mesh, weight.placements)
                    weight.data.add_(shards)
        plain: PreTrainedModel = trained.unload()
        return plain


def placement_of(model: PreTrainedModel) -> Whole | Sharded:
    """How to run and change a model, by where its weights lie."""
    return Sharded(model) if is_sharded(model) else Whole(model)


def gathered_weights(sharded: PreTrainedModel) -> dict[str, Tensor]:
    """A sharded model's whole weights on the CPU of the first process, nothing on the others.

    All processes must call it.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    _reshard(sharded)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(sharded, options=options)
    return weights if is_first_rank() else {}


def fill_(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Put gathered weights into the same model, whole, in its own data type."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= set(model.all_tied_weights_keys or {}), missing


def _reshard(model: nn.Module) -> None:
    """Let go of weights that a forward pass gathered."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
