"""Weights quantized while they are loaded, into the formats that ComfyUI's Linear layers compute in.

Which layers these are is the core's rule (`LAYERS`), measured by scripts/eval_quantization.py.
"""

from __future__ import annotations

import json

import comfy.model_management as mm
import comfy.quant_ops
import torch
from torch import Tensor

NOTE = "comfy_quant"  # beside a quantized weight: what ComfyUI's layers read of it
# names on the loaders -> ComfyUI's formats, and how its layouts are told to find the scales
CHOICES = {
    "fp8_e4m3fn": ("float8_e4m3fn", {"scale": "recalculate"}),
    "int8": ("int8_tensorwise", {"per_channel": True}),
    "mxfp8": ("mxfp8", {}),
    "nvfp4": ("nvfp4", {"scale": "recalculate"}),
}


def choices() -> list[str]:
    """Those that this ComfyUI has layers for: none where it lacks comfy_kitchen."""
    if not hasattr(comfy.quant_ops.QuantizedTensor, "from_float"):
        return []
    return [name for name, (kind, _) in CHOICES.items() if kind in comfy.quant_ops.QUANT_ALGOS]


def note(kind: str, settings: dict) -> Tensor:
    """What says to ComfyUI's layers how the weight beside it is quantized."""
    return torch.tensor(list(json.dumps({"format": kind, **settings}).encode()), dtype=torch.uint8)


def quantize(name: str, weight: Tensor, choice: str) -> dict[str, Tensor]:
    """A layer's matrix [N, K] of any float dtype -> what ComfyUI's Linear loads in its place, in system memory.

    Computed where models are.
    """
    kind, options = CHOICES[choice]
    layout = comfy.quant_ops.QUANT_ALGOS[kind]["comfy_tensor_layout"]
    weight = weight.to(mm.get_torch_device(), torch.float32)
    quantized = comfy.quant_ops.QuantizedTensor.from_float(weight, layout, **options)
    parts = {key: part.cpu() for key, part in quantized.state_dict(name).items()}
    return {**parts, name.removesuffix("weight") + NOTE: note(kind, {})}
