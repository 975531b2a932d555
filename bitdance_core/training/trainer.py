"""The training loop: one process or several, by accelerate. It knows neither files nor folders.

Every step draws its randomness from the seed and its own number, and every process draws that of all pictures and takes
its part. So a resumed run equals an uninterrupted one, and processes together see what one process would see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..errors import BitDanceError
from .objective import Objective, Rows
from .optimizer import make_optimizer
from .order import order
from .settings import ADAMW8BIT, Schedule
from .sharding import gathered_all, is_sharded, let_call, placed_like

GRADIENT_NORM = 1.0
STEP_DRAWS = 1  # the stream of random numbers of steps; that of the order is 0

Result = TypeVar("Result")


class Source(Protocol):
    """Pictures in buckets of one size each."""

    counts: Sequence[int]

    def batch(self, bucket: int, chosen: Sequence[int], rng: np.random.Generator) -> Rows: ...


@dataclass(frozen=True)
class Figures:
    """What a finished step reports: the number of finished steps, the loss, the objective's figure, the rate."""

    step: int
    loss: float
    figure: float
    rate: float


class Trainer:
    """Train the parameters of an objective's network, on the device of `accelerator`."""

    def __init__(
        self,
        objective: Objective,
        parameters: Mapping[str, nn.Parameter],
        source: Source,
        settings: Schedule,
        accelerator: Accelerator,
    ) -> None:
        """Take the trainable parameters by name; the others are frozen. Raises BitDanceError for an uneven batch."""
        self.settings, self.source, self.accelerator = settings, source, accelerator
        self.part = settings.split(accelerator.num_processes)
        self.network, self.draw, self.figure = objective, objective.draw, objective.figure
        self.is_sharded = is_sharded(accelerator)
        paths = {parameter: path for path, parameter in objective.named_parameters()}
        optimizer = make_optimizer(settings.optimizer, list(parameters.values()), settings.lr)
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        if self.is_sharded:
            let_call(objective)
        own = dict(objective.named_parameters())  # others, where they are split
        self.parameters = {name: own[paths[parameter]] for name, parameter in parameters.items()}

    def run(self, first: int = 0, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Figures]:
        """Train from step `first` on, and yield after each step. Stops early, on all processes, once any should stop.

        Raises BitDanceError if the loss is no number any more.
        """
        steps = islice(order(self.source.counts, self.settings.batch, self.settings.seed), first, self.settings.steps)
        for step, (bucket, chosen) in enumerate(steps, start=first):
            rate = self.settings.rate(step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss, figure = self._step(step, bucket, chosen).tolist()
            if not np.isfinite(loss):
                raise BitDanceError(f"the training diverged at step {step + 1} (its loss is {loss}); lower --lr")
            yield Figures(step + 1, loss, figure, rate)
            stop = torch.tensor(float(should_stop()), device=self.accelerator.device)
            if self.accelerator.reduce(stop, "sum") > 0:
                return

    def _step(self, step: int, bucket: int, chosen: Sequence[int]) -> Tensor:
        """Take one step of the optimizer; return the mean loss and figure of all processes."""
        rng = np.random.default_rng((self.settings.seed, STEP_DRAWS, step))
        batch = self.source.batch(bucket, chosen, rng)
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        draws = self.draw(batch, generator)
        device, figures = self.accelerator.device, []
        for number in range(self.settings.accumulate):
            start = (self.accelerator.process_index * self.settings.accumulate + number) * self.part
            rows = slice(start, start + self.part)
            with self.accelerator.accumulate(self.objective):
                with self.accelerator.autocast():  # its own, which it puts around the pass itself, but not under FSDP
                    result = self.objective(batch.rows(rows), draws.rows(rows).to(device))
                self.accelerator.backward(result[0])
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(list(self.parameters.values()), GRADIENT_NORM)
                self.optimizer.step()
                self.optimizer.zero_grad()
            figures.append(result.detach())
        return self.accelerator.reduce(torch.stack(figures).mean(0), "mean")

    def state(self) -> dict[str, Tensor]:
        """Return the trained parameters and what the optimizer keeps of each, by name.

        Where weights are split, every process must call it; the main one gets the tensors.
        """
        tensors = {f"parameter.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            own = self.optimizer.state.get(parameter, {})
            tensors |= {f"{kind}.{name}": kept for kind, kept in own.items() if kind != "step"}
        return gathered_all(tensors, self.accelerator.is_main_process)

    def call(self, function: Callable[[], Result]) -> Result:
        """Call a function that runs the network. Where weights are split, every process must call it."""
        result = self.network.call(function)
        if self.is_sharded:
            self.network.reshard()
        return result

    def load_state(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Go back to a state of `state()` after `step` steps."""
        kept: dict[str, dict[str, Tensor]] = {name: {} for name in self.parameters}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            kept[name][kind] = tensor
        for name, parameter in self.parameters.items():
            own = {kind: placed_like(parameter, tensor) for kind, tensor in kept[name].items()}
            with torch.no_grad():
                parameter.copy_(own.pop("parameter"))
            # bitsandbytes counts in Python
            count = step if self.settings.optimizer == ADAMW8BIT else torch.tensor(float(step))
            self.optimizer.state[parameter] = {"step": count, **own}
