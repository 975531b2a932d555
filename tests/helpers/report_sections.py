"""Sections of a GPU report that fail: a worker imports them by name, so they cannot be in a test's own module."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import torch

from benchmarks.gpu_sections.setting import NotPossible, Row, Setting


def works(setting: Setting) -> Iterator[Row]:
    yield {"what": "a row", "s": 0.5, "device": str(setting.device)}


def fails(setting: Setting) -> Iterator[Row]:
    yield {"what": "the row before"}
    raise ValueError("found | 3\nsecond line")


def has_no_memory(setting: Setting) -> Iterator[Row]:
    raise torch.OutOfMemoryError("CUDA out of memory.")
    yield {}


def hangs(setting: Setting) -> Iterator[Row]:
    yield {"what": "the row before"}
    print("it hangs", flush=True)
    while True:
        time.sleep(1)


def dies(setting: Setting) -> Iterator[Row]:
    yield {"what": "the row before"}
    os._exit(3)


def is_not_possible(setting: Setting) -> Iterator[Row]:
    raise NotPossible("it needs a unicorn")
    yield {}
