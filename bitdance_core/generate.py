"""The run in one screen: token ids -> bits, patch by patch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .bits import binarize
from .errors import BitDanceError, Cancelled
from .flow import Schedule, plan_noise, sample_patch
from .kv_cache import KVCache
from .model import BitDance
from .patches import Grid

# (patches drawn, patches in all, bits so far [n, C, h, w]: +-1, 0 where nothing is drawn yet; the callee's to keep)
Callback = Callable[[int, int, Tensor], None]
# asked before every evaluation of a network; True stops the run with `Cancelled` (or it raises its own exception)
Cancel = Callable[[], bool]


def generate(
    model: BitDance,
    branches: Sequence[Sequence[int]],
    grid: Grid,
    schedule: Schedule,
    guidance: float,
    num_images: int,
    generator: torch.Generator,
    device: torch.device | str,
    dtype: torch.dtype,
    callback: Callback | None = None,
    cancel: Cancel | None = None,
) -> Tensor:
    """Draw bits [n, C, h, w] in {-1, +1}, float32.

    `branches` holds the conditional token ids and, with guidance > 1, the unconditional ones; each ends in the width
    token and the queries. All branches and images share every network call. Noise is drawn where `generator` lives.
    """
    assert len(branches) == (2 if guidance > 1 else 1)
    P, C = grid.tokens_per_patch, model.config.head.bits
    rows = [ids for ids in branches for _ in range(num_images)]
    context = Context(model, rows, grid.num_patches * P, P, device, dtype)
    positions = grid.positions(model.config.backbone.hidden_size, device).to(dtype)
    time = model.head.time_embed(torch.tensor(schedule.times, device=device), dtype)
    canvas = torch.zeros(num_images, C, grid.height, grid.width, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)

    check_cancelled(cancel)
    hidden = context.prefill()
    for i in range(grid.num_patches):
        cond = model.head.cond_embed(hidden + positions[i])

        def predict(x_t: Tensor, step: int, cond: Tensor = cond) -> Tensor:
            check_cancelled(cancel)
            return model.head(x_t.to(dtype).repeat(len(branches), 1, 1), time[step], cond)

        noise = plan_noise((num_images, P, C), schedule.noise_draws, generator)
        sample = sample_patch(predict, noise.to(device), schedule, guidance)
        finite &= sample.isfinite().all()  # asked of the device only once, at the end
        tokens = binarize(sample)  # [n, P, C]
        canvas[:, :, *grid.window(i)] = tokens.transpose(1, 2).unflatten(2, (grid.patch_size, grid.patch_size))
        if callback is not None:
            callback(i + 1, grid.num_patches, canvas.clone())
        if i + 1 < grid.num_patches:  # nothing reads what the backbone would make of the last patch
            check_cancelled(cancel)
            embeddings = model.projector(tokens.to(dtype)) + positions[i]
            hidden = context.decode(embeddings.repeat(len(branches), 1, 1))
    if not finite:
        raise BitDanceError(f"the model's numbers overflow in {dtype}; use bfloat16 or float32, or check its files")
    return canvas


def check_cancelled(cancel: Cancel | None) -> None:
    if cancel is not None and cancel():
        raise Cancelled("generation was cancelled")


class Context:
    """Token sequences of all rows, left-padded to one length, and what the backbone remembers of them.

    Left padding lets rows of different prompts end together, so that every block is one batched call; each row counts
    its own positions from its first real token.
    """

    def __init__(
        self,
        model: BitDance,
        rows: Sequence[Sequence[int]],
        new_tokens: int,
        block: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        """`new_tokens` counts the tokens of all blocks to come, the first (the rows' last `block` ids) included."""
        length = max(map(len, rows))
        padding = [length - len(row) for row in rows]
        table = model.backbone.embed_tokens
        # looked up where the table lies, which may be system memory
        ids = torch.tensor([[0] * pad + list(row) for pad, row in zip(padding, rows)], device=table.weight.device)
        self.backbone = model.backbone
        self.embeddings = table(ids).to(device, dtype)
        self.block = block
        self.padding = torch.tensor(padding, device=device)[:, None] if any(padding) else None
        self.cache = KVCache(model.config.backbone, len(rows), length - block + new_tokens, device, dtype)

    def prefill(self) -> Tensor:
        """Read everything but the last block causally, then that block; hidden states [rows, block, D]."""
        prefix = self.embeddings[:, : -self.block]
        steps = torch.arange(prefix.shape[1], device=prefix.device)
        mask = steps[:, None] >= steps
        if self.padding is not None:
            # padding looks at itself alone: nobody reads it, but a row of attention without any key would be NaN
            itself = torch.eye(len(steps), dtype=torch.bool, device=steps.device)
            mask = (mask & (steps >= self.padding)[:, None] | itself)[:, None]
        self.backbone(prefix, self._positions(len(steps)), mask, self.cache)
        return self.decode(self.embeddings[:, -self.block :])

    def decode(self, embeddings: Tensor) -> Tensor:
        """Read a block [rows, P, D] that sees the past and, in both directions, itself; hidden states of that shape."""
        mask = None
        if self.padding is not None:
            keys = torch.arange(self.cache.length + embeddings.shape[1], device=embeddings.device)
            mask = (keys >= self.padding)[:, None, None]
        return self.backbone(embeddings, self._positions(embeddings.shape[1]), mask, self.cache)

    def _positions(self, count: int) -> Tensor:
        steps = torch.arange(self.cache.length, self.cache.length + count, device=self.embeddings.device)
        return steps[None] if self.padding is None else (steps - self.padding).clamp_min(0)
