"""Which device and which precision, where a user leaves it open."""

from __future__ import annotations

import torch

from .errors import BitDanceError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # as users name them


def choose(device: torch.device | str | None, dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    """A device that is there, with its index, and a dtype for it.

    None: the GPU if there is one; bfloat16 on it, float32 on the CPU. Raises BitDanceError for a device that cannot
    be used.
    """
    try:
        chosen = torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:  # torch raises either, by backend
        chosen, cause = None, error
    else:
        cause = None
    if chosen is None or chosen.type == "meta":
        have = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise BitDanceError(f"device '{device}' is not available, have: {', '.join(have)}") from cause
    return chosen, dtype or (torch.float32 if chosen.type == "cpu" else torch.bfloat16)


def check_graphs(device: torch.device, cuda_graphs: bool) -> None:
    """Raise BitDanceError where CUDA graphs are asked for elsewhere."""
    if cuda_graphs and device.type != "cuda":
        raise BitDanceError(f"cuda_graphs need a CUDA device, found {device}")
