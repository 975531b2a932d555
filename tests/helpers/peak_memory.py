"""The counter of tensors, for tests."""

from benchmarks.peak_memory import PeakMemory

__all__ = ["PeakMemory"]
