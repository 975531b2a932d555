"""Quantize weights while they are loaded, into the formats that ComfyUI's Linear layers compute in.

The core's `LAYERS` chooses the layers, after measurements by benchmarks/eval_quantization.py.
"""

from __future__ import annotations

import json

import comfy.model_management as mm
import comfy.quant_ops
import torch
from torch import Tensor

from ...bitdance_core.checkpoints.quantization import FORMATS

NOTE = "comfy_quant"  # the tensor beside a quantized weight that names its format to ComfyUI's layers
# options of weight_dtype -> format
CHOICES = {format.option: format for format in FORMATS.values() if format.option}


def choices() -> list[str]:
    """List the options that this ComfyUI has layers for: none if comfy_kitchen is not installed."""
    if not hasattr(comfy.quant_ops.QuantizedTensor, "from_float"):
        return []
    return [option for option, format in CHOICES.items() if format.name in comfy.quant_ops.QUANT_ALGOS]


def note(kind: str, settings: dict) -> Tensor:
    """Encode a format and its settings as the JSON bytes (uint8) that ComfyUI's layers read."""
    return torch.tensor(list(json.dumps({"format": kind, **settings}).encode()), dtype=torch.uint8)


def quantize(name: str, weight: Tensor, choice: str) -> dict[str, Tensor]:
    """Quantize a layer's matrix [N, K] of any float dtype; returns the tensors that ComfyUI's Linear loads instead.

    Runs on the compute device; the result is in system memory.
    """
    format = CHOICES[choice]
    layout = comfy.quant_ops.QUANT_ALGOS[format.name]["comfy_tensor_layout"]
    weight = weight.to(mm.get_torch_device(), torch.float32)
    quantized = comfy.quant_ops.QuantizedTensor.from_float(weight, layout, **format.arguments)
    parts = {key: part.cpu() for key, part in quantized.state_dict(name).items()}
    return {**parts, name.removesuffix("weight") + NOTE: note(format.name, {})}
