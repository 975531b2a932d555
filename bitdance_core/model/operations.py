"""The layer classes that the core builds its models of: PyTorch's, with another matrix product on some processors."""

from __future__ import annotations

import platform
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Below so many multiplications, and with fewer rows, the call costs more than it saves (docs/speed.md).
LEAST_PRODUCTS, LEAST_ROWS = 2**20, 4


class OneDnnLinear(nn.Linear):
    """A Linear that multiplies float32 on the CPU by oneDNN, outside of training.

    PyTorch takes MKL for it, which uses half of what AMD's processors can do.
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
    return OneDnnOperations if device.type == "cpu" and has_it and is_amd() else nn


def is_amd() -> bool:
    """Return whether this machine's processor is AMD's, as Linux and Windows tell."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "AuthenticAMD" in platform.processor()
