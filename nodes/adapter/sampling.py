"""One run of the Next-Patch Sampler: checks first, then memory, then the core's `generate`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import comfy.model_management as mm
import comfy.utils
import latent_preview
import torch

from ...bitdance_core.bit_grid import BitGrid
from ...bitdance_core.editing import Edit, make_edit
from ...bitdance_core.errors import BitDanceError
from ...bitdance_core.flow import Sampling
from ...bitdance_core.generate import count_evaluations, generate
from ...bitdance_core.patches import Grid
from ...bitdance_core.pipeline import make_grid
from .model import check_model, memory_needed, patchers_of
from .text import read_positive, read_prompt


@dataclass(frozen=True)
class Options:
    """What the Sampling Options node chooses beside the sampler's own inputs; 0 as there: the same, or the model's."""

    last_steps: int = 0
    last_cfg: float = 0.0
    guided: tuple[float, float] = (0.0, 1.0)
    noise_scale: float = 1.0
    time_shift: float = 0.0


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
    mask: torch.Tensor | None,
    options: Options,
    allow_untrained_size: bool,
) -> BitGrid:
    """Draw `bits.batch` pictures of the size of `bits`, or redraw in them. Checks before any weight moves."""
    host = check_model(model)
    config, prompts = host.config, host.prompts
    autoencoder, defaults = config.autoencoder, config.defaults
    if bits.packed is not None:
        bits.check(autoencoder.downscale, autoencoder.bits, config.family)
    height, width = bits.size(autoencoder.downscale)
    if (height, width) == (0, 0):
        height, width = defaults.default_size
    grid = make_grid(config, prompts, height, width, allow_untrained_size)
    sampling = Sampling(
        sampler,
        steps or defaults.steps,
        guidance or defaults.guidance,
        options.time_shift or config.head.time_shift,
        options.last_steps or None,
        options.last_cfg or None,
        options.guided,
        options.noise_scale,
    )
    edit = _edit(bits, denoise, mask, grid, autoencoder.bits)

    opening = prompts.opening(grid.height, grid.width, grid.tokens_per_patch)
    conditional, regions, text = read_positive(positive, prompts, grid, autoencoder.downscale)
    branches = [ids + opening for ids in conditional]
    if sampling.branches > 1:
        branches.append(read_prompt(negative, prompts, "negative") + opening)
    evaluations = count_evaluations(sampling, grid, edit)
    if not evaluations:
        return replace(bits, mask=None)

    most_steps = max(sampling.steps, sampling.last_steps or 0)
    longest_read = 1 if edit is None else edit.longest_read(grid)
    lengths = [len(ids) for ids in branches]
    memory = memory_needed(host, grid, lengths, bits.batch, most_steps, longest_read)
    mm.load_models_gpu(patchers_of(model), memory_required=memory)

    previewer = latent_preview.get_previewer(model.load_device, host.latent_format)
    bar = comfy.utils.ProgressBar(evaluations)
    begun = 0

    def before_evaluation() -> None:
        nonlocal begun
        mm.throw_exception_if_processing_interrupted()
        bar.update_absolute(begun)
        begun += 1

    def after_patch(patch: int, patches: int, canvas: torch.Tensor) -> None:
        preview = previewer.decode_latent_to_preview_image("JPEG", canvas) if previewer else None
        bar.update_absolute(begun, preview=preview)

    drawn = generate(
        compiled(model),
        branches,
        grid,
        sampling,
        bits.batch,
        torch.Generator("cpu").manual_seed(seed),
        model.load_device,
        host.precision.compute,
        after_patch,
        before_evaluation,
        edit,
        regions,
    )
    return BitGrid.from_bits(drawn, autoencoder.downscale, text)


def _edit(bits: BitGrid, denoise: float, mask: torch.Tensor | None, grid: Grid, channels: int) -> Edit | None:
    """From the sampler's inputs; a mask that came with the bits counts where none is connected."""
    mask = bits.mask if mask is None else mask
    if mask is not None:
        mask = mask.reshape(-1, *mask.shape[-2:])
        if len(mask) > 1:  # as ComfyUI's own samplers: repeated, or cut
            mask = comfy.utils.repeat_to_batch_size(mask, bits.batch)
    if bits.packed is None and (denoise < 1 or mask is not None):
        raise BitDanceError("denoise below 1 and masks need bits to start from: connect drawn or encoded ones")
    return make_edit(bits.bits() if bits.packed is not None else None, denoise, mask, grid, bits.batch, channels)


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
