"""The public way in: a prompt or classes become images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import devices
from .checkpoints.checkpoint import ClassCheckpoint, TextCheckpoint, read_class_checkpoint, read_text_checkpoint
from .checkpoints.load import load_weights
from .checkpoints.locate import Source, locate
from .checkpoints.lora_merge import Lora, check_loras, merge_loras
from .errors import BitDanceError, Cancel, check_cancelled, whole_number
from .model.attention import AttentionFn, attention
from .model.class_config import ImageNetConfig
from .model.class_model import ImageNetModel
from .model.class_names import class_numbers, parse_classes
from .model.fields import Size
from .model.graphs import Graphs
from .model.prompt import PromptTokenizer
from .model.text_config import BitDanceConfig
from .model.text_model import BitDance
from .sampling.editing import THRESHOLD, make_edit, region_map, token_mask
from .sampling.flow import DEFAULT_SAMPLER
from .sampling.generate import Callback, generate
from .sampling.memory import check_request, decoding_bytes, refuse
from .sampling.patch import HeadVelocity, compiled_velocity
from .sampling.plan import Request
from .sampling.settings import Sampling, option_names
from .sampling.sizes import make_grid
from .tokenizer import BinaryTokenizer, to_images

MAX_SEED = 2**64 - 1
MAX_IMAGES = 4096  # drawn together


@dataclass(frozen=True)
class GenerateOutput:
    """`images`: one PIL image each; `bits`: bool (n, C, h, w), True = +1, on the CPU."""

    images: list[Image.Image]
    bits: Tensor


class Pipeline:
    """A model and its binary tokenizer on one device: the base of both kinds of pipeline.

    `unused` names settings of the command line and of batches that this kind cannot follow. `velocity` replaces the
    head's (see `compiled_velocity`).
    """

    unused: tuple[str, ...] = ()
    # the settings that an error about memory names; see `check_request`
    settings_of_memory: Mapping[str, str] = {"images": "num_images", "steps": "steps"}

    def __init__(
        self,
        model: BitDance | ImageNetModel,
        tokenizer: BinaryTokenizer,
        prompts: PromptTokenizer | None = None,
        cuda_graphs: bool = False,
        velocity: HeadVelocity | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.cuda_graphs = cuda_graphs
        self.velocity = velocity

    def __call__(self, *args: Any, **kwargs: Any) -> GenerateOutput:
        """Draw as `generate` does, with its arguments."""
        return self.generate(*args, **kwargs)

    def __repr__(self) -> str:
        height, width = self.default_size
        return (
            f"{type(self).__name__}({self.config.family}: {height}x{width} pixels (height x width), {self.tokenizer!r})"
        )

    @property
    def config(self) -> BitDanceConfig | ImageNetConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.tokenizer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tokenizer.dtype

    @property
    def default_size(self) -> Size:
        """(height, width) in pixels."""
        return self.config.defaults.default_size

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Pick the seed and the settings of `Sampling` out of `given`, completed with the model's own."""
        defaults = self.config.defaults
        own = {"steps": defaults.steps, "guidance": defaults.guidance, "sampler": DEFAULT_SAMPLER, "seed": 0}
        own |= {} if defaults.schedule == "constant" or given.get("last_guidance") else {"schedule": defaults.schedule}
        return own | {name: given[name] for name in (*own, *option_names()) if given.get(name) is not None}

    def check(self, seed: int = 0, **arguments: Any) -> Request:
        """Check the arguments of `generate`. Raises BitDanceError for those that it would refuse."""
        whole_number("seed", seed, least=0, most=MAX_SEED)
        return self.request(**arguments)

    def check_memory(self, request: Request, device: torch.device, dtype: torch.dtype) -> None:
        """Raise BitDanceError for a request that takes more memory than the device has beside the weights."""
        memory = devices.memory_of(device)
        if memory is None:
            return
        on_cpu = () if device.type == "cpu" else ("embed_tokens.weight",)
        modules = (self.model, self.tokenizer.autoencoder)
        named = [pair for module in modules for pair in module.named_parameters()]
        weights = dtype.itemsize * sum(weight.numel() for name, weight in named if not name.endswith(on_cpu))
        room, where = memory - weights, f"beside the weights {device}"
        if room < 0:
            return  # a system may still page them
        check_request(self.config, request, dtype.itemsize, room, where, self.settings_of_memory, self.cuda_graphs)
        height, width = request.size(self.tokenizer.downscale)
        decoding = decoding_bytes(self.tokenizer.autoencoder.config, height, width, dtype.itemsize)
        pictures = request.num_images * (
            3 * height * width + 4 * self.tokenizer.channels * request.grid.height * request.grid.width
        )
        if decoding + pictures > room:
            setting = self.settings_of_memory.get("size" if decoding > pictures else "images", "num_images")
            refuse(decoding + pictures, room, "decoding this", where, setting)

    def add_lora(self, path: str | Path, strength: float = 1.0) -> None:
        """Merge a LoRA file into the weights; it stays in them. Raises BitDanceError for a file that does not fit."""
        check_loras(self.model, [Lora(Path(path), strength)])
        merge_loras(self.model, [Lora(Path(path), strength)])

    def _draw(self, request: Request, seed: int, callback: Callback | None, cancel: Cancel | None) -> GenerateOutput:
        """Draw a request's bits and decode them."""
        self.check_memory(request, self.device, self.dtype)
        # on the CPU, so that a seed means the same noise on every device
        generator = torch.Generator("cpu").manual_seed(seed)
        graphs = Graphs() if self.cuda_graphs else None
        bits = generate(
            self.model, request, generator, self.device, self.dtype, callback, cancel, graphs, self.velocity
        )
        images = []
        for row in bits.split(1):  # one image at a time: decoding takes more memory than all else
            check_cancelled(cancel)
            images += to_images(self.tokenizer.decode(row, generator))
        return GenerateOutput(images, (bits > 0).cpu())


