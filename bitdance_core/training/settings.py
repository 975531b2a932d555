"""Settings of a training run, and good defaults for each model. Needs neither PEFT nor accelerate."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from ..errors import BitDanceError, whole_number
from ..model.class_config import ImageNetConfig
from ..model.text_config import BitDanceConfig

ADAPTERS = ("lora", "dora", "lokr", "loha")
TARGETS = ("head", "backbone", "both")
QUANTIZED = ("none", "int8", "fp8")
WHOLE = "full"  # in place of an adapter: all weights are trained
SMALL = 1024  # the width of a backbone below which a model learns fast, and forgets nothing that matters to it


@dataclass(frozen=True)
class Settings:
    """What decides the weights that a run ends with: two runs with the same settings and pictures write one file."""

    steps: int
    batch: int  # pictures of one step, on all processes together
    lr: float
    adapter: str = "lora"  # or WHOLE
    rank: int = 16
    alpha: float = 16.0
    targets: str = "both"
    seed: int = 0
    warmup: int = 10
    accumulate: int = 1  # passes that a step's pictures are split into, on each process
    times: int = 1  # how often a patch is used in a step
    drop: float = 0.1
    keep: float = 0.3  # share of pictures that teach what is to stay as it is
    quantize: str = "none"
    checkpoint_layers: bool = False
    fit: str = "crop"
    flip: bool = False
    dtype: str = "float32"

    def check(self) -> None:
        """Raise BitDanceError, in the words of the options, for values that no run can have."""
        for name, least, most in (
            ("steps", 1, 10**7), ("batch", 1, 2**16), ("rank", 1, 4096), ("accumulate", 1, 2**16), ("times", 1, 64),
            ("seed", 0, 2**64 - 1), ("warmup", 0, 10**7),
        ):  # fmt: skip
            whole_number(f"--{name}", getattr(self, name), least, most)
        for name, most in (("lr", 1.0), ("alpha", 1e6)):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 < value <= most):
                raise BitDanceError(f"--{name} must be a number above 0 and at most {most:g}, found {value}")
        for name in ("drop", "keep"):
            if not 0 <= getattr(self, name) < 1:
                raise BitDanceError(f"--{name} must be a share from 0 to below 1, found {getattr(self, name)}")
        if self.adapter == WHOLE and self.quantize != "none":
            raise BitDanceError("--quantize is for frozen weights, and --full trains all; leave one of them out")
        if self.adapter == "dora" and self.quantize != "none":
            raise BitDanceError("--adapter dora measures the weights, which --quantize rounds; use --adapter lora")

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
        """Return the learning rate of a step, counted from 0: a linear rise, then half a cosine down to a tenth."""
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * done))

    def differences(self, other: dict[str, object]) -> list[str]:
        """Describe what a stored run had otherwise: "lr 0.001 -> 0.01"."""
        own = dataclasses.asdict(self)
        return [f"{name} {other.get(name)} -> {value}" for name, value in own.items() if other.get(name) != value]


def defaults_for(config: BitDanceConfig | ImageNetConfig, is_whole: bool, pictures: int) -> dict[str, float | int]:
    """Return steps, batch, lr, times and warm-up for a model.

    Those of small models are measured (docs/finetuning.md); those of the 14B models are not: they follow the published
    training (docs/facts.md#training) and what LoRAs of such models commonly use.
    """
    width = config.width if isinstance(config, ImageNetConfig) else config.backbone.hidden_size
    if width < SMALL:
        return {"steps": 400, "batch": 16, "lr": 3e-4 if is_whole else 2e-3, "times": 2, "warmup": 10}
    # thirty looks at each picture, as far as that is neither too few steps nor too many
    steps = min(4000, max(500, 30 * pictures // 4))
    return {"steps": steps, "batch": 4, "lr": 1e-5 if is_whole else 1e-4, "times": 1, "warmup": 50}
