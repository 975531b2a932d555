"""The run in one screen: token ids or classes -> bits, patch by patch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .bits import binarize
from .components import HEAD
from .editing import Edit
from .errors import BitDanceError, Cancel, check_cancelled
from .flow import Sampling, Schedule, plan_noise
from .graphs import Graphs
from .head import DiffusionHead
from .imagenet import ImageNetModel
from .model import BitDance
from .patch_flow import flow_of
from .patches import Grid

# (the patch just drawn, counted from 1, patches in all, bits so far [n, C, h, w]: +-1, 0 where there are none yet; the
# callee's to keep)
Callback = Callable[[int, int, Tensor], None]


def generate(
    model: BitDance | ImageNetModel,
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
    graphs: Graphs | None = None,
) -> Tensor:
    """Draw bits [n, C, h, w] in {-1, +1}, float32.

    `branches` are what the model's `context` takes: conditional ones and, where the sampling is guided, an
    unconditional one, last. All branches and images share every network call. Noise is drawn where `generator` lives,
    for every patch, so that a patch's noise does not depend on which others are kept.

    With an `edit`, patches that it keeps cost no evaluation of the head, and those between two drawn ones are read in
    one pass. With several conditional branches, `regions` [patches, P] says which of them each token follows. With
    `graphs`, a patch's whole flow is one CUDA graph, and its reading another.
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
    apart = [sampling.draws_apart(i, patches) for i in range(patches)]
    unguided = by_patch.clone() if any(apart) else by_patch  # what the unconditional branch reads

    context = model.context(branches, num_images, grid, plan[-1] + 1, device, dtype)
    regions = regions if regions is None else regions.to(device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    # else the host would wait with each patch's noise for all work before it
    pinned = torch.device(device).type == "cuda" and generator.device.type == "cpu"
    told: tuple[float, ...] = ()  # the times that `time` embeds: most often those of every patch

    check_cancelled(cancel)
    hidden = context.prefill()
    read = 0  # patches that the backbone has read
    for i in range(plan[-1] + 1):
        schedule = sampling.schedule_of(i, patches)
        shape = num_images * (2 if apart[i] else 1), P, C
        noise = plan_noise(shape, schedule.noise_draws, generator, pin_memory=pinned)
        if starts[i] == 1:
            continue
        if read < i:  # what lies between the last patch that was read and this one
            check_cancelled(cancel)
            tokens = by_patch[:, read:i]
            if unguided is not by_patch:
                tokens = torch.cat((*[tokens] * conditional, unguided[:, read:i]))
            hidden = context.read(tokens.to(dtype), read, graphs)
            read = i
        if starts[i] > 0:
            schedule = sampling.schedule_of(i, patches, starts[i])
        if schedule.head_times != told:
            told = schedule.head_times
            time = model.head.time_embed(torch.tensor(told, device=device), dtype)
        guidance = sampling.guidance_of(i, patches)
        cond = model.head.cond_embed(_select(hidden, regions, i, num_images, conditional) + context.positions[i])

        held = known and (known[i].repeat(2) if apart[i] else known[i])
        inputs = noise.to(device, non_blocking=pinned), time, cond, *((held.bits, held.until) if held else ())
        if graphs is None or HEAD in graphs.reasons:
            sample = flow_of(model.head, schedule, guidance, cancel)(*inputs)
        else:
            for _ in range(schedule.evaluations):  # in a graph nobody is asked
                check_cancelled(cancel)
            guided = guidance > 1
            # as a tensor, since a schedule of guidance changes it from patch to patch
            scale = torch.full((), guidance, device=device)
            flow = partial(_flow_by_scale, model.head, schedule, guided)
            sample = graphs.run(HEAD, flow, (scale, *inputs), (schedule, guided))
        finite &= sample.isfinite().all()
        if i == plan[0]:  # weights that are not numbers show at once; after that, the device is asked at the end
            _check_finite(finite, dtype)
        sample = binarize(sample)  # [n, P, C], or [2n, P, C] where the branches are drawn apart
        unguided[:, i] = sample[-num_images:]
        by_patch[:, i] = tokens = sample[:num_images]
        canvas[:, :, *grid.window(i)] = tokens.transpose(1, 2).unflatten(2, (grid.patch_size, grid.patch_size))
        if callback is not None:
            callback(i + 1, patches, canvas.clone())
    _check_finite(finite, dtype)
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


def _flow_by_scale(head: DiffusionHead, schedule: Schedule, guided: bool, scale: Tensor, *inputs: Tensor) -> Tensor:
    return flow_of(head, schedule, scale if guided else 1.0)(*inputs)


def _check_finite(finite: Tensor, dtype: torch.dtype) -> None:
    if not finite:
        raise BitDanceError(f"the model's numbers overflow in {dtype}; use bfloat16 or float32, or check its files")


def _select(hidden: Tensor, regions: Tensor | None, patch: int, num_images: int, conditional: int) -> Tensor:
    """From [branches * n, P, D]: each token's own conditional hidden states, then the unconditional [n or 2n, P, D]."""
    if regions is None:
        return hidden
    by_branch = hidden.unflatten(0, (-1, num_images))
    tokens = torch.arange(hidden.shape[1], device=hidden.device)
    own = by_branch[regions[patch], :, tokens].transpose(0, 1)
    return torch.cat((own, *by_branch[conditional:]))
