"""Quantize weights while they are loaded, into the formats that ComfyUI's Linear layers compute in.

The core's `LAYERS` chooses the layers, after measurements by benchmarks/eval_quantization.py.
"""

from __future__ import annotations

import json

import comfy.model_management as mm
import comfy.quant_ops
import torch
from torch import Tensor

NOTE = "comfy_quant"  # the tensor beside a quantized weight that names its format to ComfyUI's layers
# options of weight_dtype -> ComfyUI's format, and the arguments with which its layout computes the scales
CHOICES = {
    "fp8_e4m3fn": ("float8_e4m3fn", {"scale": "recalculate"}),
    "int8": ("int8_tensorwise", {"per_channel": True}),
    "mxfp8": ("mxfp8", {}),
    "nvfp4": ("nvfp4", {"scale": "recalculate"}),
}


def choices() -> list[str]:
    """List the options that this ComfyUI has layers for: none if comfy_kitchen is not installed."""
    if not hasattr(comfy.quant_ops.QuantizedTensor, "from_float"):
        return []
    return [name for name, (kind, _) in CHOICES.items() if kind in comfy.quant_ops.QUANT_ALGOS]


def note(kind: str, settings: dict) -> Tensor:
    """Encode a format and its settings as the JSON bytes (uint8) that ComfyUI's layers read."""
    return torch.tensor(list(json.dumps({"format": kind, **settings}).encode()), dtype=torch.uint8)


def quantize(name: str, weight: Tensor, choice: str) -> dict[str, Tensor]:
    """Quantize a layer's matrix [N, K] of any float dtype; returns the tensors that ComfyUI's Linear loads instead.

    Runs on the compute device; the result is in system memory.
    """
    kind, options = CHOICES[choice]
    layout = comfy.quant_ops.QUANT_ALGOS[kind]["comfy_tensor_layout"]
    weight = weight.to(mm.get_torch_device(), torch.float32)
    quantized = comfy.quant_ops.QuantizedTensor.from_float(weight, layout, **options)
    parts = {key: part.cpu() for key, part in quantized.state_dict(name).items()}
    return {**parts, name.removesuffix("weight") + NOTE: note(kind, {})}
