"""Choose a device and a dtype, if the user has not."""

from __future__ import annotations

import torch

from .errors import BitDanceError

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # by users' names


def choose(device: torch.device | str | None, dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    """Return an available device, with its index, and a dtype for it.

    None means the GPU if there is one, and bfloat16 on it, float32 on the CPU. Raises BitDanceError for a device that
    is not available.
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
    """Raise BitDanceError if `cuda_graphs` is set for another kind of device."""
    if cuda_graphs and device.type != "cuda":
        raise BitDanceError(f"cuda_graphs needs a CUDA device, found {device}; switch it off")
