"""The optimizers of training: PyTorch's AdamW, or bitsandbytes', whose moments take 8 bits each."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import nn

from ..errors import BitDanceError
from .settings import ADAMW8BIT

BETAS, EPSILON = (0.9, 0.95), 1e-8
PROBE = 4096  # values: bitsandbytes keeps smaller tensors' moments in 32 bits


def make_optimizer(name: str, parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Make an optimizer, without weight decay."""
    kind = import_module("bitsandbytes").optim.AdamW8bit if name == ADAMW8BIT else torch.optim.AdamW
    return kind(parameters, lr, BETAS, EPSILON, weight_decay=0.0)


def check_optimizer(name: str, device: torch.device) -> None:
    """Raise BitDanceError for an optimizer that is not installed, or has no kernel for the device."""
    if name != ADAMW8BIT:
        return
    probe = nn.Parameter(torch.zeros(PROBE, device=device))
    probe.grad = torch.zeros_like(probe)
    try:
        make_optimizer(name, [probe], 1.0).step()
    except ModuleNotFoundError as error:
        if error.name != "bitsandbytes":
            raise
        raise BitDanceError(
            f"--optimizer {name} needs bitsandbytes, which is missing: pip install bitsandbytes"
        ) from error
    except Exception as error:  # what a missing kernel raises depends on the device and on bitsandbytes' build
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise BitDanceError(
            f"--optimizer {name} has no kernel for {device.type} in this bitsandbytes ({reason}); leave it out"
        ) from error
