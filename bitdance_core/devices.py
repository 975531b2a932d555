"""Choose a device and a dtype, if the user has not."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .errors import BitDanceError, shorten

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # by users' names


CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def choose(device: torch.device | str | None, dtype: torch.dtype | str | None) -> tuple[torch.device, torch.dtype]:
    """Return an available device, with its index, and a dtype for it.

    None means the GPU if there is one, and bfloat16 on it, float32 on the CPU. Raises BitDanceError for a device that
    is not available, and for a dtype that models cannot compute in.
    """
    dtype = None if dtype is None else compute_dtype(dtype)
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


def compute_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return a dtype to compute in, given by name or itself (float64 too). Raises BitDanceError for any other."""
    found = COMPUTE_DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in (*COMPUTE_DTYPES.values(), torch.float64):
        raise BitDanceError(f"dtype must be one of {', '.join(COMPUTE_DTYPES)}, found {shorten(dtype)}")
    return found


def memory_of(device: torch.device) -> int | None:
    """Return the bytes of memory that a device has in all, in use or not; None where no system call says so."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):  # Windows has none
        return None
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(memory, int(CONTAINER_LIMIT.read_text()))
    except (OSError, ValueError):  # no container, or "max"
        return memory


def check_graphs(device: torch.device, cuda_graphs: bool) -> None:
    """Raise BitDanceError if `cuda_graphs` is set for another kind of device."""
    if cuda_graphs and device.type != "cuda":
        raise BitDanceError(f"cuda_graphs needs a CUDA device, found {device}; switch it off")
