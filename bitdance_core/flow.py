"""Rectified flow from noise (t = 0) to bits (t = 1): x_t = (1 - t) noise + t bits. Functions, no modules.

The head predicts the clean bits; every sampler integrates the velocity they imply, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import BitDanceError, whole_number

T_END = 0.95  # the grid ends here; one closing Euler step goes the rest of the way
MIN_REMAINING = 0.05  # 1 - t is not taken smaller when a prediction becomes a velocity

SAMPLERS = ("euler_maruyama", "euler", "heun")

# x_t [n, P, C] and the index of a time of the schedule -> predicted bits, one row of n per guidance branch
Predict = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Schedule:
    """Where the head is evaluated: at each of `times`, followed by a step of the same index in `lengths`."""

    sampler: str
    times: tuple[float, ...]
    lengths: tuple[float, ...]

    @property
    def noise_draws(self) -> int:
        """Tensors of noise that one patch takes: its start, and one a step if the sampler is stochastic."""
        return len(self.times) if self.sampler == "euler_maruyama" else 1

    @property
    def evaluations(self) -> int:
        """How often one patch asks the head: Heun's steps ask twice, the closing one once."""
        return len(self.times) if self.sampler != "heun" else 2 * len(self.times) - 1


def make_schedule(sampler: str, num_steps: int, time_shift: float = 1.0) -> Schedule:
    """`num_steps` steps over [0, 0.95], time-shifted, and the closing step to 1 (so num_steps + 1 times)."""
    if sampler not in SAMPLERS:
        raise BitDanceError(f"unknown sampler '{sampler}', have: {', '.join(SAMPLERS)}")
    t = torch.linspace(0, T_END, whole_number("steps", num_steps, least=1) + 1)
    t = (1 / time_shift) / (1 / time_shift + (1 / t - 1))
    lengths = t.diff()
    # the running time is the float32 sum of the steps, not the grid itself: so it is in the published pipeline
    times = torch.cat((torch.zeros(1), lengths.cumsum(0))).tolist()
    if sampler == "euler_maruyama":  # its closing step starts from an unshifted 0.95
        times[-1] = T_END
    return Schedule(sampler, tuple(times), (*lengths.tolist(), 1 - times[-1]))


def plan_noise(shape: tuple[int, int, int], draws: int, generator: torch.Generator) -> Tensor:
    """One patch's noise, float32 [draws, n, P, C] in drawing order, on the generator's device."""
    noise = torch.empty((draws, *shape), device=generator.device)
    for draw in noise:  # one call a draw: the numbers are those of separate draws whatever the shape
        draw.normal_(generator=generator)
    return noise


def velocity_from_x(x_pred: Tensor, x_t: Tensor, t: float | Tensor) -> Tensor:
    """dx/dt of the straight path through x_t that ends in x_pred; t a number, or broadcastable to both."""
    return (x_pred - x_t) / torch.as_tensor(1 - t).clamp_min(MIN_REMAINING)


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022)."""
    return uncond + scale * (cond - uncond)


def sample_patch(predict: Predict, noise: Tensor, schedule: Schedule, guidance: float) -> Tensor:
    """Carry noise [draws, n, P, C] along the flow; the sign of the result [n, P, C] is the patch's bits.

    With guidance > 1, `predict` returns the conditional rows, then the unconditional ones; else the conditional alone.
    """

    def velocity(x: Tensor, index: int) -> Tensor:
        x_pred = predict(x, index).float()
        t = schedule.times[index]
        if guidance <= 1:
            return velocity_from_x(x_pred, x, t)
        cond, uncond = x_pred.chunk(2)
        return guide(velocity_from_x(cond, x, t), velocity_from_x(uncond, x, t), guidance)

    x = noise[0]
    last = len(schedule.times) - 1
    for index, (t, dt) in enumerate(zip(schedule.times, schedule.lengths)):
        v = velocity(x, index)
        if index == last:
            x = x + dt * v
        elif schedule.sampler == "euler_maruyama":
            # score = (t v - x) / ((1-t)^2 + t (1-t)) = (t v - x) / (1-t), so drift = v + (1-t) score = (1+t) v - x
            x = x + dt * ((1 + t) * v - x) + (2 * (1 - t) * dt) ** 0.5 * noise[index + 1]
        elif schedule.sampler == "heun":  # velocity(index + 1) is that of the time this step arrives at
            x = x + dt / 2 * (v + velocity(x + dt * v, index + 1))
        else:
            x = x + dt * v
    return x
