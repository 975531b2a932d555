"""FSDP: processes that hold a part of each weight, by accelerate and PyTorch's `fully_shard`. A layer is whole only
while it computes, so all processes must run the same layers in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import Tensor, nn

from ..errors import BitDanceError, format_bytes
from .settings import ADAMW8BIT

# accelerate's settings that are not supported, and what to do instead
REFUSED = {
    "FSDP_OFFLOAD_PARAMS": "set fsdp_offload_params: false; --quantize takes less memory",
    "FSDP_ACTIVATION_CHECKPOINTING": "set fsdp_activation_checkpointing: false, and use --checkpoint-layers",
}


def plugin_for(optimizer: str) -> FullyShardedDataParallelPlugin | None:
    """Return how accelerate is to split weights, if it is set to FSDP. Raises BitDanceError for other ways of it."""
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":  # accelerate's own default is 1
        raise BitDanceError("accelerate is set to the first FSDP, which PyTorch has replaced; set fsdp_version: 2")
    for name, remedy in REFUSED.items():
        if parse_flag_from_env(name):
            raise BitDanceError(f"accelerate is set to {name}, which is not supported here; {remedy}")
    if optimizer == ADAMW8BIT:
        raise BitDanceError(f"--optimizer {ADAMW8BIT} cannot keep moments of split weights; leave it out with FSDP")
    from torch.distributed.fsdp import MixedPrecisionPolicy  # some builds of PyTorch have no processes

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        mixed_precision_policy=MixedPrecisionPolicy(),  # gradients are summed in float32; autocast casts weights
        cpu_ram_efficient_loading=False,  # every process reads the files
    )
    plugin.transformer_cls_names_to_wrap = None  # but those that the objective names
    return plugin


def is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def check_sharded(accelerator: Accelerator) -> None:
    """Raise BitDanceError if accelerate does not split weights although it is set to."""
    if not is_sharded(accelerator):
        raise BitDanceError(
            "accelerate is set to FSDP, which it has for several processes on GPUs alone; start them with "
            "`accelerate launch`, or choose multi-GPU or multi-CPU in `accelerate config`"
        )


def let_call(objective: nn.Module) -> None:
    """Let an objective's method `call` find its weights whole, as its forward pass does."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    register_fsdp_forward_method(objective, "call")


def gathered(tensor: Tensor) -> Tensor:
    """Return a tensor whole, on the CPU if it was split: then every process must call it."""
    return tensor.full_tensor().cpu() if hasattr(tensor, "full_tensor") else tensor


def gathered_all(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Return tensors whole, or nothing without `keep`: processes that only take part hold one tensor at a time."""
    result = {}
    for name, tensor in tensors.items():
        whole = gathered(tensor)
        if keep:
            result[name] = whole
    return result


def placed_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Copy a whole tensor to where a parameter is; of one that is split, this process's part."""
    tensor = tensor.to(parameter.device).clone()
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def report(objective: nn.Module, processes: int) -> str:
    """Say how much of the weights this process holds."""
    from torch.distributed.fsdp import FSDPModule

    parameters = list(objective.parameters())
    held = sum(p.to_local().nbytes if hasattr(p, "to_local") else p.nbytes for p in parameters)
    total = sum(p.numel() * p.itemsize for p in parameters)
    parts = sum(isinstance(module, FSDPModule) for module in objective.modules())
    return f"each of {processes} processes holds {format_bytes(held)} of {format_bytes(total)}, in {parts} parts"
