"""One run of the Next-Patch Sampler: checks first, then memory, then the core's `generate`."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import comfy.model_management as mm
import comfy.utils
import latent_preview
import torch

from ...bitdance_core.bit_grid import BitGrid
from ...bitdance_core.errors import BitDanceError
from ...bitdance_core.flow import make_schedule
from ...bitdance_core.generate import generate
from ...bitdance_core.pipeline import make_grid
from .model import BitDanceHost, memory_needed, patchers_of
from .text import read_conditioning


def draw(
    model,
    positive,
    negative,
    bits: BitGrid,
    *,
    seed: int,
    steps: int,
    guidance: float,
    sampler: str,
    denoise: float,
    mask,
    allow_untrained_size: bool,
) -> BitGrid:
    """Draw `bits.batch` pictures of the size of `bits`. Raises BitDanceError before any weight moves."""
    host = model.model
    if not isinstance(host, BitDanceHost):
        raise BitDanceError("this MODEL is not a BitDance model; connect the MODEL of Load BitDance Model")
    if denoise != 1 or mask is not None:
        raise BitDanceError("editing (denoise below 1, a mask) is not there yet: set denoise to 1 and unplug the mask")
    config, prompts = host.config, host.prompts
    autoencoder, defaults = config.autoencoder, config.defaults
    if bits.packed is not None:
        bits.check(autoencoder.downscale, autoencoder.bits, config.family)
    height, width = bits.size(autoencoder.downscale)
    if (height, width) == (0, 0):
        height, width = defaults.default_size
    elif not (height and width):
        raise BitDanceError("width and height must both be set, or both be 0 for the model's own size")
    grid = make_grid(config, prompts, height, width, allow_untrained_size)
    steps, guidance = steps or defaults.steps, guidance or defaults.guidance
    schedule = make_schedule(sampler, steps, config.head.time_shift)

    opening = prompts.opening(grid.height, grid.width, grid.tokens_per_patch)
    ids, text = read_conditioning(positive, prompts, "positive")
    branches = [ids + opening]
    if guidance > 1:
        branches.append(read_conditioning(negative, prompts, "negative")[0] + opening)

    memory = memory_needed(host, grid, [len(ids) for ids in branches], bits.batch, steps)
    mm.load_models_gpu(patchers_of(model), memory_required=memory)

    previewer = latent_preview.get_previewer(model.load_device, host.latent_format)
    evaluations = schedule.evaluations + 1  # for each patch: the head's, and one of the language model
    bar = comfy.utils.ProgressBar(grid.num_patches * evaluations)
    count = itertools.count()

    def before_evaluation() -> None:
        mm.throw_exception_if_processing_interrupted()
        bar.update_absolute(next(count))

    def after_patch(patch: int, patches: int, canvas: torch.Tensor) -> None:
        preview = previewer.decode_latent_to_preview_image("JPEG", canvas) if previewer else None
        bar.update_absolute(patch * evaluations, preview=preview)

    drawn = generate(
        compiled(model),
        branches,
        grid,
        schedule,
        guidance,
        bits.batch,
        torch.Generator("cpu").manual_seed(seed),
        model.load_device,
        host.precision.compute,
        after_patch,
        before_evaluation,
    )
    return BitGrid.from_bits(drawn, autoencoder.downscale, text)


def compiled(model):
    """The networks, the head compiled where a TorchCompileModel node asked for it."""
    network = model.model.diffusion_model
    options = model.model_options.get("torch_compile_kwargs")
    if options is None:
        return network
    return SimpleNamespace(
        config=network.config,
        backbone=network.backbone,
        projector=network.projector,
        head=torch.compile(network.head, **options),
    )
