"""Weights into modules: checked against the files' headers first, then streamed tensor by tensor to their place."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn

from .checkpoint import Component, TensorInfo
from .errors import BitDanceError
from .files import open_safetensors

CPU = torch.device("cpu")
FLOAT_TYPES = ("F32", "F16", "BF16", "F64")


def load_weights(
    parts: Sequence[tuple[nn.Module, Component]],
    device: torch.device,
    dtype: torch.dtype,
    on_cpu: Collection[str] = (),
) -> None:
    """Fill modules built on the meta device; parameters named in `on_cpu` stay in system memory.

    All parts are checked before a weight is read: BitDanceError names what is missing, unknown and misshapen. Then
    one tensor at a time is read and cast, so no second copy of a model ever exists.
    """
    checked = [(module, check_tensors(module, component)) for module, component in parts]
    for module, tensors in checked:
        for path in {info.file: None for info in tensors.values()}:
            here = [name for name, info in tensors.items() if info.file == path]
            for target in {device, CPU}:
                names = [name for name in here if target == (CPU if name in on_cpu else device)]
                # safetensors reads straight onto a CUDA device; onto others by way of system memory
                with open_safetensors(path, str(target) if target.type == "cuda" else "cpu") as file:
                    for name in names:
                        owner, _, leaf = name.rpartition(".")
                        weight = file.get_tensor(tensors[name].key).to(target, dtype)
                        setattr(module.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))


def check_tensors(module: nn.Module, component: Component) -> dict[str, TensorInfo]:
    """What the files hold for a module, by parameter name. Raises BitDanceError unless it is just what it needs."""
    tensors = component.tensors()
    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    missing = [name for name in expected if name not in tensors]
    unexpected = [info.key for name, info in tensors.items() if name not in expected]
    known = {name: info for name, info in tensors.items() if name in expected}
    misshapen = [
        f"{info.key} is {list(info.shape)}, expected {list(expected[name])}"
        for name, info in known.items()
        if info.shape != expected[name]
    ]
    mistyped = [f"{info.key} is {info.dtype}" for info in known.values() if info.dtype not in FLOAT_TYPES]
    problems = {
        "missing": missing,
        "unknown": unexpected,
        "of the wrong shape": misshapen,
        f"not of a type among {', '.join(FLOAT_TYPES)}": mistyped,
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for what, names in problems.items()
            if names
        )
        files = component.files[0] if len(component.files) == 1 else component.files[0].parent
        raise BitDanceError(f"{files}: the {component.name}'s tensors do not fit: {listed}")
    return tensors
