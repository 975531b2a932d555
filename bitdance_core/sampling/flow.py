"""Rectified flow from noise (t = 0) to bits (t = 1): x_t = (1 - t) noise + t bits. Functions of tensors, no modules.

The head predicts the clean bits; every sampler integrates the velocity that the prediction implies, in float32
(docs/facts.md, "Sampler").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BitDanceError, whole_number

T_END = 0.95  # the time grid ends here; one closing Euler step covers the rest
MIN_REMAINING = 0.05  # lower bound of 1 - t where a prediction becomes a velocity
SAME_TIME = 1e-6  # times closer than this are equal

# x_t [n, P, C] and the index of a time of the schedule -> predicted bits, one row of n per guidance branch
Predict = Callable[[Tensor, int], Tensor]
# the same arguments -> dx/dt [n, P, C], guided where the schedule is
Velocity = Callable[[Tensor, int], Tensor]
# x [n, P, C], v = dx/dt there, t, dt, the step's noise or None, its scale, and `ahead`, which maps an estimate of
# x at t + dt to the velocity there -> x at t + dt
Step = Callable[[Tensor, Tensor, float, float, Tensor | None, float, Callable[[Tensor], Tensor]], Tensor]


def euler_maruyama(x, v, t, dt, noise, scale, ahead):
    """Step along the drift and add noise, as the published pipeline does.

    score = (t v - x) / ((1-t)^2 + t (1-t)) = (t v - x) / (1-t), so drift = v + (1-t) score = (1+t) v - x. Noise of
    another scale s takes s^2 of the score's share (s = 0: the deterministic flow).
    """
    drift = (1 + t) * v - x if scale == 1 else v + scale**2 * (t * v - x)
    return x + dt * drift + scale * (2 * (1 - t) * dt) ** 0.5 * noise


def euler(x, v, t, dt, noise, scale, ahead):
    """Step along the velocity."""
    return x + dt * v


def heun(x, v, t, dt, noise, scale, ahead):
    """Step along the mean of the velocities at both ends."""
    return x + dt / 2 * (v + ahead(x + dt * v))


@dataclass(frozen=True)
class Sampler:
    """A step function, and the noise and head evaluations that each of its steps but the closing one needs."""

    step: Step
    draws_noise: bool = False
    evaluations: int = 1
    closes_at_t_end: bool = False  # whether the closing step starts at an unshifted 0.95, as in the published pipeline


SAMPLERS = {
    "euler_maruyama": Sampler(euler_maruyama, draws_noise=True, closes_at_t_end=True),
    "euler": Sampler(euler),
    "heun": Sampler(heun, evaluations=2),
}
DEFAULT_SAMPLER = "euler_maruyama"


def find_sampler(name: str) -> Sampler:
    """Look a sampler up by its name. Raises BitDanceError with the names that exist."""
    if name not in SAMPLERS:
        raise BitDanceError(f"unknown sampler '{name}', have: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


@dataclass(frozen=True)
class Schedule:
    """The times at which the head is evaluated, each followed by a step of the same index in `lengths`.

    At times outside `guided` (from, to) only the conditional branch is evaluated. `noise_scale` multiplies the noise of
    a stochastic sampler.
    """

    sampler: str
    times: tuple[float, ...]
    lengths: tuple[float, ...]
    noise_scale: float = 1.0
    guided: tuple[float, float] = (0.0, 1.0)

    @property
    def noise_draws(self) -> int:
        """Count the noise tensors of one patch: its start, and one per step if the sampler is stochastic."""
        return len(self.times) if SAMPLERS[self.sampler].draws_noise else 1

    @property
    def evaluations(self) -> int:
        """Count the head's evaluations for one patch."""
        return SAMPLERS[self.sampler].evaluations * (len(self.times) - 1) + 1

    @property
    def head_times(self) -> tuple[float, ...]:
        """List the times that condition the head.

        A flow that starts closer to the bits than any step of a fresh image uses the closing step's time, because the
        head was not trained on later ones.
        """
        return self.times if len(self.times) > 1 else (min(self.times[0], T_END),)

    def is_guided(self, index: int) -> bool:
        """Whether guidance applies at the time of that index."""
        return self.guided[0] <= self.times[index] <= self.guided[1]


def make_schedule(sampler: str, num_steps: int, time_shift: float = 1.0, start: float = 0.0) -> Schedule:
    """Make `num_steps` steps over [start, 0.95], time-shifted, and the closing step to 1 (so num_steps + 1 times).

    A start beyond the last step leaves the closing step alone. Raises BitDanceError for an unknown sampler or a
    number of steps below 1.
    """
    kind = find_sampler(sampler)
    num_steps = whole_number("steps", num_steps, least=1)
    # the inverse of the shift below
    unshifted = 1 / (1 + (1 / start - 1) / time_shift) if start > 0 else 0.0
    if unshifted >= T_END:
        return Schedule(sampler, (start,), (1 - start,))
    t = torch.linspace(unshifted, T_END, num_steps + 1)
    t = (1 / time_shift) / (1 / time_shift + (1 / t - 1))
    lengths = t.diff()
    # the running time is the float32 sum of the steps, not the grid itself, as in the published pipeline
    times = (start + torch.cat((torch.zeros(1), lengths.cumsum(0)))).tolist()
    if kind.closes_at_t_end:
        times[-1] = T_END
    return Schedule(sampler, tuple(times), (*lengths.tolist(), 1 - times[-1]))