class BitDancePipeline(Pipeline):
    """A text-to-image model ready to draw. Make one with `from_pretrained`."""

    settings_of_memory = {
        "images": "num_images", "steps": "steps", "prompt": "the length of the prompt", "size": "height and width"
    }  # fmt: skip

    @classmethod
    def from_pretrained(
        cls,
        source: Source,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        local_files_only: bool = False,
        attend: AttentionFn = attention,
        cuda_graphs: bool = False,
        compile_head: bool = False,
        tokenizer: str | Path | None = None,
    ) -> BitDancePipeline:
        """Load a model from a folder (official, diffusers, or with single files), a file, a set of files with their
        tokenizer.json, a hub id (downloaded unless `local_files_only`) or a built-in name.

        `device` defaults to the GPU if there is one, `dtype` to bfloat16 on a GPU and float32 on the CPU. The embedding
        table stays on the CPU. `compile_head` compiles the head with torch.compile: worthwhile for many images; on a
        CPU it keeps a second copy of the head's weights. `cuda_graphs` captures a patch's flow and its reading; use it
        if kernel launches dominate. `tokenizer`, a file or a folder, replaces the model's own binary tokenizer; its
        tokens must have as many bits and pixels. Raises BitDanceError (a ValueError), which names the file and the
        fault.
        """
        device, dtype = devices.choose(device, dtype)
        devices.check_graphs(device, cuda_graphs)
        replacement = None if tokenizer is None else Path(tokenizer)
        checkpoint = read_text_checkpoint(locate(source, local_files_only=local_files_only), replacement)
        return load_pipeline(checkpoint, device, dtype, attend, cuda_graphs, compile_head)

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
        *,
        callback: Callback | None = None,
        cancel: Cancel | None = None,
        **settings: Any,
    ) -> GenerateOutput:
        """Draw `num_images` images of a prompt. The same arguments mean the same noise on every device.

        Size (pixels), steps and guidance default to the model's own; with `init_bits` the size is theirs. guidance <= 1
        draws without an unconditional branch. `callback(patch, patches, bits)` is called after each drawn patch with
        the grid so far (n, C, h, w): +-1, and 0 where nothing is drawn yet. `cancel()` is called before every network
        evaluation and stops the run with `Cancelled` when it returns True. Raises BitDanceError for invalid settings
        before any work.

        `settings` are the other arguments of `request`:

        negative_prompt (str): replaces the empty prompt of the unconditional branch.
        init_bits (num_images or 1, C, h, w), bool, and denoise in [0, 1]: the flow starts from these bits at time
            1 - denoise. denoise 1 without a mask draws afresh, 0 returns the bits.
        mask (num_images or 1, H, W), 1 = redraw: keeps every token in which it stays below 0.5 (see `make_edit`).
        regions: pairs of a prompt and a mask (1, H, W); a token follows the last one that covers it, else `prompt`.
        sampler: "euler_maruyama", "euler" or "heun".
        allow_untrained_size: allow a size outside the model's list.
        last_steps, last_guidance, guidance_interval, noise_scale, time_shift, schedule: see `Sampling`.
        """
        size = {"height": height, "width": width, "num_images": num_images}
        request = self.check(seed, prompt=prompt, steps=steps, guidance=guidance, **size, **settings)
        return self._draw(request, seed, callback, cancel)

    def request(
        self,
        prompt: str,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        num_images: int | None = None,
        negative_prompt: str | None = None,
        init_bits: Tensor | None = None,
        denoise: float = 1.0,
        mask: Tensor | None = None,
        regions: Sequence[tuple[str, Tensor]] = (),
        sampler: str = DEFAULT_SAMPLER,
        allow_untrained_size: bool = False,
        **options: Any,
    ) -> Request:
        """Check the arguments of `generate` and turn them into a request. Reads no weight."""
        if not isinstance(prompt, str) or not isinstance(negative_prompt, str | None):
            raise BitDanceError("prompt and negative_prompt must be text")
        prompts = [prompt, *(text for text, _ in regions)]
        if not all(isinstance(text, str) for text in prompts):
            raise BitDanceError("regions must be pairs of a prompt and a mask (1, H, W)")
        if init_bits is not None:
            init_bits = torch.as_tensor(init_bits)
            height, width = self._size_of(init_bits, height, width)
        default = self.default_size
        height, width = default[0] if height is None else height, default[1] if width is None else width
        if num_images is None:
            num_images = 1 if init_bits is None else len(init_bits)
        num_images = whole_number("num_images", num_images, least=1, most=MAX_IMAGES)
        grid = make_grid(self.config, self.prompts, height, width, allow_untrained_size)
        sampling = Sampling.for_model(self.config, sampler, steps, guidance, **options)
        step = self.config.autoencoder.downscale
        edit = make_edit(init_bits, denoise, mask, grid, num_images, self.config.head.bits, step)

        opening = self.prompts.opening(grid.height, grid.width, grid.tokens_per_patch)
        branches = [self.prompts.conditional(text) + opening for text in prompts]
        covers = [token_mask(where, grid, 1, step)[0] >= THRESHOLD for _, where in regions]
        if sampling.branches > 1:
            negative = self.prompts.conditional(negative_prompt) if negative_prompt else self.prompts.unconditional()
            branches.append(negative + opening)
        return Request(branches, grid, sampling, num_images, edit, region_map(covers, grid) if covers else None)

    def subject(
        self, prompt: str | None, labels: list | None = None, num_images: int = 1, **settings: Any
    ) -> dict[str, Any]:
        """Turn a line of a batch or of the command line into arguments of `generate`, the size filled in."""
        if prompt is None:
            raise BitDanceError("'labels' are for ImageNet models; this one draws a 'prompt'")
        sides = zip(("height", "width"), self.default_size)
        sizes = {name: settings.get(name) or default for name, default in sides}
        return {"prompt": prompt, **settings, **sizes, "num_images": num_images}

    def _size_of(self, bits: Tensor, height: int | None, width: int | None) -> Size:
        """Return the size of bits in pixels. Raises BitDanceError where another height or width is set."""
        if bits.ndim != 4:
            raise BitDanceError(f"init_bits must be (n, C, h, w), found {list(bits.shape)}")
        step = self.config.autoencoder.downscale
        size = bits.shape[2] * step, bits.shape[3] * step
        if height not in (None, size[0]) or width not in (None, size[1]):
            raise BitDanceError(f"init_bits are of {size[0]}x{size[1]} pixels (height x width), not {height}x{width}")
        return size


