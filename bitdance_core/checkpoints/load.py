"""Load weights into modules: check every tensor against the files' headers, then read one tensor at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import BitDanceError
from ..model.int8 import Int8Linear
from .files import TensorFile, open_tensors
from .quantization import FORMATS
from .tensor_names import Component, Quantization, TensorInfo

CPU = torch.device("cpu")
# the weights to quantize: the matrices of the layers. Input, output and time layers stay unquantized: they are small,
# and quantizing them changes more bits per parameter (benchmarks/eval_quantization.py)
LAYERS = re.compile(r"(.+\.)?(layers|res_blocks|ada_ln_blocks)\.\d+\.(.+\.)?weight")
FLOAT_TYPES = ("F32", "F16", "BF16", "F64")
# the smallest byte (without the sign bit) of an 8-bit float that is not finite: NaN, or infinity if the type has it
NOT_FINITE = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}


def load_weights(
    parts: Sequence[tuple[nn.Module, Component]],
    device: torch.device,
    dtype: torch.dtype,
    on_cpu: Collection[str] = (),
) -> None:
    """Fill modules built on the meta device; parameters named in `on_cpu` stay in system memory.

    Check all parts before reading a weight, then read and cast one tensor at a time, so that no second copy of the
    model ever exists. Raises BitDanceError for missing, unknown or misshapen tensors, and for NaN or infinity.
    """
    checked = [(module, check_tensors(module, component)) for module, component in parts]
    places: dict[tuple[Path, torch.device], list[tuple[nn.Module, str, TensorInfo]]] = {}
    for module, tensors in checked:
        for name, info in tensors.items():
            places.setdefault((info.file, CPU if name in on_cpu else device), []).append((module, name, info))
    for (path, target), weights in places.items():
        # safetensors reads directly to a CUDA device, to others through system memory
        with open_tensors(path, str(target) if target.type == "cuda" else "cpu") as file:
            for module, name, info in weights:
                owner, _, leaf = name.rpartition(".")
                weight = read_weight(file, info, target, dtype)
                check_finite(weight, info)
                layer = module.get_submodule(owner)
                if isinstance(layer, Int8Linear) and leaf == "weight":
                    layer.fill(weight)
                else:
                    setattr(layer, leaf, nn.Parameter(weight, requires_grad=False))


def read_weight(file: TensorFile, info: TensorInfo, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Read a tensor of an open file and dequantize it."""
    stored = file.get_tensor(info.key).to(device)
    if info.quantization is None:
        return stored.to(dtype).reshape(info.shape)
    scale = read_scale(info, file)
    return scaled(stored, None if scale is None else scale.to(device), dtype).reshape(info.shape)


def read_scale(info: TensorInfo, file: TensorFile | None = None) -> Tensor | None:
    """Read the scale of a quantized weight, which may be in another shard than `file`; None if it has none."""
    scale = info.quantization.beside.get("weight_scale")
    if scale is None:
        return None
    if file is not None and scale.file == info.file:
        return file.get_tensor(scale.key).float()
    with open_tensors(scale.file) as file:
        return file.get_tensor(scale.key).float()


def scaled(stored: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Compute weight = stored * scale in float32; the scale is one number, or one per row of [N, …]."""
    values = stored.float()
    if scale is not None:
        values *= scale.float().reshape(-1, *[1] * (values.ndim - 1)) if values.ndim else scale.float().reshape(())
    return values.to(dtype)


def check_finite(weight: Tensor, info: TensorInfo) -> None:
    """Raise BitDanceError if the weight has NaN or infinity. Makes no copy."""
    if weight.numel() and not _is_finite(weight):
        raise BitDanceError(
            f"{info.file}: {info.key} holds NaN or infinity (as {str(weight.dtype).removeprefix('torch.')}); "
            "the file is damaged, download it again"
        )


def _is_finite(weight: Tensor) -> bool:
    if (least := NOT_FINITE.get(weight.dtype)) is not None:  # every byte from `least` on, with either sign bit
        return weight.view(torch.int8).max() < least and weight.view(torch.uint8).max() < least + 128
    if weight.dtype.is_floating_point and weight.dtype.itemsize > 1:
        return all(map(math.isfinite, weight.aminmax()))  # aminmax propagates NaN
    return True


def is_scaled(quantization: Quantization) -> bool:
    """Return whether the weight is the stored tensor times a scale, which is all that we compute ourselves."""
    settings = quantization.settings
    rotated = settings.get("convrot") or (isinstance(p := settings.get("params"), dict) and p.get("convrot"))
    return FORMATS[quantization.format].scaled and not rotated


def check_tensors(
    module: nn.Module, component: Component, can_run: Callable[[Quantization], bool] = is_scaled
) -> dict[str, TensorInfo]:
    """Check that the files have exactly the tensors that a module needs; return them by parameter name.

    `can_run` returns whether the caller can use a quantized format. Raises BitDanceError, which counts and names the
    missing, unknown, misshapen and unusable tensors.
    """
    tensors = component.tensors
    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    missing = [name for name in expected if name not in tensors]
    unexpected = [info.key for name, info in tensors.items() if name not in expected]
    known = {name: info for name, info in tensors.items() if name in expected}
    misshapen = [
        f"{info.key} is {list(info.shape)}, expected {list(expected[name])}"
        for name, info in known.items()
        if info.shape != expected[name]
    ]
    mistyped = [
        f"{info.key} is {info.dtype}"
        for info in known.values()
        if info.dtype not in FLOAT_TYPES and info.quantization is None
    ]
    only_comfyui = [
        f"{info.key} is {info.quantization.format}"
        for info in known.values()
        if info.quantization and not can_run(info.quantization)
    ]
    problems = {
        "missing": missing,
        "unknown": unexpected,
        "of the wrong shape": misshapen,
        f"not of a supported type ({', '.join(FLOAT_TYPES)})": mistyped,
        "in a format that only ComfyUI's Linear layers can use": only_comfyui,
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{len(names)} {problem} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for problem, names in problems.items()
            if names
        )
        files = component.files
        where = f"{files[0] if len(files) == 1 else files[0].parent}: " if files else ""
        raise BitDanceError(f"{where}the {component.name}'s tensors do not fit: {listed}")
    return tensors
