"""One patch through the head: its whole flow as one function of tensors, called or replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ..errors import BitDanceError, Cancel, check_cancelled
from ..model.fused import FusedHead, Weights, find_kernels, find_products, plain_weights
from ..model.graphs import Graphs
from ..model.head import DiffusionHead, steps_at_once
from ..model.operations import OneDnnLinear
from ..parts import HEAD
from .flow import Known, Schedule, guided_velocity, integrate, remaining
from .plan import Step

# x_t [n, P, C], modulations [B, P, k, W] (B = n, or 2n with guidance), t, guidance -> dx/dt [n, P, C], float32
HeadVelocity = Callable[[Tensor, Sequence[Tensor], float | Tensor, float | Tensor], Tensor]


def head_velocity(
    head: DiffusionHead, x_t: Tensor, modulations: Sequence[Tensor], t: float | Tensor, guidance: float | Tensor
) -> Tensor:
    """Evaluate the head once: dx/dt at x_t, guided where the modulations have rows for two branches."""
    branches = modulations[0].shape[0] // x_t.shape[0]
    x = x_t.to(modulations[0].dtype)
    x_pred = head.predict(x if branches == 1 else x.repeat(branches, 1, 1), modulations)
    return guided_velocity(x_pred.float(), x_t, t, guidance)


def fused_velocity(
    head: DiffusionHead,
    device: torch.device | str,
    dtype: torch.dtype,
    weights: Weights = plain_weights,
    with_products: bool = False,
) -> HeadVelocity | None:
    """`head_velocity` with Triton's kernels, or None where they are not to be had (see `find_kernels`).

    `weights` is for hosts whose layers are not PyTorch's. `with_products` also computes products by Triton: fewer
    launches, but no card has shown yet whether it is faster.
    """
    device, config = torch.device(device), head.config
    kernels = find_kernels(device, dtype, config.width)
    if kernels is None:
        return None
    products = find_products(device, dtype, config.width, config.bits) if with_products else None
    evaluate = FusedHead(head, kernels, products, weights)

    def velocity(x_t: Tensor, modulations: Sequence[Tensor], t: float, guidance: float | Tensor) -> Tensor:
        return evaluate(x_t, modulations, remaining(t), guidance)

    return velocity


class CompiledVelocity:
    """`head_velocity` by torch.compile, which takes the options: norms, modulations, gates and guidance become few
    kernels. The first image of a shape waits for the compiler.

    With `frozen` the weights become constants, which the compiler packs for this CPU: a second copy of them in memory.
    Weights that change later are followed only after `renew`.
    """

    def __init__(self, head: DiffusionHead, frozen: bool = False, **options: Any) -> None:
        self.head, self.frozen, self.options = head, frozen, options
        # where the compiler does not know how many rows matrices meet; else it packs them for MKL
        self.marks_rows = frozen and isinstance(head.input_proj, OneDnnLinear)
        self.program = self._compile()

    def renew(self) -> None:
        """Compile again where weights are constants, at the next evaluation."""
        if self.frozen:
            self.program = self._compile()

    def _compile(self) -> Callable[..., Tensor]:
        if not self.frozen:
            return torch.compile(partial(head_velocity, self.head), **self.options)
        from torch._inductor import config  # slow to import

        # PyTorch keeps programs by code object: one of its own meets none of other heads, or of earlier weights
        function = FunctionType(head_velocity.__code__.replace(), head_velocity.__globals__)
        # constants need no checks at every evaluation; older PyTorch has no such choice
        unchecked = getattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe", None)
        options = {"options": {"guard_filter_fn": unchecked}} if unchecked else {}
        program = torch.compile(partial(function, self.head), **options | self.options)
        return config.patch(freezing=True, cpp_wrapper=True)(program)

    def __call__(self, x_t: Tensor, modulations: Sequence[Tensor], *numbers: float | Tensor) -> Tensor:
        # a Python number would be a constant of the program, and every other value would compile it again
        tensors = [n if isinstance(n, Tensor) else torch.full((), n, device=x_t.device) for n in numbers]
        if self.marks_rows:
            for tensor in (x_t, *modulations):
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
        return self.program(x_t, modulations, *tensors)


class PatchSampler:
    """Sample patches, one call each; the time embedding of a schedule is computed once."""

    def __init__(
        self,
        head: DiffusionHead,
        device: torch.device | str,
        dtype: torch.dtype,
        cancel: Cancel | None = None,
        graphs: Graphs | None = None,
        velocity: HeadVelocity | None = None,
    ) -> None:
        self.head, self.device, self.dtype = head, device, dtype
        self.cancel, self.graphs = cancel, graphs
        self.velocity = velocity or fused_velocity(head, device, dtype) or partial(head_velocity, head)
        self._times: tuple[float, ...] = ()
        self._time: Tensor | None = None
        self._finite: Tensor | None = None

    def __call__(self, step: Step, noise: Tensor, cond: Tensor, known: Known | None) -> Tensor:
        """Carry noise [draws, n, P, C] to the end of the step's flow [n, P, C], conditioned on cond [B, P, D]."""
        inputs = self._embed_times(step.schedule), self.head.cond_embed(cond)
        # pinned memory, so that the host does not wait for all work before the copy
        inputs = noise.to(self.device, non_blocking=noise.is_pinned()), *inputs
        if known is not None:
            inputs = *inputs, known.bits, known.until
        schedule, guidance = step.schedule, step.guidance
        if self.graphs is None or HEAD in self.graphs.reasons:
            sample = self.flow(schedule, guidance, guidance > 1, self.cancel)(*inputs)
        else:
            for _ in range(schedule.evaluations):  # a replayed graph calls nothing
                check_cancelled(self.cancel)
            # guidance as a tensor, since a guidance schedule changes it from patch to patch
            scale = torch.full((), guidance, device=self.device)
            flow = partial(self._flow_by_scale, schedule, guidance > 1)
            sample = self.graphs.run(HEAD, flow, (scale, *inputs), (schedule, guidance > 1))
        self._note(sample.isfinite().all())
        return sample

    def flow(
        self, schedule: Schedule, guidance: float | Tensor, is_guided: bool, cancel: Cancel | None = None
    ) -> Callable[..., Tensor]:
        """Make a patch's whole flow as a function of tensors: noise [draws, n, P, C], time [S, W], cond [B, P, W] and
        with known bits those [n, P, C] and their start times [n, P] -> the end of the flow [n, P, C].
        """

        def flow(noise: Tensor, time: Tensor, cond: Tensor, *known: Tensor) -> Tensor:
            modulations = _modulations_by_step(self.head, time, cond)

            def velocity(x_t: Tensor, index: int) -> Tensor:
                check_cancelled(cancel)
                rows = modulations(index)
                if not (is_guided and schedule.is_guided(index)):
                    rows = [part[: len(x_t)] for part in rows]
                return self.velocity(x_t, rows, schedule.times[index], guidance)

            return integrate(velocity, noise, schedule, Known(*known) if known else None)

        return flow

    def check_finite(self) -> None:
        """Raise BitDanceError where any sample overflowed. The host waits for the device here."""
        if self._finite is not None and not self._finite:
            raise BitDanceError(
                f"the model's numbers overflow in {self.dtype}; use bfloat16 or float32, or check its files"
            )

    def _embed_times(self, schedule: Schedule) -> Tensor:
        if schedule.head_times != self._times:
            self._times = schedule.head_times
            self._time = self.head.time_embed(torch.tensor(self._times, device=self.device), self.dtype)
        return self._time

    def _flow_by_scale(self, schedule: Schedule, is_guided: bool, scale: Tensor, *inputs: Tensor) -> Tensor:
        return self.flow(schedule, scale if is_guided else 1.0, is_guided)(*inputs)

    def _note(self, finite: Tensor) -> None:
        """Check the first sample at once, because damaged weights show there; others at the end."""
        if self._finite is None:
            self._finite = finite
            self.check_finite()
        else:
            self._finite &= finite


def _modulations_by_step(head: DiffusionHead, time: Tensor, cond: Tensor) -> Callable[[int], list[Tensor]]:
    """Return a step's modulations, computed for several steps in one pass. Steps must come in ascending order."""
    count = steps_at_once(head.config, *cond.shape[:2], cond.element_size())
    computed: list[Tensor] = []
    first = -count

    def at(step: int) -> list[Tensor]:
        nonlocal computed, first
        if step >= first + count:
            first = step
            computed = []  # freed before the next ones are allocated
            computed = head.modulations(time[first : first + count, None, None], cond)
        return [modulation[step - first] for modulation in computed]

    return at