class ImageNetPipeline(Pipeline):
    """A class-conditional model ready to draw. Make one with `from_pretrained`."""

    settings_of_memory = {"images": "the number of classes", "steps": "steps"}
    unused = ("height", "width", "negative_prompt", "allow_untrained_size")

    @classmethod
    def from_pretrained(
        cls,
        path: Source,
        tokenizer: str | Path | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        attend: AttentionFn = attention,
        cuda_graphs: bool = False,
        compile_head: bool = False,
    ) -> ImageNetPipeline:
        """Load a model from its file (.pt or .safetensors) and its binary tokenizer, by default the one in the file or
        beside it.

        All else is as for `BitDancePipeline`. Raises BitDanceError, which names the file and the fault.
        """
        device, dtype = devices.choose(device, dtype)
        checkpoint = read_class_checkpoint(locate(path, files=None), None if tokenizer is None else Path(tokenizer))
        return load_pipeline(checkpoint, device, dtype, attend, cuda_graphs, compile_head)

    @torch.no_grad()  # and not inference_mode: a user may go on to edit the bits
    def generate(
        self,
        labels: Sequence[int | str] = (207,),
        steps: int | None = None,
        guidance: float | None = None,
        schedule: str | None = None,
        seed: int = 0,
        *,
        callback: Callback | None = None,
        cancel: Cancel | None = None,
        **settings: Any,
    ) -> GenerateOutput:
        """Draw one image of each class in `labels`: its number or, for a model of ImageNet's 1000, its name.

        Steps, guidance and its schedule default to the model's own; "linear" lets guidance rise from 1 with the
        patches, "constant" is the same for all. `settings` are sampler, init_bits, denoise, mask and the options of
        `Sampling`; all else is as in `BitDancePipeline.generate`. Raises BitDanceError for invalid settings before any
        work.
        """
        request = self.check(seed, labels=labels, steps=steps, guidance=guidance, schedule=schedule, **settings)
        return self._draw(request, seed, callback, cancel)

    def request(
        self,
        labels: Sequence[int | str] = (207,),
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str = DEFAULT_SAMPLER,
        init_bits: Tensor | None = None,
        denoise: float = 1.0,
        mask: Tensor | None = None,
        **options: Any,
    ) -> Request:
        """Check the arguments of `generate` and turn them into a request. Reads no weight."""
        classes = class_numbers(labels, self.config)
        if len(classes) > MAX_IMAGES:
            raise BitDanceError(f"found {len(classes)} classes, at most {MAX_IMAGES} are drawn together")
        sampling = Sampling.for_model(self.config, sampler, steps, guidance, **options)
        grid = self.model.grid
        if init_bits is not None:
            init_bits = torch.as_tensor(init_bits)
        edit = make_edit(init_bits, denoise, mask, grid, len(classes), self.config.bits, self.tokenizer.downscale)
        branches = [classes] + [[self.config.null_class] * len(classes)] * (sampling.branches - 1)
        return Request(branches, grid, sampling, len(classes), edit)

    def subject(
        self, prompt: str | None, labels: list | None = None, num_images: int = 1, **settings: Any
    ) -> dict[str, Any]:
        """Turn a line of a batch or of the command line into arguments of `generate`; a prompt lists classes."""
        classes = class_numbers(parse_classes(prompt) if labels is None else labels, self.config)
        num_images = whole_number("num_images", num_images, least=1, most=MAX_IMAGES)
        return {"labels": [label for label in classes for _ in range(num_images)]}


