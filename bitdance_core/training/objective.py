"""What a step minimizes, as accelerate wraps it: a network whose forward pass is its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..model.class_model import ImageNetModel
from ..model.grid import Grid
from ..model.text_model import BitDance
from .layers import LAYER_TYPES
from .loss import Condition, Corruption, Draws, Kept, velocity_loss
from .settings import Settings

Untouched = Callable[[], AbstractContextManager]  # in it, the model is as it was before training
Result = TypeVar("Result")


class Rows(Protocol):
    """What has an entry for each picture of a step: they are split among passes and processes."""

    def rows(self, rows: slice) -> Rows: ...


class Objective(nn.Module):
    """A network and its loss. `figure` names what a step reports beside the loss."""

    figure: str

    def draw(self, batch: Rows, generator: torch.Generator) -> Rows:
        """Draw the random numbers of a step over a whole batch, on the CPU; they have `.to(device)`."""
        raise NotImplementedError

    def forward(self, batch: Rows, draws: Rows) -> Tensor:
        """Return the loss and the figure, float32 [2], on the draws' device; gradients flow into the loss alone."""
        raise NotImplementedError

    def call(self, function: Callable[[], Result]) -> Result:
        """Call a function that runs the network: to FSDP it is a forward pass (see `Trainer.call`)."""
        return function()


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


class Velocity(Objective):
    """A model that draws, and the published loss. Without `untouched` nothing is taught to stay as it is.

    With `in_step` every pass runs the same layers, whatever its pictures: other processes hold parts of them.
    """

    figure = "wrong"  # the share of bits that the head predicts wrong

    def __init__(
        self,
        model: BitDance | ImageNetModel,
        settings: Settings,
        dtype: torch.dtype,
        untouched: Untouched | None,
        in_step: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.dtype, self.untouched, self.in_step = model, dtype, untouched, in_step
        self.corruption = Corruption(settings.drop, keep=settings.keep, times=settings.times)

    @property
    def _no_split_modules(self) -> list[str]:
        """What accelerate's FSDP makes whole at a time, by Transformers' name for it."""
        return sorted({type(module).__name__ for module in self.model.modules() if isinstance(module, LAYER_TYPES)})

    def get_input_embeddings(self) -> nn.Module | None:
        """Return the embedding table, which FSDP makes whole by itself; of a class model, where it is small, None."""
        return self.model.backbone.embed_tokens if isinstance(self.model, BitDance) else None

    def draw(self, batch: Batch, generator: torch.Generator) -> Draws:
        count, bits = batch.bits.shape[:2]
        shape = count, batch.grid.num_patches, batch.grid.tokens_per_patch, bits
        return Draws.make(shape, self.corruption, self.model.config.head.time_shift, generator)

    def forward(self, batch: Batch, draws: Draws) -> Tensor:
        device = draws.t.device
        tokens = batch.grid.patchify(torch.where(batch.bits.to(device), 1.0, -1.0).to(self.dtype))
        keeping = None
        if self.untouched is not None and batch.others is not None:
            keeping = Kept(batch.others, self.untouched, self.in_step)
        return torch.stack(
            velocity_loss(self.model, batch.conditions, batch.unconditional, tokens, batch.grid, draws, keeping)
        )
