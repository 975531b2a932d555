"""From a checkpoint's files to modules of ComfyUI's layers: checked against the core first, then loaded its way."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from torch import Tensor, nn

from ...bitdance_core.checkpoint import Component
from ...bitdance_core.weights import check_tensors

SUPPORTED = [torch.bfloat16, torch.float32]  # the head's numbers leave float16's range
WEIGHT_DTYPES = {"default": None, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """What weights are stored as, and what they are cast to at every use (None: used as they are)."""

    storage: torch.dtype
    cast: torch.dtype | None

    @property
    def compute(self) -> torch.dtype:
        return self.cast or self.storage

    @property
    def operations(self) -> ModuleType | type:
        return comfy.ops.disable_weight_init if self.cast is None else comfy.ops.manual_cast


def choose_precision(weights: dict[str, Tensor], requested: torch.dtype | None) -> Precision:
    """As ComfyUI chooses for its own models, between the types that BitDance can be computed in."""
    device = mm.get_torch_device()
    parameters = comfy.utils.calculate_parameters(weights)
    storage = requested or mm.unet_dtype(device, parameters, SUPPORTED, comfy.utils.weight_dtype(weights))
    cast = mm.unet_manual_cast(storage, device, SUPPORTED)
    if (cast or storage) not in SUPPORTED:  # --fp16-unet: kept so, but not computed in
        cast = torch.bfloat16 if mm.should_use_bf16(device) else torch.float32
    return Precision(storage, cast)


def read_weights(reference: nn.Module, component: Component) -> dict[str, Tensor]:
    """A component's tensors by parameter name, through ComfyUI's own (memory-mapping) reader.

    `reference` is the module on the meta device: ComfyUI's loaders compare no shapes, so the core does, beforehand.
    """
    tensors = check_tensors(reference, component)
    weights = {}
    for path in {info.file: None for info in tensors.values()}:
        content = comfy.utils.load_torch_file(str(path), safe_load=True)
        weights |= {name: content[info.key] for name, info in tensors.items() if info.file == path}
    return weights


def make_patcher(
    host: nn.Module, module: nn.Module, weights: dict[str, Tensor], load_device, offload_device, disable_dynamic=False
) -> comfy.model_patcher.ModelPatcher:
    """Hand `host` to ComfyUI's memory management, then fill `module`, which is in it or is it.

    In this order ComfyUI's own loaders do it.
    """
    mm.archive_model_dtypes(host)
    # looked up here: ComfyUI decides at start-up, after importing itself, which class this is
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(host, load_device, offload_device)
    module.load_state_dict(weights, strict=True, assign=patcher.is_dynamic())
    host.eval().requires_grad_(False)
    patcher.size = sum(parameter.nbytes for parameter in host.parameters())
    return patcher
