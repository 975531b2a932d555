"""Quantize weights while they are loaded, into the formats that ComfyUI's Linear layers compute in.

The core's `LAYERS` chooses the layers, after measurements by benchmarks/eval_quantization.py.
"""

from __future__ import annotations

import json

import comfy.model_management as mm
import comfy.quant_ops
import torch
from torch import Tensor

from ...bitdance_core.checkpoints.quantization import FORMATS, Format

NOTE = "comfy_quant"  # the tensor beside a quantized weight that names its format to ComfyUI's layers
# options of weight_dtype -> format
CHOICES = {format.option: format for format in FORMATS.values() if format.option}
ROTATIONS = (256, 64)  # sizes of ConvRot's groups, the best first; formats of 4 bits take their columns in 64s
SETTINGS = ("convrot_groupsize", "linear_dtype", "group_size")  # the layout's arguments that ComfyUI reads from a note
# what quantizing takes on the device at its peak, in float32 copies of the matrix: counted in comfy_kitchen's kernels
# of PyTorch's operations; its CUDA kernels take less
COPIES = {"fp8_e4m3fn": 3, "int8": 3, "mxfp8": 6, "nvfp4": 9, "convrot_w4a4": 5, "asym_w4a8_int8": 21}


def choices(device: torch.device | None = None) -> list[str]:
    """List the options that this ComfyUI has layers for on a device, by default the one to compute on.

    None if comfy_kitchen is not installed.
    """
    device = mm.get_torch_device() if device is None else device
    if not hasattr(comfy.quant_ops.QuantizedTensor, "from_float") or not has_quantized(device):
        return []
    return [option for option, format in CHOICES.items() if format.name in comfy.quant_ops.QUANT_ALGOS]


def has_quantized(device: torch.device) -> bool:
    """Return whether a device computes with quantized weights at all.

    A Mac's GPU has no 8-bit floats, and PyTorch up to 2.13 no product of 8-bit integers for it; DirectML has neither.
    """
    return mm.supports_cast(device, torch.float8_e4m3fn)


def note(kind: str, settings: dict) -> Tensor:
    """Encode a format and its settings as the JSON bytes (uint8) that ComfyUI's layers read."""
    text = json.dumps({"format": kind, **FORMATS[kind].settings, **settings})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def quantize(name: str, weight: Tensor, choice: str) -> dict[str, Tensor]:
    """Quantize a layer's matrix [N, K] of any float dtype; returns the tensors that ComfyUI's Linear loads instead.

    Runs on the compute device; the result is in system memory.
    """
    format = CHOICES[choice]
    arguments = _arguments(format, name, weight)
    if arguments is None:
        format = CHOICES["int8"]
        arguments = format.arguments
    layout = comfy.quant_ops.QUANT_ALGOS[format.name]["comfy_tensor_layout"]
    weight = weight.to(mm.get_torch_device(), torch.float32)
    if arguments.get("scale") and not weight.any():  # ComfyUI divides by the largest number
        arguments = {"scale": torch.ones((), device=weight.device)}
    quantized = comfy.quant_ops.QuantizedTensor.from_float(weight, layout, **arguments)
    parts = {key: part.cpu() for key, part in quantized.state_dict(name).items()}
    settings = {key: value for key, value in arguments.items() if key in SETTINGS}
    return {**parts, name.removesuffix("weight") + NOTE: note(format.name, settings)}


def _arguments(format: Format, name: str, weight: Tensor) -> dict | None:
    """Return the layout's arguments for a matrix; None if it has to be int8, or has too few columns to rotate."""
    if format.spares is not None and format.spares.fullmatch(name):
        return None
    if not format.rotates:
        return format.arguments
    group = next((size for size in ROTATIONS if weight.shape[1] % size == 0), None)
    return None if group is None else {**format.arguments, "convrot_groupsize": group}


def quantizing_bytes(values: int, choice: str) -> int:
    """Return the bytes that `quantize` takes on the compute device at its peak, for a matrix of so many values."""
    return COPIES[choice] * 4 * values


def make_room(values: int, choice: str) -> None:
    """Let ComfyUI move models off the compute device until a matrix of so many values can be quantized there."""
    mm.free_memory(quantizing_bytes(values, choice), mm.get_torch_device())
