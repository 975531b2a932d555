"""Rectified flow from noise (t = 0) to bits (t = 1): x_t = (1 - t) noise + t bits. Functions, no modules.

The head predicts the clean bits; every sampler integrates the velocity they imply, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor

from .errors import BitDanceError, whole_number

T_END = 0.95  # the grid ends here; one closing Euler step goes the rest of the way
MIN_REMAINING = 0.05  # 1 - t is not taken smaller when a prediction becomes a velocity
SAME_TIME = 1e-6  # times that differ by less are one

SAMPLERS = ("euler_maruyama", "euler", "heun")
GUIDANCE_SCHEDULES = ("constant", "linear")

# x_t [n, P, C] and the index of a time of the schedule -> predicted bits, one row of n per guidance branch
Predict = Callable[[Tensor, int], Tensor]
# the same -> dx/dt [n, P, C], guided where the schedule is
Velocity = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Schedule:
    """Where the head is evaluated: at each of `times`, followed by a step of the same index in `lengths`.

    At times outside `guided` (from, to) only the conditional half is evaluated. `noise_scale` multiplies the noise of
    the stochastic sampler.
    """

    sampler: str
    times: tuple[float, ...]
    lengths: tuple[float, ...]
    noise_scale: float = 1.0
    guided: tuple[float, float] = (0.0, 1.0)

    @property
    def noise_draws(self) -> int:
        """Tensors of noise that one patch takes: its start, and one a step if the sampler is stochastic."""
        return len(self.times) if self.sampler == "euler_maruyama" else 1

    @property
    def evaluations(self) -> int:
        """How often one patch asks the head: Heun's steps ask twice, the closing one once."""
        return len(self.times) if self.sampler != "heun" else 2 * len(self.times) - 1

    @property
    def head_times(self) -> tuple[float, ...]:
        """The times that the head is told. A flow that starts closer to the bits than any step of a fresh picture is
        told the closing step's time: beyond it, predictions are not to be relied on.
        """
        return self.times if len(self.times) > 1 else (min(self.times[0], T_END),)

    def is_guided(self, index: int) -> bool:
        return self.guided[0] <= self.times[index] <= self.guided[1]


@dataclass(frozen=True)
class Sampling:
    """How to draw: what the sampler's user chooses. Patches may differ from the first to the last, linearly.

    `last_steps` and `last_guidance` are the values for the last patch (None: as for the first). The `schedule` "linear"
    is the class-conditional models' own: guidance grows from 1 with the patches, and would reach its value just after
    the last. Raises BitDanceError for what cannot be.
    """

    sampler: str
    steps: int
    guidance: float
    time_shift: float = 1.0
    last_steps: int | None = None
    last_guidance: float | None = None
    guided: tuple[float, float] = (0.0, 1.0)
    noise_scale: float = 1.0
    schedule: str = "constant"

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise BitDanceError(f"unknown sampler '{self.sampler}', have: {', '.join(SAMPLERS)}")
        if self.schedule not in GUIDANCE_SCHEDULES:
            have = ", ".join(GUIDANCE_SCHEDULES)
            raise BitDanceError(f"unknown guidance schedule '{self.schedule}', have: {have}")
        if self.schedule != "constant" and self.last_guidance is not None:
            raise BitDanceError(
                f"the guidance schedule '{self.schedule}' and last_guidance are two schedules; leave one of them out"
            )
        whole_number("steps", self.steps, least=1)
        if self.last_steps is not None:
            whole_number("last_steps", self.last_steps, least=1)
        numbers = {"guidance": self.guidance, "last_guidance": self.last_guidance, "noise_scale": self.noise_scale}
        for name, value in numbers.items():
            if value is not None and not (isinstance(value, Real) and 0 <= value < math.inf):
                raise BitDanceError(f"{name} must be a number of at least 0, found {value!r}")
        if not (isinstance(self.time_shift, Real) and 0.01 <= self.time_shift <= 100):
            raise BitDanceError(f"time_shift must lie between 0.01 and 100, found {self.time_shift!r}")
        times = self.guided
        is_pair = isinstance(times, tuple | list) and len(times) == 2 and all(isinstance(t, Real) for t in times)
        if not (is_pair and 0 <= times[0] <= times[1] <= 1):
            raise BitDanceError(f"the guidance interval must be two times in [0, 1], in their order, found {times}")

    @property
    def branches(self) -> int:
        """2 where any patch is guided, so that there must be an unconditional branch, else 1."""
        return 2 if max(self.guidance, self.last_guidance or 0) > 1 else 1

    def guidance_of(self, patch: int, patches: int) -> float:
        if self.schedule == "linear" and self.branches > 1:
            return float(1 + (self.guidance - 1) * patch / patches)
        return float(_between(self.guidance, self.last_guidance, patch, patches))

    def draws_apart(self, patch: int, patches: int) -> bool:
        """Where "linear" does not guide yet, the two branches draw the patch separately, each for itself to read on."""
        return self.schedule == "linear" and self.branches > 1 and self.guidance_of(patch, patches) <= 1

    def schedule_of(self, patch: int, patches: int, start: float = 0.0) -> Schedule:
        """A patch's schedule, from time `start` on; its count of steps does not depend on `start`."""
        steps = round(_between(self.steps, self.last_steps, patch, patches))
        schedule = make_schedule(self.sampler, steps, self.time_shift, start)
        return replace(schedule, noise_scale=self.noise_scale, guided=self.guided)


def _between(first: float, last: float | None, patch: int, patches: int) -> float:
    """Exactly `first` where there is no other last."""
    if last is None or last == first or patches == 1:
        return first
    return first + (last - first) * patch / (patches - 1)


