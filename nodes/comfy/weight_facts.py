"""Gather what weight_dtype `auto` looks at: the device, by asking ComfyUI, and a model's files, by their headers."""

from __future__ import annotations

import logging

import comfy.model_management as mm
import comfy.quant_ops
import torch

from ...bitdance_core.cards import loaded_bytes
from ...bitdance_core.checkpoints.checkpoint import ClassCheckpoint, TextCheckpoint
from ...bitdance_core.checkpoints.tensor_names import TensorInfo
from ...bitdance_core.errors import BitDanceError
from ...bitdance_core.model.grid import Grid
from ...bitdance_core.sampling.memory import drawing_bytes
from .quantize import choices, has_quantized
from .weight_choice import Contents, Device, choose, doubts
from .weights import OPTIONS

PROMPT = 64  # tokens of a prompt of about 50 words


def pick(option: str, checkpoint: TextCheckpoint | ClassCheckpoint) -> str:
    """Return the entry of WEIGHT_DTYPES for an option of the widget; say in the log what `auto` chose and why.

    Any other option stays; the log says what would suit the card better. Raises BitDanceError for an option that this
    device or this ComfyUI does not have.
    """
    device = mm.get_torch_device()
    if option not in OPTIONS:
        raise BitDanceError(
            f"weight_dtype is {option}, which the device {device} or this ComfyUI does not have; choose one of "
            f"{', '.join(OPTIONS)}"
        )
    facts = device_of(device)
    choice = choose(facts, contents_of(checkpoint), frozenset(choices(device)))
    if option == "auto":
        logging.info(
            f"[BitDance] weight_dtype auto is {choice.weight_dtype} for {checkpoint.path.name}: {choice.reason}"
        )
        return choice.weight_dtype
    if option == "default" != choice.weight_dtype:
        logging.warning(f"[BitDance] weight_dtype is default; auto would be {choice.weight_dtype}: {choice.reason}")
    elif doubt := doubts(facts, option):
        logging.warning(f"[BitDance] weight_dtype is {option}: {doubt}")
    return option


def device_of(device: torch.device) -> Device:
    """Ask ComfyUI and PyTorch about a device."""
    kind = "rocm" if device.type == "cuda" and torch.version.hip else device.type
    capability = torch.cuda.get_device_capability(device) if kind == "cuda" else None
    asked = {
        "float8_e4m3fn": mm.supports_fp8_compute, "mxfp8": mm.supports_mxfp8_compute, "nvfp4": mm.supports_nvfp4_compute
    }  # fmt: skip
    return Device(
        kind,
        mm.get_total_memory(device),
        capability,
        frozenset(name for name, supports in asked.items() if device.type == "cuda" and supports(device)),
        has_quantized(device),
        not mm.should_use_bf16(device),
        kind in ("cuda", "rocm") and _has_kernels(),
    )


def _has_kernels() -> bool:
    """Return whether comfy_kitchen has kernels of its own for products of integers; ComfyUI turns some off."""
    kitchen = getattr(comfy.quant_ops, "ck", None)
    backends = kitchen.registry.list_backends() if kitchen else {}
    return any(
        name != "eager"
        and backend["available"]
        and not backend["disabled"]
        and "int8_linear" in backend["capabilities"]
        for name, backend in backends.items()
    )


def contents_of(checkpoint: TextCheckpoint | ClassCheckpoint) -> Contents:
    """Count a model's weights, by the headers of its files."""
    body, head = [], []
    for part, component in checkpoint.parts.items():
        for name, info in component.tensors.items():
            if not name.startswith("embed_tokens"):  # which stays in system memory
                (head if f"{part}.{name}".lstrip(".").startswith("head.") else body).append(info)
    config = checkpoint.config
    height, width = (side // checkpoint.tokenizer.config.downscale for side in config.defaults.default_size)
    grid = Grid(height, width, config.patch_size)
    lengths = [PROMPT + grid.tokens_per_patch] * 2
    return Contents(
        _formats(head),
        _formats(head + body),
        sum(map(loaded_bytes, body)),
        sum(map(loaded_bytes, head)),
        sum(2 * _values(info) for info in head),
        drawing_bytes(config, grid, lengths, 1, config.defaults.steps, 2),
        checkpoint.prompts is None,
    )


def _formats(infos: list[TensorInfo]) -> frozenset[str]:
    return frozenset(info.quantization.format for info in infos if info.quantization and len(info.shape) == 2)


def _values(info: TensorInfo) -> int:
    return torch.Size(info.shape).numel()