PIPELINES: dict[type, type[Pipeline]] = {TextCheckpoint: BitDancePipeline, ClassCheckpoint: ImageNetPipeline}


def load_pipeline(
    checkpoint: TextCheckpoint | ClassCheckpoint,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    attend: AttentionFn = attention,
    cuda_graphs: bool = False,
    compile_head: bool = False,
    loras: Sequence[Lora] = (),
) -> Pipeline:
    """Load a recognised model of either kind, and merge LoRA files into it; the other arguments are those of
    `BitDancePipeline.from_pretrained`.
    """
    device, dtype = devices.choose(device, dtype)
    devices.check_graphs(device, cuda_graphs)
    model, autoencoder = checkpoint.build(attend=attend), checkpoint.tokenizer.build()
    parts = [*checkpoint.modules(model), (autoencoder, checkpoint.tokenizer.component)]
    load_weights(parts, device, dtype, on_cpu=("embed_tokens.weight",))
    merge_loras(model, loras)
    velocity = compiled_velocity(model.head, frozen=device.type == "cpu") if compile_head else None
    tokenizer = BinaryTokenizer(autoencoder, device, dtype)
    return PIPELINES[type(checkpoint)](model, tokenizer, checkpoint.prompts, cuda_graphs, velocity)


def outline(checkpoint: TextCheckpoint | ClassCheckpoint) -> Pipeline:
    """Make a pipeline without weights, which checks the arguments of `generate` (by `request`) and draws nothing."""
    tokenizer = BinaryTokenizer(checkpoint.tokenizer.build(), torch.device("meta"), torch.float32)
    return PIPELINES[type(checkpoint)](checkpoint.build(), tokenizer, checkpoint.prompts)