def plan_noise(shape: tuple[int, int, int], draws: int, generator: torch.Generator, pin_memory: bool = False) -> Tensor:
    """Draw one patch's noise, float32 [draws, n, P, C] in drawing order, on the generator's device."""
    noise = torch.empty((draws, *shape), device=generator.device, pin_memory=pin_memory)
    for draw in noise:  # one call per draw: the numbers equal those of separate draws, whatever the shape
        draw.normal_(generator=generator)
    return noise


def remaining(t: float | Tensor) -> float | Tensor:
    """Return 1 - t, bounded below, by which a prediction becomes a velocity. A number stays one: on a GPU a tensor of
    the CPU would be made, bounded and passed at every evaluation.
    """
    return max(1 - t, MIN_REMAINING) if isinstance(t, float) else (1 - t).clamp_min(MIN_REMAINING)


def velocity_from_x(x_pred: Tensor, x_t: Tensor, t: float | Tensor) -> Tensor:
    """Return dx/dt of the straight path through x_t that ends in x_pred; t is a number, or broadcastable to both."""
    return (x_pred - x_t) / remaining(t)


def guide(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Apply classifier-free guidance (Ho & Salimans 2022)."""
    return uncond + scale * (cond - uncond)


def guided_velocity(x_pred: Tensor, x_t: Tensor, t: float | Tensor, guidance: float | Tensor) -> Tensor:
    """Return dx/dt at x_t [n, P, C] from n predictions, or from 2n (conditional, then unconditional) with guidance."""
    if len(x_pred) == len(x_t):
        return velocity_from_x(x_pred, x_t, t)
    cond, uncond = velocity_from_x(x_pred.unflatten(0, (2, -1)), x_t, t)
    return guide(cond, uncond, guidance)


@dataclass(frozen=True)
class Known:
    """Bits that a patch's flow starts from: `bits` [n, P, C], +-1, and `until` [n, P], each token's start time.

    Until its start time a token stays on the straight path from its noise to its bits. A start time of 1 or more keeps
    the token.
    """

    bits: Tensor
    until: Tensor

    def repeat(self, times: int) -> Known:
        """Repeat the batch."""
        return Known(self.bits.repeat(times, 1, 1), self.until.repeat(times, 1))

    def clamp(self, x: Tensor, t: float, since: float, noise: Tensor) -> Tensor:
        """Put tokens back on their path at time t, where they had not started by time `since`."""
        path = (1 - t) * noise + t * self.bits
        return torch.where(self.until[..., None] > since + SAME_TIME, path, x)


def sample_patch(
    predict: Predict, noise: Tensor, schedule: Schedule, guidance: float | Tensor, known: Known | None = None
) -> Tensor:
    """Integrate a `predict` that returns the conditional rows and, where guided, the unconditional rows after them."""

    def velocity(x: Tensor, index: int) -> Tensor:
        return guided_velocity(predict(x, index).float(), x, schedule.times[index], guidance)

    return integrate(velocity, noise, schedule, known)


def integrate(velocity: Velocity, noise: Tensor, schedule: Schedule, known: Known | None = None) -> Tensor:
    """Carry noise [draws, n, P, C] along the flow; the sign of the result [n, P, C] is the patch's bits.

    With `known`, the schedule starts where the first token does. No tensor's value is read, so the whole flow can be
    captured as one graph.
    """
    sampler, last = SAMPLERS[schedule.sampler], len(schedule.times) - 1

    def clamped(x: Tensor, index: int) -> Tensor:
        """Clamp x at the end of the step of that index."""
        if known is None:
            return x
        # a shifted schedule may pass 0.95 before euler_maruyama's closing step starts from there
        since = max(schedule.times[: index + 1])
        return known.clamp(x, 1.0 if index == last else schedule.times[index + 1], since, noise[0])

    x = noise[0] if known is None else known.clamp(noise[0], schedule.times[0], -1.0, noise[0])
    for index, (t, dt) in enumerate(zip(schedule.times, schedule.lengths)):
        v = velocity(x, index)
        if index == last:
            x = euler(x, v, t, dt, None, 0.0, None)
        else:
            own_noise = noise[index + 1] if sampler.draws_noise else None

            def ahead(there: Tensor, index: int = index) -> Tensor:
                return velocity(clamped(there, index), index + 1)

            x = sampler.step(x, v, t, dt, own_noise, schedule.noise_scale, ahead)
        x = clamped(x, index)
    return x
