"""What a user chooses about sampling, checked and completed with the model's defaults in one place."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

from ..errors import BitDanceError, shorten, whole_number
from ..model.class_config import ImageNetConfig
from ..model.text_config import BitDanceConfig
from .flow import DEFAULT_SAMPLER, Schedule, find_sampler, make_schedule

MAX_STEPS = 100_000  # of a patch; a thousand are already more than any sampler needs
MAX_NUMBER = sys.float_info.max  # Python's whole numbers go on beyond it
GUIDANCE_SCHEDULES = ("constant", "linear")


def option(default: Any, help: str) -> Any:
    """Declare an option of `Sampling`; `help` is its line in the command line's help."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Sampling:
    """How to draw. A field with a help line is an option of `generate` in Python and on the command line.

    `last_steps` and `last_guidance` are the values for the last patch, approached linearly (None: the first patch's).
    With the `schedule` "linear" guidance rises linearly from 1 at the first patch towards `guidance`, which it would
    reach one patch after the last. Raises BitDanceError for invalid settings.
    """

    sampler: str
    steps: int
    guidance: float
    time_shift: float = option(1.0, "replaces the model's own time shift")
    last_steps: int | None = option(None, "steps of the last patch, approached linearly")
    last_guidance: float | None = option(None, "guidance of the last patch, approached linearly")
    guidance_interval: tuple[float, float] = option((0.0, 1.0), "times in [0, 1] between which guidance applies")
    noise_scale: float = option(1.0, "multiplies the noise of euler_maruyama's steps; 0: the deterministic flow")
    schedule: str = option("constant", f"of guidance over the patches: {' or '.join(GUIDANCE_SCHEDULES)}")

    @classmethod
    def for_model(
        cls,
        config: BitDanceConfig | ImageNetConfig,
        sampler: str = DEFAULT_SAMPLER,
        steps: int | None = None,
        guidance: float | None = None,
        **options: Any,
    ) -> Sampling:
        """Fill in the model's own settings where a value is None or absent.

        `options` are fields of this class. Raises BitDanceError for an unknown option or an invalid value.
        """
        options = {name: value for name, value in options.items() if value is not None}
        if unknown := options.keys() - option_names():
            raise BitDanceError(f"unknown option '{min(unknown)}', have: {', '.join(option_names())}")
        defaults = config.defaults
        # a last value for guidance is a schedule of its own
        schedule = "constant" if "last_guidance" in options else defaults.schedule
        return cls(
            sampler,
            defaults.steps if steps is None else steps,
            defaults.guidance if guidance is None else guidance,
            **{"time_shift": config.head.time_shift, "schedule": schedule, **options},
        )

    def __post_init__(self) -> None:
        find_sampler(self.sampler)
        if self.schedule not in GUIDANCE_SCHEDULES:
            have = ", ".join(GUIDANCE_SCHEDULES)
            raise BitDanceError(f"unknown guidance schedule '{self.schedule}', have: {have}")
        if self.schedule != "constant" and self.last_guidance is not None:
            raise BitDanceError(
                f"the guidance schedule '{self.schedule}' and last_guidance are two schedules; leave one of them out"
            )
        whole_number("steps", self.steps, least=1, most=MAX_STEPS)
        if self.last_steps is not None:
            whole_number("last_steps", self.last_steps, least=1, most=MAX_STEPS)
        numbers = {"guidance": self.guidance, "last_guidance": self.last_guidance, "noise_scale": self.noise_scale}
        for name, value in numbers.items():
            if value is not None and not (isinstance(value, Real) and 0 <= value <= MAX_NUMBER):
                raise BitDanceError(f"{name} must be a number of at least 0, found {shorten(value)}")
        if not (isinstance(self.time_shift, Real) and 0.01 <= self.time_shift <= 100):
            raise BitDanceError(f"time_shift must lie between 0.01 and 100, found {shorten(self.time_shift)}")
        times = self.guidance_interval
        is_pair = isinstance(times, tuple | list) and len(times) == 2 and all(isinstance(t, Real) for t in times)
        if not (is_pair and 0 <= times[0] <= times[1] <= 1):
            raise BitDanceError(
                f"guidance_interval must be two times in [0, 1] in ascending order, found {shorten(times)}"
            )

    @property
    def branches(self) -> int:
        """Count the guidance branches: 2 (conditional and unconditional) where any patch is guided, else 1."""
        return 2 if max(self.guidance, self.last_guidance or 0) > 1 else 1

    def guidance_of(self, patch: int, patches: int) -> float:
        """Return a patch's guidance."""
        if self.schedule == "linear" and self.branches > 1:
            return float(1 + (self.guidance - 1) * patch / patches)
        return float(_between(self.guidance, self.last_guidance, patch, patches))

    def is_separate(self, patch: int, patches: int) -> bool:
        """Whether each branch draws the patch for itself: where "linear" does not guide yet (docs/facts.md)."""
        return self.schedule == "linear" and self.branches > 1 and self.guidance_of(patch, patches) <= 1

    def schedule_of(self, patch: int, patches: int, start: float = 0.0) -> Schedule:
        """Make a patch's schedule from time `start` on; its number of steps does not depend on `start`."""
        steps = round(_between(self.steps, self.last_steps, patch, patches))
        schedule = make_schedule(self.sampler, steps, self.time_shift, start)
        return replace(schedule, noise_scale=self.noise_scale, guided=self.guidance_interval)


def option_names() -> list[str]:
    """List the options of `Sampling` beside sampler, steps and guidance."""
    return [f.name for f in dataclasses.fields(Sampling) if "help" in f.metadata]


def _between(first: float, last: float | None, patch: int, patches: int) -> float:
    """Interpolate from `first` to `last`; exactly `first` where they are equal."""
    if last is None or last == first or patches == 1:
        return first
    return first + (last - first) * patch / (patches - 1)
