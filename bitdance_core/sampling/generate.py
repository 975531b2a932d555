"""The run on one screen: a request becomes bits, patch by patch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import Cancel, check_cancelled
from ..model.attention import without_cudnn_attention
from ..model.binarize import binarize
from ..model.class_model import ImageNetModel
from ..model.graphs import Graphs
from ..model.text_model import BitDance
from .canvas import Canvas
from .noise import NoiseSource
from .patch import HeadVelocity, PatchSampler
from .plan import Request

# (the patch just drawn, counted from 1, patches in all, a copy of the bits so far [n, C, h, w]: +-1, and 0 where
# nothing is drawn yet)
Callback = Callable[[int, int, Tensor], None]


@without_cudnn_attention()
def generate(
    model: BitDance | ImageNetModel,
    request: Request,
    generator: torch.Generator,
    device: torch.device | str,
    dtype: torch.dtype,
    callback: Callback | None = None,
    cancel: Cancel | None = None,
    graphs: Graphs | None = None,
    velocity: HeadVelocity | None = None,
) -> Tensor:
    """Draw a request's bits [n, C, h, w] in {-1, +1}, float32.

    Noise is drawn on the generator's device. Kept patches cost no head evaluation, and those between two drawn ones are
    read in few passes. With `graphs`, a patch's flow is one CUDA graph and its reading another; `velocity` replaces the
    head's (see `CompiledVelocity`). Raises BitDanceError where numbers overflow, Cancelled where `cancel` asks for it.
    """
    grid, channels, n = request.grid, model.config.head.bits, request.num_images
    canvas, steps = Canvas(request, channels, device), request.steps
    if not steps:
        return canvas.bits
    pin = torch.device(device).type == "cuda" and generator.device.type == "cpu"
    reader = model.reader(request.branches, n, grid, len(steps), device, dtype)
    sample = PatchSampler(model.head, device, dtype, cancel, graphs, velocity)
    source = NoiseSource(generator, request.indices)
    check_cancelled(cancel)
    hidden, read = reader.prefill(), 0
    for step in steps:
        shape = n * (2 if step.is_separate else 1), grid.tokens_per_patch, channels
        noise = source.draw(shape, step.noise_draws, pin)
        if step.is_kept:
            continue
        for first, last in request.passes(read, step.patch):
            check_cancelled(cancel)
            hidden, read = reader.read(canvas.between(first, last).to(dtype), first, graphs), last
        cond = canvas.follow(hidden, step.patch) + reader.positions[step.patch]
        canvas.put(step.patch, binarize(sample(step, noise, cond, canvas.known(step))))
        if callback is not None:
            callback(step.patch + 1, grid.num_patches, canvas.bits.clone())
    sample.check_finite()
    return canvas.bits
