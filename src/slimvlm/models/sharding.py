"""A model divided among the processes that ``torchrun`` started, by transformers' own FSDP2."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from slimvlm.core.errors import ConfigError
from slimvlm.core.processes import is_first_rank, num_ranks
from slimvlm.models.anatomy import family_of


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


def apply_head(head: Any, inputs: Tensor) -> Tensor:
    """A sharded model's head, once more after its forward pass, which left the weights gathered.

    The module's own hooks would take this for another forward pass of the model's last part.
    """
    return F.linear(inputs, head.weight, head.bias)


@torch.no_grad()
def merge_sharded(trained: Any) -> PreTrainedModel:
    """Add LoRA to the weights of a sharded model, each process to its part, and drop PEFT.

    Every process holds all of LoRA, and the product of its matrices is added in the place of the
    shards.
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
