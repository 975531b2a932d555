"""Run the Next-Patch Sampler: check the inputs, then load the models, then call the core's `generate`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import comfy.model_management as mm
import comfy.utils
import latent_preview
import torch

from ...bitdance_core.bits.grid import BitGrid
from ...bitdance_core.errors import BitDanceError
from ...bitdance_core.model.class_config import ImageNetConfig
from ...bitdance_core.model.grid import Grid
from ...bitdance_core.model.text_config import AutoencoderConfig, BitDanceConfig
from ...bitdance_core.sampling.editing import Edit, make_edit
from ...bitdance_core.sampling.generate import generate
from ...bitdance_core.sampling.memory import check_request, request_bytes
from ...bitdance_core.sampling.plan import Request
from ...bitdance_core.sampling.settings import Sampling
from ...bitdance_core.sampling.sizes import make_grid, size_of_aspect
from .conditioning import read_classes, read_positive, read_prompt
from .effects import compute_dtype, time_shift
from .graphs import CHOICES, graphs_of
from .model import BitDanceHost, check_model
from .placement import Note, load_parts, prefetch_with_room
from .prefetch import prefetching
from .previews import Previews
from .velocity import velocity_of

# the inputs that an error about memory names; see `check_request`
MEMORY_WIDGETS = {
    "images": "batch_size", "steps": "steps", "prompt": "the length of the prompts", "size": "width and height"
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """The widgets of Sampling Options. 0 means the sampler's value (last_steps, last_cfg) or the model's (time_shift).

    Raises BitDanceError, in the widgets' names, for values that contradict each other.
    """

    last_steps: int = 0
    last_cfg: float = 0.0
    guided: tuple[float, float] = (0.0, 1.0)
    noise_scale: float = 1.0
    time_shift: float = 0.0
    schedule: str = "auto"
    cuda_graphs: str = "auto"

    def __post_init__(self) -> None:
        if self.cuda_graphs not in CHOICES:
            raise BitDanceError(f"cuda_graphs is {self.cuda_graphs!r}; choose {', '.join(CHOICES)}")
        if self.guided[0] > self.guided[1]:
            raise BitDanceError(
                f"guide_from is {self.guided[0]} and guide_to {self.guided[1]}; guide_to must not be below it"
            )
        if self.schedule == "linear" and self.last_cfg:
            raise BitDanceError(
                f"cfg_schedule is linear and last_cfg {self.last_cfg}, which are two schedules; set last_cfg to 0, or "
                "cfg_schedule to auto or constant"
            )

    def sampling(
        self,
        config: BitDanceConfig | ImageNetConfig,
        sampler: str,
        steps: int,
        cfg: float,
        shift: float | None = None,
    ) -> Sampling:
        """Add these to the sampler node's widgets; values of 0 and `auto` become the model's own.

        `shift` is the MODEL's time shift, if a node has set one; the widget goes before it.
        """
        return Sampling.for_model(
            config,
            sampler,
            steps or None,
            cfg or None,
            time_shift=self.time_shift or shift,
            last_steps=self.last_steps or None,
            last_guidance=self.last_cfg or None,
            guidance_interval=self.guided,
            noise_scale=self.noise_scale,
            schedule=None if self.schedule == "auto" else self.schedule,
        )


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
    note: Note,
) -> BitGrid:
    """Draw `bits.batch` pictures of the size of `bits`, or redraw in them.

    Several classes with a batch of 1 draw one picture each. `note` is told what the user should know. Raises
    BitDanceError, before any weight is moved, for inputs that the model cannot draw.
    """
    host = check_model(model)
    config, autoencoder, defaults = host.config, host.autoencoder, host.config.defaults
    if bits.packed is not None:
        bits.check(autoencoder.downscale, autoencoder.bits, config.family)
    height, width = bits.size(autoencoder.downscale)
    if bits.aspect is not None:
        height, width = size_of_aspect(config, bits.aspect)
        note(f"{bits.aspect}: {width}x{height} pixels (width x height)")
    elif (height, width) == (0, 0):
        height, width = defaults.default_size
    if host.prompts is not None:
        grid = make_grid(config, host.prompts, height, width, allow_untrained_size)
    elif (height, width) == defaults.default_size:
        grid = host.diffusion_model.grid
    else:
        side = defaults.default_size[0]
        raise BitDanceError(
            f"{config.family} draws {side}x{side} pixels only, found {width}x{height} (width x height); connect "
            f"Empty Bits with width and height 0, or bits of {side}x{side} pixels"
        )
    sampling = options.sampling(config, sampler, steps, guidance, time_shift(model))
    compute = compute_dtype(model)
    subject = _read(host, positive, negative, grid, bits.batch, guided=sampling.branches > 1)
    edit = _edit(bits, denoise, mask, grid, autoencoder, subject.num_images)
    indices = _indices(bits, subject.num_images)
    request = Request(subject.branches, grid, sampling, subject.num_images, edit, subject.regions, indices)
    names = MEMORY_WIDGETS if host.prompts is not None else {name: MEMORY_WIDGETS[name] for name in ("images", "steps")}
    room, where = mm.get_total_memory(model.load_device), f"the device {model.load_device}"
    memory = check_request(config, request, compute.itemsize, room, where, names)
    if not request.evaluations():
        packed = bits.packed.expand(subject.num_images, -1)
        return replace(bits, batch=subject.num_images, packed=packed, mask=None, indices=indices)
    if options.cuda_graphs != "off" and mm.is_device_cuda(model.load_device):
        memory = min(room, request_bytes(config, request, compute.itemsize, recorded=True))
    # ComfyUI's copies and comfy_kitchen's kernels go to the current device, which may be another GPU than the model's
    with mm.cuda_device_context(model.load_device):
        drawn = _draw(model, request, seed, compute, memory, options.cuda_graphs, note)
    return replace(BitGrid.from_bits(drawn, autoencoder.downscale, subject.text), indices=indices)


def _draw(
    model, request: Request, seed: int, compute: torch.dtype, memory: int, cuda_graphs: str, note: Note
) -> torch.Tensor:
    """Load the models and draw the bits; `memory` bytes are needed beside the weights."""
    patchers = load_parts(model, memory, request.evaluations(), note)
    graphs = graphs_of(model, patchers, cuda_graphs, note)
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    progress = _Progress(request, previewer)
    network = model.model.diffusion_model
    stack = getattr(network, "backbone", network)
    with model.patched_embedding(), prefetching(model, stack, prefetch_with_room(model, stack.layers)):
        drawn = generate(
            network,
            request,
            torch.Generator("cpu").manual_seed(seed),
            model.load_device,
            compute,
            progress.after_patch if previewer else None,
            progress.before_evaluation,
            graphs,
            velocity_of(model, compute),
        )
    if graphs is not None:
        graphs.drop_unused()
    progress.end()
    return drawn


class _Progress:
    """Tells the page how far a drawing is, and stops it where the user interrupts."""

    def __init__(self, request: Request, previewer) -> None:
        """`previewer` is ComfyUI's, or None."""
        self.begun, self.evaluations = 0, request.evaluations()
        self.bar = comfy.utils.ProgressBar(self.evaluations)
        self.report_every = max(1, self.evaluations // 200)  # thousands of messages freeze the browser
        self.previews = Previews(previewer, sum(not step.is_kept for step in request.steps))

    def before_evaluation(self) -> None:
        mm.throw_exception_if_processing_interrupted()
        if self.begun % self.report_every == 0:
            self.bar.update_absolute(self.begun)
        self.begun += 1

    def after_patch(self, patch: int, patches: int, canvas: torch.Tensor) -> None:
        if (preview := self.previews.show(canvas)) is not None:
            self.bar.update_absolute(self.begun, preview=preview)

    def end(self) -> None:
        self.bar.update_absolute(self.evaluations)


@dataclass(frozen=True)
class _Subject:
    """The subject of a drawing: a request's branches and regions, and its text."""

    branches: list[list[int]]
    num_images: int
    regions: torch.Tensor | None
    text: str


def _read(host: BitDanceHost, positive, negative, grid: Grid, batch: int, guided: bool) -> _Subject:
    """Read the CONDITIONINGs as prompts or classes. Raises BitDanceError for those that the model cannot follow."""
    if host.prompts is None:
        branches, text = read_classes(host.config, positive, negative, batch, guided)
        return _Subject(branches, len(branches[0]), None, text)
    opening = host.prompts.opening(grid.height, grid.width, grid.tokens_per_patch)
    conditional, regions, text = read_positive(positive, host.prompts, grid, host.autoencoder.downscale)
    branches = [ids + opening for ids in conditional]
    if guided:
        branches.append(read_prompt(negative, host.prompts, "negative") + opening)
    return _Subject(branches, batch, regions, text)


def _indices(bits: BitGrid, num_images: int) -> tuple[int, ...] | None:
    """Return the number of each picture; several classes on one numbered picture count on from it."""
    if bits.indices is None or bits.batch == num_images:
        return bits.indices
    return tuple(range(bits.indices[0], bits.indices[0] + num_images))


def _edit(
    bits: BitGrid, denoise: float, mask: torch.Tensor | None, grid: Grid, autoencoder: AutoencoderConfig, batch: int
) -> Edit | None:
    """Make the edit of the sampler's inputs, or None to draw new pictures.

    The noise mask of the bits is used if no mask is connected. Raises BitDanceError for an edit of an empty canvas.
    """
    mask = bits.mask if mask is None else mask
    if mask is not None:
        mask = mask.reshape(-1, *mask.shape[-2:])
        if len(mask) > 1:  # as ComfyUI's own samplers do
            mask = comfy.utils.repeat_to_batch_size(mask, batch)
    if bits.packed is None and (denoise < 1 or mask is not None):
        edit = f"denoise {denoise:g}" if mask is None else "a mask"
        raise BitDanceError(
            f"{edit} needs bits to start from, but 'bits' is an empty canvas; connect drawn, loaded or encoded bits"
        )
    start = bits.bits() if bits.packed is not None else None
    return make_edit(start, denoise, mask, grid, batch, autoencoder.bits, autoencoder.downscale)
