"""Measure time, peak memory and shortage of CPU cores for benchmarks."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PRESSURE = Path("/proc/pressure/cpu")

Moment = torch.cuda.Event | float


def mark(device: torch.device) -> Moment:
    """Record a moment, on a GPU as an event: synchronizing would slow down the measured work."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def wait(device: torch.device) -> None:
    """Wait for the GPU, so that its moments can be subtracted."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_between(start: Moment, end: Moment) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


class PeakMemory:
    """Bytes in use at construction, and the peak since: of the GPU, or of this process (on Linux).

    None if the system does not count them.
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
    """Reset this process's peak to its current memory; return whether the system can."""
    if not CLEAR_REFS.is_file():
        return False
    # return freed memory to the system first: its reuse would not raise the peak
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
    try:
        CLEAR_REFS.write_text("5")  # see proc(5)
    except OSError:  # in some containers
        return False
    return True


class CoreShortage:
    """The share of time since construction in which a task waited for a core, because of other load (on Linux)."""

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
