"""A patch's whole flow through the head, as one function of tensors."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .errors import Cancel, check_cancelled
from .flow import Known, Schedule, integrate
from .head import DiffusionHead, steps_at_once


def flow_of(
    head: DiffusionHead, schedule: Schedule, guidance: float | Tensor, cancel: Cancel | None = None
) -> Callable[..., Tensor]:
    """A patch's whole flow as a function of tensors: noise [draws, n, P, C], time [S, W], cond [B, P, W] and, where
    there are known bits, these [n, P, C] and until when [n, P] -> what the flow arrives at [n, P, C].

    Conditions of two branches are guided, with guidance > 1 (a tensor always is), where the schedule says so.
    """
    guided = isinstance(guidance, Tensor) or guidance > 1

    def flow(noise: Tensor, time: Tensor, cond: Tensor, *known: Tensor) -> Tensor:
        modulations = _by_step(head, time, cond)

        def velocity(x_t: Tensor, step: int) -> Tensor:
            check_cancelled(cancel)
            rows = modulations(step)
            if not (guided and schedule.is_guided(step)):
                rows = [part[: len(x_t)] for part in rows]
            return head.velocity(x_t, rows, schedule.times[step], guidance)

        return integrate(velocity, noise, schedule, Known(*known) if known else None)

    return flow


def _by_step(head: DiffusionHead, time: Tensor, cond: Tensor) -> Callable[[int], list[Tensor]]:
    """A step's modulations, computed for several steps in one pass; steps are asked for in their order."""
    count = steps_at_once(head.config, *cond.shape[:2], cond.element_size())
    held: list[Tensor] = []
    first = -count

    def at(step: int) -> list[Tensor]:
        nonlocal held, first
        if step >= first + count:
            first = step
            held = []  # given back before there are new ones
            held = head.modulations(time[first : first + count, None, None], cond)
        return [modulation[step - first] for modulation in held]

    return at
