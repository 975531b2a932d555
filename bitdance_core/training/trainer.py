"""The training loop: one process or several, by accelerate. It knows neither files nor folders.

Every step draws its randomness from the seed and its own number, and every process draws that of all pictures and takes
its part. So a resumed run equals an uninterrupted one, and processes together see what one process would see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..errors import BitDanceError
from ..model.class_model import ImageNetModel
from ..model.grid import Grid
from ..model.text_model import BitDance
from .loss import Condition, Corruption, Draws, Kept, velocity_loss
from .order import order
from .settings import Settings

GRADIENT_NORM = 1.0
BETAS, EPSILON = (0.9, 0.95), 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of each parameter
Untouched = Callable[[], AbstractContextManager]  # in it, the model is as it was before training
STEP_DRAWS = 1  # the stream of random numbers of steps; that of the order is 0


@dataclass(frozen=True)
class Batch:
    """Pictures of one size: bits bool [B, C, h, w], and what each is drawn from.

    `others` are conditions, one per picture, that the pictures do not show; None if there are none.
    """

    bits: Tensor
    conditions: Sequence[Condition]
    unconditional: Condition
    grid: Grid
    others: Sequence[Condition] | None = None

    def rows(self, rows: slice) -> Batch:
        others = None if self.others is None else self.others[rows]
        return Batch(self.bits[rows], self.conditions[rows], self.unconditional, self.grid, others)


class Source(Protocol):
    """Pictures in buckets of one size each."""

    counts: Sequence[int]

    def batch(self, bucket: int, chosen: Sequence[int], rng: np.random.Generator) -> Batch: ...


@dataclass(frozen=True)
class Figures:
    """What a finished step reports: the number of finished steps, the loss, and the share of bits predicted wrong."""

    step: int
    loss: float
    wrong: float
    rate: float


class Objective(nn.Module):
    """A model whose forward pass is its loss, as accelerate wraps it."""

    def __init__(self, model: BitDance | ImageNetModel, untouched: Untouched | None) -> None:
        super().__init__()
        self.model, self.untouched = model, untouched

    def forward(self, batch: Batch, draws: Draws, dtype: torch.dtype) -> Tensor:
        """Return loss and share of wrong bits, float32 [2]; gradients flow into the loss alone."""
        device = draws.t.device
        tokens = batch.grid.patchify(torch.where(batch.bits.to(device), 1.0, -1.0).to(dtype))
        keeping = None
        if self.untouched is not None and batch.others is not None:
            keeping = Kept(batch.others, self.untouched)
        return torch.stack(
            velocity_loss(self.model, batch.conditions, batch.unconditional, tokens, batch.grid, draws, keeping)
        )


class Trainer:
    """Train the parameters of a model, on the device of `accelerator`."""

    def __init__(
        self,
        model: BitDance | ImageNetModel,
        parameters: Mapping[str, nn.Parameter],
        source: Source,
        settings: Settings,
        dtype: torch.dtype,
        accelerator: Accelerator,
        untouched: Untouched | None = None,
    ) -> None:
        """Take the trainable parameters by name; the others are frozen. Raises BitDanceError for an uneven batch.

        Without `untouched` nothing is taught to stay as it is.
        """
        self.settings, self.source, self.dtype, self.accelerator = settings, source, dtype, accelerator
        self.part = settings.split(accelerator.num_processes)
        self.parameters = dict(parameters)
        self.corruption = Corruption(settings.drop, keep=settings.keep, times=settings.times)
        self.time_shift = model.config.head.time_shift
        optimizer = torch.optim.AdamW(list(parameters.values()), settings.lr, BETAS, EPSILON, weight_decay=0.0)
        self.objective, self.optimizer = accelerator.prepare(Objective(model, untouched), optimizer)

    def run(self, first: int = 0, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Figures]:
        """Train from step `first` on, and yield after each step. Stops early, on all processes, once any should stop.

        Raises BitDanceError if the loss is no number any more.
        """
        steps = islice(order(self.source.counts, self.settings.batch, self.settings.seed), first, self.settings.steps)
        for step, (bucket, chosen) in enumerate(steps, start=first):
            rate = self.settings.rate(step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss, wrong = self._step(step, bucket, chosen).tolist()
            if not np.isfinite(loss):
                raise BitDanceError(f"the training diverged at step {step + 1} (its loss is {loss}); lower --lr")
            yield Figures(step + 1, loss, wrong, rate)
            stop = torch.tensor(float(should_stop()), device=self.accelerator.device)
            if self.accelerator.reduce(stop, "sum") > 0:
                return

    def _step(self, step: int, bucket: int, chosen: Sequence[int]) -> Tensor:
        """Take one step of the optimizer; return mean loss and share of wrong bits of all processes."""
        rng = np.random.default_rng((self.settings.seed, STEP_DRAWS, step))
        batch = self.source.batch(bucket, chosen, rng)
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        grid, bits = batch.grid, batch.bits.shape[1]
        shape = len(chosen), grid.num_patches, grid.tokens_per_patch, bits
        draws = Draws.make(shape, self.corruption, self.time_shift, generator)
        device, figures = self.accelerator.device, []
        for number in range(self.settings.accumulate):
            start = (self.accelerator.process_index * self.settings.accumulate + number) * self.part
            rows = slice(start, start + self.part)
            with self.accelerator.accumulate(self.objective):
                result = self.objective(batch.rows(rows), draws.rows(rows).to(device), self.dtype)
                self.accelerator.backward(result[0])
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(list(self.parameters.values()), GRADIENT_NORM)
                self.optimizer.step()
                self.optimizer.zero_grad()
            figures.append(result.detach())
        return self.accelerator.reduce(torch.stack(figures).mean(0), "mean")

    def state(self) -> dict[str, Tensor]:
        """Return the trained parameters and the optimizer's moments, by name."""
        tensors = {f"parameter.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            own = self.optimizer.state.get(parameter, {})
            tensors |= {f"{moment}.{name}": own[moment] for moment in MOMENTS if moment in own}
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Go back to a state of `state()` after `step` steps."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"parameter.{name}"])
                moments = {m: tensors[f"{m}.{name}"].to(parameter.device).clone() for m in MOMENTS}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
