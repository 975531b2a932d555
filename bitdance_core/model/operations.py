"""The layer classes that the core builds its models of: PyTorch's, with another matrix product on some processors."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Below so many multiplications, and with fewer rows, the call costs more than it saves (docs/speed.md).
LEAST_PRODUCTS, LEAST_ROWS = 2**20, 4
# numbers of a matrix up to which MKL multiplies a few dozen rows faster where it is stored by columns (docs/speed.md)
MOST_BY_COLUMNS = 2**20


class OneDnnLinear(nn.Linear):
    """A Linear that multiplies float32 on the CPU by oneDNN, outside of training.

    PyTorch takes MKL for it, which uses half of what some processors can do (see `mkl_uses_half`).
    """

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        is_large = rows >= LEAST_ROWS and rows * self.in_features * self.out_features >= LEAST_PRODUCTS
        # the operation has no gradient, and a compiler chooses for itself
        is_asked = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if is_asked and is_large and x.dtype == torch.float32 and x.device.type == "cpu":
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


class OneDnnOperations:
    """`torch.nn` with `OneDnnLinear`."""

    Linear = OneDnnLinear
    Embedding, Conv2d = nn.Embedding, nn.Conv2d
    LayerNorm, RMSNorm, GroupNorm = nn.LayerNorm, nn.RMSNorm, nn.GroupNorm


def operations_for(device: torch.device) -> ModuleType | type:
    """Return the namespace of layer classes that is fastest on a device."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    has_it = has_both and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # PyTorch's documents do not name it
    return OneDnnOperations if device.type == "cpu" and has_it and mkl_uses_half() else nn


def mkl_uses_half(processor: str | None = None, capability: str | None = None) -> bool:
    """Return whether a processor is AMD's from Zen 5 on (family 26), with AVX-512: MKL computes with AVX2 there.

    The processor is described as /proc/cpuinfo does, or Windows, and the capability as PyTorch does; by default those
    of this machine. Before Zen 5 AVX-512 takes twice as long, and oneDNN's overhead is all that remains.
    """
    if processor is None:
        cpuinfo = Path("/proc/cpuinfo")
        processor = cpuinfo.read_text() if cpuinfo.is_file() else platform.processor()
    family = re.search(r"(?:cpu family\s*: |Family )(\d+)", processor)
    capability = capability or torch.backends.cpu.get_cpu_capability()
    is_amd = "AuthenticAMD" in processor and family is not None
    return is_amd and int(family[1]) >= 26 and capability == "AVX512"


def store_by_columns(model: nn.Module) -> None:
    """Store the small matrices of a network that draws on the CPU by columns: the same numbers, multiplied faster.

    Only layers that multiply float32 by MKL are changed. One layer at a time is copied; its shape stays the same, and
    only its strides tell. Training needs rows: optimizers and sharding expect contiguous parameters.
    """
    if not torch.backends.mkl.is_available():
        return
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu":
            if layer.weight.numel() <= MOST_BY_COLUMNS:
                columns = layer.weight.detach().t().contiguous().t()
                layer.weight = nn.Parameter(columns, requires_grad=layer.weight.requires_grad)
