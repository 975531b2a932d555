"""What a section of the GPU report is given: the device, the options, and cases of models without weights."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from benchmarks import roofline
from benchmarks.random_models import CONFIGS, Config, Model, build, make_grid, with_layers
from benchmarks.trials import Case
from bitdance_core import devices
from bitdance_core.errors import BitDanceError
from bitdance_core.model.text_config import BitDanceConfig
from bitdance_core.sampling.flow import DEFAULT_SAMPLER
from bitdance_core.sampling.settings import Sampling

# "what" names a row; every other key is a column with its unit. "id" is for `written.TARGETS`, and no column
Row = dict[str, Any]
# rows of the embedding table: cases read the first only, and the rest would take seconds to fill on the CPU
VOCABULARY = 1024
TINY_LAYERS, TINY_STEPS = 2, 2
TINY_PEAKS = 2**20, 128  # bytes to read, side of the matrices to multiply


class NotPossible(Exception):
    """A section has no meaning here; its text says why."""


@dataclass(frozen=True)
class Options:
    """What the user asked for: `device` is a name or None, `model` a folder or `builtin`."""

    device: str | None = None
    tiny: bool = False
    quick: bool = False
    model: str = "builtin"


@dataclass(frozen=True)
class Setting:
    """The device, its dtype, the user's options, and when the section is cut off (of time.monotonic)."""

    device: torch.device
    dtype: torch.dtype
    options: Options
    end: float = float("inf")

    @classmethod
    def choose(cls, options: Options) -> Setting:
        """Choose the device. Raises BitDanceError where the sections would take hours."""
        device, dtype = devices.choose(options.device, None)
        if device.type != "cuda" and not options.tiny:
            raise BitDanceError(
                f"the report needs a CUDA device, found {device}; to try it with tiny models, add --device cpu --tiny"
            )
        return cls(device, dtype, options)

    @property
    def tiny(self) -> bool:
        return self.options.tiny

    @property
    def quick(self) -> bool:
        return self.options.quick or self.tiny

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @cached_property
    def peaks(self) -> roofline.Peaks:
        """Measure the rates of the device."""
        return roofline.measure_peaks(self.device, self.dtype, *(TINY_PEAKS if self.tiny else ()))

    def left(self) -> float:
        """Return the seconds until the section is cut off."""
        return self.end - time.monotonic()

    def needs_cuda(self) -> None:
        """Raise NotPossible where there is no CUDA device."""
        if not self.is_cuda:
            raise NotPossible(f"it needs a CUDA device, and this is {self.device}")

    def config(self, name: str) -> Config:
        """Return a published configuration, with few rows of words; tiny: a small one of the same kind."""
        config = CONFIGS[name if not self.tiny or name.startswith("imagenet") else "builtin"]
        if self.tiny:
            config = with_layers(config, TINY_LAYERS)
        if isinstance(config, BitDanceConfig):
            words = min(VOCABULARY, config.backbone.vocab_size)
            config = replace(config, backbone=replace(config.backbone, vocab_size=words))
        return config

    def case(self, config: Config, model: Model | None = None, batch: int = 1, patches: int | None = 8) -> Case:
        """Make a case with the model's own settings, by default with a model on the meta device.

        Of 8 patches the first is drawn without graphs and the second captured, so that medians are of replays; None: a
        whole picture.
        """
        defaults, grid = config.defaults, make_grid(config)
        steps = TINY_STEPS if self.tiny else defaults.steps
        sampling = Sampling(
            DEFAULT_SAMPLER, steps, defaults.guidance, config.head.time_shift, schedule=defaults.schedule
        )
        patches = grid.num_patches if patches is None else min(2 if self.tiny else patches, grid.num_patches)
        model = build(config).eval() if model is None else model
        return Case(model, grid, sampling, batch, patches, self.device, self.dtype)


def free(device: torch.device) -> None:
    """Return what no name holds any more to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def one_line(error: BaseException) -> str:
    """Describe an error in its first line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".removesuffix(": ")
