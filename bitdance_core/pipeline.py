"""The public way in: a prompt becomes pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from . import devices
from .attention import AttentionFn, attention
from .autoencoder import BinaryAutoencoder
from .checkpoint import Source, locate, read_checkpoint
from .config import BitDanceConfig, Size
from .editing import THRESHOLD, Edit, make_edit, region_map, token_mask
from .errors import BitDanceError, Cancel, check_cancelled, whole_number
from .flow import Sampling
from .generate import Callback, generate
from .graphs import Graphs
from .head import compiled
from .imagenet import ImageNetModel
from .model import BitDance
from .patches import Grid
from .prompt import PromptTokenizer
from .tokenizer import BinaryTokenizer, to_images
from .weights import load_weights

MAX_SIDE = 2**16  # pixels: no grid is as large


@dataclass(frozen=True)
class GenerateOutput:
    """`images`: one PIL image each; `bits`: bool (n, C, h, w), True = +1, on the CPU."""

    images: list[Image.Image]
    bits: Tensor


class BitDancePipeline:
    """A text-to-image model ready to draw. Make one with `from_pretrained`."""

    def __init__(
        self,
        model: BitDance,
        tokenizer: BinaryTokenizer,
        prompts: PromptTokenizer,
        device: torch.device,
        dtype: torch.dtype,
        cuda_graphs: bool = False,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.device = device
        self.dtype = dtype
        self.cuda_graphs = cuda_graphs

    @classmethod
    def from_pretrained(
        cls,
        source: Source,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        local_files_only: bool = False,
        attend: AttentionFn = attention,
        cuda_graphs: bool = False,
        compile_head: bool = False,
    ) -> BitDancePipeline:
        """Load a model from a folder (official, diffusers, or with single files), a file, a set of files with their
        tokenizer.json, a hub id (downloaded unless `local_files_only`) or a built-in name.

        Without a device: the GPU if there is one. Without a dtype: bfloat16 on a GPU, float32 on the CPU. The embedding
        table stays in system memory. `compile_head` hands the head to torch.compile, which pays for many pictures,
        and on a CPU keeps its weights twice; `cuda_graphs` records its loop and the backbone's reading of a patch, for
        where launching kernels takes longer than they do (not measured yet). Raises BitDanceError (a ValueError), which
        names the file and what is wrong.
        """
        device, dtype = devices.choose(device, dtype)
        devices.check_graphs(device, cuda_graphs)
        checkpoint = read_checkpoint(locate(source, local_files_only=local_files_only))
        model = BitDance(checkpoint.config, attend=attend, device="meta").eval()
        autoencoder = BinaryAutoencoder(checkpoint.config.autoencoder, device="meta").eval()
        parts = [
            (model.backbone, checkpoint.backbone),
            (model.projector, checkpoint.projector),
            (model.head, checkpoint.head),
            (autoencoder, checkpoint.autoencoder),
        ]
        load_weights(parts, device, dtype, on_cpu=("embed_tokens.weight",))
        if compile_head:
            model.head = compiled(model.head, frozen=device.type == "cpu")
        return cls(model, BinaryTokenizer(autoencoder, device, dtype), checkpoint.prompts, device, dtype, cuda_graphs)

    @property
    def config(self) -> BitDanceConfig:
        return self.model.config

    @property
    def default_size(self) -> Size:
        """(height, width) in pixels."""
        return self.config.defaults.default_size

    @torch.no_grad()  # and not inference_mode: a user may go on to edit the bits
    def generate(
        self,
        prompt: str,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        num_images: int | None = None,
        negative_prompt: str | None = None,
        init_bits: Tensor | None = None,
        denoise: float = 1.0,
        mask: Tensor | None = None,
        regions: Sequence[tuple[str, Tensor]] = (),
        sampler: str = "euler_maruyama",
        allow_untrained_size: bool = False,
        callback: Callback | None = None,
        cancel: Cancel | None = None,
        last_steps: int | None = None,
        last_guidance: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        noise_scale: float = 1.0,
        time_shift: float | None = None,
        schedule: str = "constant",
    ) -> GenerateOutput:
        """Draw `num_images` pictures of a prompt. The same arguments mean the same noise on every device.

        Size, steps and guidance default to the model's own; with `init_bits` the size is theirs. guidance <= 1 draws
        without an unconditional branch; negative_prompt takes the place of the empty one in it.
        `callback(patch, patches, bits)` is called after each drawn patch with the grid so far (n, C, h, w), +-1 where
        there are bits and 0 elsewhere; `cancel()` is asked before every network call and stops the run with
        `Cancelled` when it returns True. Raises BitDanceError before any work for what cannot be.

        Editing: `init_bits` (num_images or 1, C, h, w), bool, are what the flow starts from, at time 1 - `denoise`;
        `mask` (num_images or 1, H, W), 1 = redraw, keeps every token exactly in which it stays below 0.5 (see
        `make_edit`). denoise 1 without a mask draws afresh, 0 returns the bits.

        `regions` are prompts for parts of the picture, each with a mask (1, H, W): tokens follow the last one that
        covers them, others `prompt`.

        `last_steps` and `last_guidance` are for the last patch, reached linearly from `steps` and `guidance`; outside
        of `guidance_interval`, times in [0, 1], only the conditional half of the head runs; `noise_scale` multiplies
        the noise of euler_maruyama's steps (0: the deterministic flow); `time_shift` replaces the model's own; the
        guidance `schedule` "linear" starts from 1, as that of ImageNet models.
        """
        defaults = self.config.defaults
        steps = defaults.steps if steps is None else steps
        guidance = defaults.guidance if guidance is None else guidance
        if not isinstance(prompt, str) or not isinstance(negative_prompt, str | None):
            raise BitDanceError("prompt and negative_prompt must be text")
        if init_bits is not None:
            init_bits = torch.as_tensor(init_bits)
            if init_bits.ndim != 4:
                raise BitDanceError(f"init_bits must be (n, C, h, w), found {list(init_bits.shape)}")
            height, width = self._size_of(init_bits, height, width)
        height = defaults.default_size[0] if height is None else height
        width = defaults.default_size[1] if width is None else width
        if num_images is None:
            num_images = 1 if init_bits is None else len(init_bits)
        num_images = whole_number("num_images", num_images, least=1)
        seed = whole_number("seed", seed, least=0, most=2**64 - 1)
        grid = make_grid(self.config, self.prompts, height, width, allow_untrained_size)
        sampling = Sampling(
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            time_shift=self.config.head.time_shift if time_shift is None else time_shift,
            last_steps=last_steps,
            last_guidance=last_guidance,
            guided=guidance_interval,
            noise_scale=noise_scale,
            schedule=schedule,
        )
        edit = make_edit(init_bits, denoise, mask, grid, num_images, self.config.head.bits)

        opening = self.prompts.opening(grid.height, grid.width, grid.tokens_per_patch)
        prompts = [prompt, *(text for text, _ in regions)]
        if not all(isinstance(text, str) for text in prompts):
            raise BitDanceError("regions must be pairs of a prompt and a mask (1, H, W)")
        branches = [self.prompts.conditional(text) + opening for text in prompts]
        covers = [token_mask(where, grid, 1)[0] >= THRESHOLD for _, where in regions]
        if sampling.branches > 1:
            negative = self.prompts.conditional(negative_prompt) if negative_prompt else self.prompts.unconditional()
            branches.append(negative + opening)
        regions = region_map(covers, grid) if covers else None
        return draw(
            self.model, self.tokenizer, branches, grid, sampling, num_images, seed, callback, cancel, edit, regions,
            self.cuda_graphs,
        )  # fmt: skip

    def _size_of(self, bits: Tensor, height: int | None, width: int | None) -> Size:
        """In pixels; a height or width that was asked for must be that of the bits."""
        step = self.config.autoencoder.downscale
        size = bits.shape[2] * step, bits.shape[3] * step
        if height not in (None, size[0]) or width not in (None, size[1]):
            raise BitDanceError(f"init_bits are of {size[0]}x{size[1]} pixels (height x width), not {height}x{width}")
        return size


def draw(
    model: BitDance | ImageNetModel,
    tokenizer: BinaryTokenizer,
    branches: Sequence[Sequence[int]],
    grid: Grid,
    sampling: Sampling,
    num_images: int,
    seed: int,
    callback: Callback | None,
    cancel: Cancel | None,
    edit: Edit | None,
    regions: Tensor | None = None,
    cuda_graphs: bool = False,
) -> GenerateOutput:
    """`generate` where the tokenizer lies and in its dtype, and its bits as pictures."""
    # on the CPU, so that a seed means the same noise on every device
    generator = torch.Generator("cpu").manual_seed(seed)
    where = tokenizer.device, tokenizer.dtype
    graphs = Graphs() if cuda_graphs else None
    bits = generate(
        model, branches, grid, sampling, num_images, generator, *where, callback, cancel, edit, regions, graphs
    )
    images = []
    for row in bits.split(1):  # one picture at a time: decoding takes more memory than all else
        check_cancelled(cancel)
        images += to_images(tokenizer.decode(row, generator))
    return GenerateOutput(images, (bits > 0).cpu())


def make_grid(
    config: BitDanceConfig, prompts: PromptTokenizer, height: int, width: int, allow_untrained_size: bool = False
) -> Grid:
    """The token grid of a picture of height x width pixels, or BitDanceError with the sizes that would do."""
    height, width = whole_number("height", height, 1, MAX_SIDE), whole_number("width", width, 1, MAX_SIDE)
    trained = config.defaults.trained_sizes
    if trained is not None and (height, width) not in trained and not allow_untrained_size:
        near = sorted(trained, key=lambda s: abs(math.log(s[0] / height)) + abs(math.log(s[1] / width)))
        raise BitDanceError(
            f"{height}x{width} (height x width) is not a size that {config.family} was trained on; "
            f"nearest: {', '.join(f'{h}x{w}' for h, w in near[:3])}"
        )
    downscale, patch_size = config.autoencoder.downscale, config.patch_size
    step = downscale * patch_size
    if height % step or width % step:
        fitting = [max(1, round(side / step)) * step for side in (height, width)]
        raise BitDanceError(
            f"{height}x{width} (height x width) does not fit {config.family}: both sides must be multiples of {step} "
            f"pixels ({patch_size}x{patch_size} tokens of {downscale} pixels); nearest: {fitting[0]}x{fitting[1]}"
        )
    grid = Grid(height // downscale, width // downscale, patch_size)
    for side in (grid.height, grid.width):
        if not prompts.has_side(side):
            longest = max(k for k in range(1, 1025) if prompts.has_side(k)) * downscale
            raise BitDanceError(
                f"{height}x{width} (height x width) is too large for {config.family}: "
                f"no side may exceed {longest} pixels"
            )
    return grid
