"""Settings of a training run, and good defaults for each model. Needs neither PEFT nor accelerate."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from ..errors import BitDanceError, whole_number
from ..model.class_config import ImageNetConfig
from ..model.text_config import BitDanceConfig
from ..model.tokenizer_config import AutoencoderConfig

ADAPTERS = ("lora", "dora", "lokr", "loha")
TARGETS = ("head", "backbone", "both")
QUANTIZED = ("none", "int8", "fp8")
ADAMW8BIT = "adamw8bit"
OPTIMIZERS = ("adamw", ADAMW8BIT)
WHOLE = "full"  # in place of an adapter: all weights are trained
SMALL = 1024  # the width of a backbone below which a model learns fast, and forgets nothing that matters to it
SMALL_TOKENIZER = 64  # the same for the first level of a tokenizer


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What every run has: two runs with the same settings and pictures write one file."""

    steps: int
    batch: int  # pictures of one step, on all processes together
    lr: float
    seed: int = 0
    warmup: int = 10
    accumulate: int = 1  # passes that a step's pictures are split into, on each process
    optimizer: str = "adamw"
    flip: bool = False
    dtype: str = "float32"

    def check(self) -> None:
        """Raise BitDanceError, in the words of the options, for values that no run can have."""
        for name, least, most in (
            ("steps", 1, 10**7), ("batch", 1, 2**16), ("accumulate", 1, 2**16), ("seed", 0, 2**64 - 1),
            ("warmup", 0, 10**7),
        ):  # fmt: skip
            whole_number(f"--{name}", getattr(self, name), least, most)
        above_0("lr", self.lr, 1.0)

    def split(self, processes: int) -> int:
        """Return the pictures of one pass. Raises BitDanceError if a step's pictures cannot be shared out evenly."""
        parts = processes * self.accumulate
        if self.batch % parts:
            nearest = max(1, round(self.batch / parts)) * parts
            raise BitDanceError(
                f"--batch {self.batch} cannot be shared out evenly among {processes} processes in {self.accumulate} "
                f"passes each; use --batch {nearest}"
            )
        return self.batch // parts

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0: a linear rise, then half a cosine down to 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.5 + 0.5 * math.cos(math.pi * done))

    def differences(self, other: dict[str, object]) -> list[str]:
        """Describe what a stored run had otherwise: "lr 0.001 -> 0.01"."""
        own = dataclasses.asdict(self)
        return [f"{name} {other.get(name)} -> {value}" for name, value in own.items() if other.get(name) != value]


@dataclass(frozen=True, kw_only=True)
class Settings(Schedule):
    """What decides the weights that a run of `finetune` ends with."""

    adapter: str = "lora"  # or WHOLE
    rank: int = 16
    alpha: float = 16.0
    targets: str = "both"
    times: int = 1  # how often a patch is used in a step
    drop: float = 0.1
    keep: float = 0.3  # share of pictures that teach what is to stay as it is
    quantize: str = "none"
    checkpoint_layers: bool = False
    fit: str = "crop"

    def check(self) -> None:
        super().check()
        for name, most in (("rank", 4096), ("times", 64)):
            whole_number(f"--{name}", getattr(self, name), 1, most)
        above_0("alpha", self.alpha, 1e6)
        for name in ("drop", "keep"):
            share(name, getattr(self, name))
        if self.adapter == WHOLE and self.quantize != "none":
            raise BitDanceError("--quantize is for frozen weights, and --full trains all; leave one of them out")
        if self.adapter == "dora" and self.quantize != "none":
            raise BitDanceError("--adapter dora measures the weights, which --quantize rounds; use --adapter lora")


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings(Schedule):
    """What decides the weights that a run of `finetune-tokenizer` ends with; its last fields are the loss's weights."""

    size: int  # the side of the squares that pictures are cut to
    decoder_only: bool = True
    wrong_bits: float = 0.0  # the most bits, as a share, that the decoder receives wrong
    perceptual_net: str = "vgg"
    l1: float = 1.0
    mse: float = 1.0
    perceptual: float = 0.0
    commitment: float = 0.0
    entropy: float = 0.0

    def check(self) -> None:
        super().check()
        share("wrong-bits", self.wrong_bits)
        for name in ("l1", "mse", "perceptual", "commitment", "entropy"):
            value = getattr(self, name)
            if not 0 <= value <= 1e6:
                raise BitDanceError(f"--{name} must be a number from 0 to 1e6, found {value}")
        if not (self.l1 or self.mse or self.perceptual):
            raise BitDanceError("--l1, --mse and --perceptual are all 0; one of them must say what a good picture is")


def above_0(name: str, value: float, most: float) -> None:
    if not (math.isfinite(value) and 0 < value <= most):
        raise BitDanceError(f"--{name} must be a number above 0 and at most {most:g}, found {value}")


def share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise BitDanceError(f"--{name} must be a share from 0 to below 1, found {value}")


def defaults_for(config: BitDanceConfig | ImageNetConfig, is_whole: bool, pictures: int) -> dict[str, float | int]:
    """Return steps, batch, lr, times and warm-up for a model.

    Those of small models are measured (docs/finetuning.md); those of the 14B models are not: they follow the published
    training (docs/facts.md#training) and what LoRAs of such models commonly use.
    """
    width = config.width if isinstance(config, ImageNetConfig) else config.backbone.hidden_size
    if width < SMALL:
        return {"steps": 600, "batch": 16, "lr": 3e-4 if is_whole else 2e-3, "times": 2, "warmup": 10}
    # thirty looks at each picture, as far as that is neither too few steps nor too many
    steps = min(4000, max(500, 30 * pictures // 4))
    return {"steps": steps, "batch": 4, "lr": 1e-5 if is_whole else 1e-4, "times": 1, "warmup": 50}


def tokenizer_defaults(config: AutoencoderConfig) -> dict[str, float | int]:
    """Return steps, batch, lr, warm-up and size for a tokenizer. Those of published ones are not measured."""
    size = min(256, config.downscale**2)
    if config.channels < SMALL_TOKENIZER:
        return {"steps": 400, "batch": 16, "lr": 5e-4, "warmup": 10, "size": size}
    return {"steps": 2000, "batch": 4, "lr": 2e-5, "warmup": 50, "size": size}
