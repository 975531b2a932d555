"""The public way in: a prompt becomes pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from . import devices
from .attention import AttentionFn, attention
from .autoencoder import BinaryAutoencoder
from .checkpoint import locate, read_checkpoint
from .config import BitDanceConfig, Size
from .errors import BitDanceError, whole_number
from .flow import make_schedule
from .generate import Callback, Cancel, check_cancelled, generate
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
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.device = device
        self.dtype = dtype

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        local_files_only: bool = False,
        attend: AttentionFn = attention,
    ) -> BitDancePipeline:
        """Load a model from an official folder, a hub id (downloaded unless `local_files_only`) or a built-in name.

        Without a device: the GPU if there is one. Without a dtype: bfloat16 on a GPU, float32 on the CPU. The embedding
        table stays in system memory. Raises BitDanceError (a ValueError), which names the file and what is wrong.
        """
        device, dtype = devices.choose(device, dtype)
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
        return cls(model, BinaryTokenizer(autoencoder, device, dtype), checkpoint.prompts, device, dtype)

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
        num_images: int = 1,
        negative_prompt: str | None = None,
        sampler: str = "euler_maruyama",
        allow_untrained_size: bool = False,
        callback: Callback | None = None,
        cancel: Cancel | None = None,
    ) -> GenerateOutput:
        """Draw `num_images` pictures of a prompt. The same arguments mean the same noise on every device.

        Size, steps and guidance default to the model's own. guidance <= 1 draws without an unconditional branch;
        negative_prompt takes the place of the empty one in it. `callback(patch, patches, bits)` is called after each
        patch with the grid so far (n, C, h, w), +-1 where drawn and 0 elsewhere; `cancel()` is asked before every
        network call and stops the run with `Cancelled` when it returns True. Raises BitDanceError before any work
        for a size, sampler or number that cannot be.
        """
        defaults = self.config.defaults
        height = defaults.default_size[0] if height is None else height
        width = defaults.default_size[1] if width is None else width
        steps = defaults.steps if steps is None else steps
        guidance = defaults.guidance if guidance is None else guidance
        if not isinstance(prompt, str) or not isinstance(negative_prompt, str | None):
            raise BitDanceError("prompt and negative_prompt must be text")
        if not isinstance(guidance, Real) or not 0 <= guidance < math.inf:
            raise BitDanceError(f"guidance must be a number of at least 0, found {guidance!r}")
        guidance = float(guidance)
        num_images = whole_number("num_images", num_images, least=1)
        seed = whole_number("seed", seed, least=0, most=2**64 - 1)
        grid = make_grid(self.config, self.prompts, height, width, allow_untrained_size)
        schedule = make_schedule(sampler, steps, self.config.head.time_shift)

        opening = self.prompts.opening(grid.height, grid.width, grid.tokens_per_patch)
        branches = [self.prompts.conditional(prompt) + opening]
        if guidance > 1:
            negative = self.prompts.conditional(negative_prompt) if negative_prompt else self.prompts.unconditional()
            branches.append(negative + opening)
        # on the CPU, so that a seed means the same picture on every device
        generator = torch.Generator("cpu").manual_seed(seed)
        bits = generate(
            self.model,
            branches,
            grid,
            schedule,
            guidance,
            num_images,
            generator,
            self.device,
            self.dtype,
            callback,
            cancel,
        )
        # one picture at a time: decoding takes more memory than all else
        images = []
        for row in bits.split(1):
            check_cancelled(cancel)
            images += to_images(self.tokenizer.decode(row, generator))
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
