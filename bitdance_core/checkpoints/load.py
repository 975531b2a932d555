"""Weights into modules: checked against the files' headers first, then streamed tensor by tensor to their place."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from ..errors import BitDanceError
from .files import TensorFile, open_tensors
from .tensor_names import Component, Quantization, TensorInfo

CPU = torch.device("cpu")
# what is quantized: the matrices of the many layers. What leads into them, out of them and tells them the time is
# small, and costs more agreement for its size (benchmarks/eval_quantization.py)
LAYERS = re.compile(r"(.+\.)?(layers|res_blocks|ada_ln_blocks)\.\d+\.(.+\.)?weight")
FLOAT_TYPES = ("F32", "F16", "BF16", "F64")
# the smallest byte of an 8-bit float that is no number: NaN, and infinity where the type has it
NOT_FINITE = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}


def load_weights(
    parts: Sequence[tuple[nn.Module, Component]],
    device: torch.device,
    dtype: torch.dtype,
    on_cpu: Collection[str] = (),
) -> None:
    """Fill modules built on the meta device; parameters named in `on_cpu` stay in system memory.

    All parts are checked before a weight is read: BitDanceError names what is missing, unknown and misshapen. Then
    one tensor at a time is read and cast, so no second copy of a model ever exists; one with NaN in it is refused.
    """
    checked = [(module, check_tensors(module, component)) for module, component in parts]
    for module, tensors in checked:
        for path in {info.file: None for info in tensors.values()}:
            here = [name for name, info in tensors.items() if info.file == path]
            for target in {device, CPU}:
                names = [name for name in here if target == (CPU if name in on_cpu else device)]
                # safetensors reads straight onto a CUDA device; onto others by way of system memory
                with open_tensors(path, str(target) if target.type == "cuda" else "cpu") as file:
                    for name in names:
                        owner, _, leaf = name.rpartition(".")
                        weight = read_weight(file, tensors[name], target, dtype)
                        check_finite(weight, tensors[name])
                        setattr(module.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))


def read_weight(file: TensorFile, info: TensorInfo, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor of an open file, out of its quantized form."""
    stored = file.get_tensor(info.key).to(device)
    if info.quantization is None:
        return stored.to(dtype).reshape(info.shape)
    scale = read_scale(info)
    return scaled(stored, None if scale is None else scale.to(device), dtype).reshape(info.shape)


def read_scale(info: TensorInfo) -> Tensor | None:
    """The scale of a quantized weight, from its own file: another shard, perhaps."""
    scale = info.quantization.beside.get("weight_scale")
    if scale is None:
        return None
    with open_tensors(scale.file) as file:
        return file.get_tensor(scale.key).float()


def scaled(stored: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """w = q * scale in float32; the scale is one number, or one for each row of [N, …]."""
    values = stored.float()
    if scale is not None:
        values *= scale.float().reshape(-1, *[1] * (values.ndim - 1)) if values.ndim else scale.float().reshape(())
    return values.to(dtype)


def check_finite(weight: Tensor, info: TensorInfo) -> None:
    """Raise BitDanceError for NaN and infinity, which no model holds. No copy is made."""
    if weight.numel() and not _is_finite(weight):
        raise BitDanceError(
            f"{info.file}: {info.key} holds NaN or infinity (as {str(weight.dtype).removeprefix('torch.')}); "
            "the file is damaged, download it again"
        )


def _is_finite(weight: Tensor) -> bool:
    if (least := NOT_FINITE.get(weight.dtype)) is not None:  # from here on, with either sign
        return weight.view(torch.int8).max() < least and weight.view(torch.uint8).max() < least + 128
    if weight.dtype.is_floating_point and weight.dtype.itemsize > 1:
        return all(map(math.isfinite, weight.aminmax()))  # NaN goes through
    return True


def is_scaled(quantization: Quantization) -> bool:
    """Whether a weight is just what is stored times a scale; ComfyUI knows formats that are more."""
    settings = quantization.settings
    rotated = settings.get("convrot") or (isinstance(p := settings.get("params"), dict) and p.get("convrot"))
    return quantization.format in ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise") and not rotated


def check_tensors(
    module: nn.Module, component: Component, can_run: Callable[[Quantization], bool] = is_scaled
) -> dict[str, TensorInfo]:
    """What the files hold for a module, by parameter name. Raises BitDanceError unless it is just what it needs.

    `can_run` says which quantized forms the caller knows.
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
        f"not of a type among {', '.join(FLOAT_TYPES)}": mistyped,
        "in a format that only ComfyUI's own layers compute in": only_comfyui,
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for what, names in problems.items()
            if names
        )
        files = component.files
        where = f"{files[0] if len(files) == 1 else files[0].parent}: " if files else ""
        raise BitDanceError(f"{where}the {component.name}'s tensors do not fit: {listed}")
    return tensors
