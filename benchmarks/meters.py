"""What a benchmark reads off the machine: moments, and memory at its peak."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PRESSURE = Path("/proc/pressure/cpu")

Moment = torch.cuda.Event | float


def mark(device: torch.device) -> Moment:
    """A moment, of the GPU's work where there is one: waiting for it would slow down what is measured."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def wait(device: torch.device) -> None:
    """Until moments can be subtracted."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_between(start: Moment, end: Moment) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


class PeakMemory:
    """Bytes that were in use when it was made, and the most since: of the GPU, or of this process (on Linux).

    None where nobody counts them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        self.is_counted = device.type == "cpu" and forget_peak()
        self.before = self._status("VmRSS")

    def read(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return self._status("VmHWM")

    def _status(self, name: str) -> int | None:
        if not self.is_counted:
            return None
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
        return int(line.split()[1]) * 1024


def forget_peak() -> bool:
    """Let this process's peak be what it has now; whether the system could."""
    if not CLEAR_REFS.is_file():
        return False
    # what was freed must go back to the system first, or the next to use it would not be seen to
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
    try:
        CLEAR_REFS.write_text("5")  # see proc(5)
    except OSError:  # in some containers
        return False
    return True


class CoreShortage:
    """Since it was made, the share of time in which something waited for a core: others were at work (on Linux)."""

    def __init__(self) -> None:
        self.begin, self.waited = time.perf_counter(), self._waited()

    def read(self) -> float | None:
        if self.waited is None:
            return None
        return (self._waited() - self.waited) / (time.perf_counter() - self.begin)

    def _waited(self) -> float | None:
        try:
            some = PRESSURE.read_text().splitlines()[0]  # "some avg10=0.00 ... total=microseconds"
        except OSError:
            return None
        return int(some.rpartition("=")[2]) / 1e6
