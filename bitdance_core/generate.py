"""The run in one screen: token ids -> bits, patch by patch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .bits import binarize
from .editing import Edit
from .errors import BitDanceError, Cancelled
from .flow import Sampling, Schedule, plan_noise, sample_patch
from .kv_cache import KVCache
from .model import BitDance
from .patches import Grid

# (the patch just drawn, counted from 1, patches in all, bits so far [n, C, h, w]: +-1, 0 where there are none yet; the
# callee's to keep)
Callback = Callable[[int, int, Tensor], None]
# asked before every evaluation of a network; True stops the run with `Cancelled` (or it raises its own exception)
Cancel = Callable[[], bool]


def generate(
    model: BitDance,
    branches: Sequence[Sequence[int]],
    grid: Grid,
    sampling: Sampling,
    num_images: int,
    generator: torch.Generator,
    device: torch.device | str,
    dtype: torch.dtype,
    callback: Callback | None = None,
    cancel: Cancel | None = None,
    edit: Edit | None = None,
    regions: Tensor | None = None,
) -> Tensor:
    """Draw bits [n, C, h, w] in {-1, +1}, float32.

    `branches` holds the conditional token ids and, where the sampling is guided, the unconditional ones, last; each
    ends in the width token and the queries. All branches and images share every network call. Noise is drawn where
    `generator` lives, for every patch, so that a patch's noise does not depend on which others are kept.

    With an `edit`, patches that it keeps cost no evaluation of the head, and those between two drawn ones are read in
    one pass. With several conditional branches, `regions` [patches, P] says which of them each token follows.
    """
    unconditional = sampling.branches - 1
    conditional = len(branches) - unconditional
    assert conditional == 1 if regions is None else regions.max() < conditional
    P, C, patches = grid.tokens_per_patch, model.config.head.bits, grid.num_patches
    starts = [0.0] * patches if edit is None else edit.starts(grid)
    plan = [i for i, start in enumerate(starts) if start < 1]
    canvas = torch.zeros(num_images, C, grid.height, grid.width, device=device)
    known = None
    if edit is not None:
        canvas += edit.bits.to(device)
        known = edit.to_patches(grid, device)
    if not plan:
        return canvas
    by_patch = grid.patchify(canvas)  # [n, patches, P, C], the canvas as the backbone reads it

    rows = [ids for ids in branches for _ in range(num_images)]
    context = Context(model, rows, (plan[-1] + 1) * P, P, device, dtype)
    positions = grid.positions(model.config.backbone.hidden_size, device).to(dtype)
    regions = regions if regions is None else regions.to(device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    told: tuple[float, ...] = ()  # the times that `time` embeds: most often those of every patch

    check_cancelled(cancel)
    hidden = context.prefill()
    read = 0  # patches that the backbone has read
    for i in range(plan[-1] + 1):
        schedule = sampling.schedule_of(i, patches)
        noise = plan_noise((num_images, P, C), schedule.noise_draws, generator)
        if starts[i] == 1:
            continue
        if read < i:  # what lies between the last patch that was read and this one
            check_cancelled(cancel)
            embeddings = (model.projector(by_patch[:, read:i].to(dtype)) + positions[read:i]).flatten(1, 2)
            hidden = context.decode(embeddings.repeat(len(branches), 1, 1))
            read = i
        if starts[i] > 0:
            schedule = sampling.schedule_of(i, patches, starts[i])
        if schedule.head_times != told:
            told = schedule.head_times
            time = model.head.time_embed(torch.tensor(told, device=device), dtype)
        guidance = sampling.guidance_of(i, patches)
        cond = model.head.cond_embed(_select(hidden, regions, i, num_images, conditional) + positions[i])

        def predict(
            x_t: Tensor,
            step: int,
            cond: Tensor = cond,
            time: Tensor = time,
            schedule: Schedule = schedule,
            guidance: float = guidance,
        ) -> Tensor:
            check_cancelled(cancel)
            x_t = x_t.to(dtype)
            if guidance > 1 and schedule.is_guided(step):
                return model.head(x_t.repeat(2, 1, 1), time[step], cond)
            return model.head(x_t, time[step], cond[:num_images])

        sample = sample_patch(predict, noise.to(device), schedule, guidance, known and known[i])
        finite &= sample.isfinite().all()  # asked of the device only once, at the end
        by_patch[:, i] = tokens = binarize(sample)  # [n, P, C]
        canvas[:, :, *grid.window(i)] = tokens.transpose(1, 2).unflatten(2, (grid.patch_size, grid.patch_size))
        if callback is not None:
            callback(i + 1, patches, canvas.clone())
    if not finite:
        raise BitDanceError(f"the model's numbers overflow in {dtype}; use bfloat16 or float32, or check its files")
    return canvas


def count_evaluations(sampling: Sampling, grid: Grid, edit: Edit | None = None) -> int:
    """How often `generate` evaluates a network (and asks `cancel`): for each drawn patch the head's times, and once the
    backbone.
    """
    starts = [0.0] * grid.num_patches if edit is None else edit.starts(grid)
    schedules = [sampling.schedule_of(i, grid.num_patches, start) for i, start in enumerate(starts) if start < 1]
    if not schedules:
        return 0
    reads = len(schedules) + (starts[0] == 1)  # the prompt's own reading, and one before each patch but the first
    return sum(schedule.evaluations for schedule in schedules) + reads


def _select(hidden: Tensor, regions: Tensor | None, patch: int, num_images: int, conditional: int) -> Tensor:
    """From [branches * n, P, D]: each token's own conditional hidden states, then the unconditional [n or 2n, P, D]."""
    if regions is None:
        return hidden
    by_branch = hidden.unflatten(0, (-1, num_images))
    tokens = torch.arange(hidden.shape[1], device=hidden.device)
    own = by_branch[regions[patch], :, tokens].transpose(0, 1)
    return torch.cat((own, *by_branch[conditional:]))


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
        """Read blocks [rows, k * P, D] in one pass; the hidden states of the last one [rows, P, D].

        Each block sees the past, the blocks before it and, in both directions, itself.
        """
        past, count = self.cache.length, embeddings.shape[1]
        mask = None
        if self.padding is not None or count > self.block:
            keys = torch.arange(past + count, device=embeddings.device)
            ends = past + (keys[:count] // self.block + 1) * self.block
            mask = (keys < ends[:, None])[None] if count > self.block else torch.ones_like(keys[None, None], dtype=bool)
            if self.padding is not None:
                mask = mask & (keys >= self.padding)[:, None]
            mask = mask[:, None]
        return self.backbone(embeddings, self._positions(count), mask, self.cache)[:, -self.block :]

    def _positions(self, count: int) -> Tensor:
        steps = torch.arange(self.cache.length, self.cache.length + count, device=self.embeddings.device)
        return steps[None] if self.padding is None else (steps - self.padding).clamp_min(0)