def make_schedule(sampler: str, num_steps: int, time_shift: float = 1.0, start: float = 0.0) -> Schedule:
    """`num_steps` steps over [start, 0.95], time-shifted, and the closing step to 1 (so num_steps + 1 times).

    A start beyond the last step leaves only the closing one.
    """
    if sampler not in SAMPLERS:
        raise BitDanceError(f"unknown sampler '{sampler}', have: {', '.join(SAMPLERS)}")
    # the inverse of the shift below
    unshifted = 1 / (1 + (1 / start - 1) / time_shift) if start > 0 else 0.0
    num_steps = whole_number("steps", num_steps, least=1)
    if unshifted >= T_END:
        return Schedule(sampler, (start,), (1 - start,))
    t = torch.linspace(unshifted, T_END, num_steps + 1)
    t = (1 / time_shift) / (1 / time_shift + (1 / t - 1))
    lengths = t.diff()
    # the running time is the float32 sum of the steps, not the grid itself: so it is in the published pipeline
    times = (start + torch.cat((torch.zeros(1), lengths.cumsum(0)))).tolist()
    if sampler == "euler_maruyama":  # its closing step starts from an unshifted 0.95
        times[-1] = T_END
    return Schedule(sampler, tuple(times), (*lengths.tolist(), 1 - times[-1]))


def plan_noise(shape: tuple[int, int, int], draws: int, generator: torch.Generator, pin_memory: bool = False) -> Tensor:
    """One patch's noise, float32 [draws, n, P, C] in drawing order, on the generator's device."""
    noise = torch.empty((draws, *shape), device=generator.device, pin_memory=pin_memory)
    for draw in noise:  # one call a draw: the numbers are those of separate draws whatever the shape
        draw.normal_(generator=generator)
    return noise


def velocity_from_x(x_pred: Tensor, x_t: Tensor, t: float | Tensor) -> Tensor:
    """dx/dt of the straight path through x_t that ends in x_pred; t a number, or broadcastable to both."""
    return (x_pred - x_t) / torch.as_tensor(1 - t).clamp_min(MIN_REMAINING)


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022)."""
    return uncond + scale * (cond - uncond)


def velocity_of(x_pred: Tensor, x_t: Tensor, t: float | Tensor, guidance: float | Tensor) -> Tensor:
    """dx/dt at x_t [n, P, C] of predictions: n for it, or 2n, conditional and then unconditional, which are guided."""
    if len(x_pred) == len(x_t):
        return velocity_from_x(x_pred, x_t, t)
    cond, uncond = x_pred.chunk(2)
    return guide(velocity_from_x(cond, x_t, t), velocity_from_x(uncond, x_t, t), guidance)


@dataclass(frozen=True)
class Known:
    """What a patch's flow starts from instead of noise alone: bits [n, P, C], +-1, and for each token [n, P] the time
    until which it stays on the straight path from its noise to them. From 1 on it never leaves it: it is kept.
    """

    bits: Tensor
    until: Tensor

    def repeat(self, times: int) -> Known:
        """The same for several batches in one."""
        return Known(self.bits.repeat(times, 1, 1), self.until.repeat(times, 1))

    def hold(self, x: Tensor, t: float, since: float, noise: Tensor) -> Tensor:
        """x at time t, where a step that began at time `since` arrived; tokens not yet free then are on their path."""
        path = (1 - t) * noise + t * self.bits
        return torch.where(self.until[..., None] > since + SAME_TIME, path, x)


def sample_patch(
    predict: Predict, noise: Tensor, schedule: Schedule, guidance: float | Tensor, known: Known | None = None
) -> Tensor:
    """`integrate` for a `predict` that returns the conditional rows and, where guided, the unconditional ones after."""

    def velocity(x: Tensor, index: int) -> Tensor:
        return velocity_of(predict(x, index).float(), x, schedule.times[index], guidance)

    return integrate(velocity, noise, schedule, known)


def integrate(velocity: Velocity, noise: Tensor, schedule: Schedule, known: Known | None = None) -> Tensor:
    """Carry noise [draws, n, P, C] along the flow; the sign of the result [n, P, C] is the patch's bits.

    With `known`, the schedule starts where the first token does. No value of a tensor is looked at, so the whole flow
    can be recorded as one graph.
    """

    def arrive(x: Tensor, index: int) -> Tensor:
        """At the end of the step of that index."""
        if known is None:
            return x
        # a shifted schedule may pass 0.95 before euler_maruyama's closing step starts from there
        since = max(schedule.times[: index + 1])
        return known.hold(x, 1.0 if index == last else schedule.times[index + 1], since, noise[0])

    x, scale = noise[0], schedule.noise_scale
    last = len(schedule.times) - 1
    if known is not None:
        x = known.hold(x, schedule.times[0], -1.0, noise[0])
    for index, (t, dt) in enumerate(zip(schedule.times, schedule.lengths)):
        v = velocity(x, index)
        if index == last:
            x = x + dt * v
        elif schedule.sampler == "euler_maruyama":
            # score = (t v - x) / ((1-t)^2 + t (1-t)) = (t v - x) / (1-t), so drift = v + (1-t) score = (1+t) v - x;
            # noise of another scale s takes s^2 of the score's part (s = 0: the deterministic flow)
            drift = (1 + t) * v - x if scale == 1 else v + scale**2 * (t * v - x)
            x = x + dt * drift + scale * (2 * (1 - t) * dt) ** 0.5 * noise[index + 1]
        elif schedule.sampler == "heun":  # velocity(index + 1) is that of the time this step arrives at
            x = x + dt / 2 * (v + velocity(arrive(x + dt * v, index), index + 1))
        else:
            x = x + dt * v
        x = arrive(x, index)
    return x
