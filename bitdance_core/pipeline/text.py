"""Draw a prompt: the pipeline of text-to-image models."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.checkpoint import read_text_checkpoint
from ..checkpoints.locate import Source, locate
from ..errors import BitDanceError, Cancel, whole_number
from ..model.attention import AttentionFn, attention
from ..model.fields import Size
from ..model.vocabulary import unseen_note
from ..sampling.editing import THRESHOLD, make_edit, region_map, token_mask
from ..sampling.flow import DEFAULT_SAMPLER
from ..sampling.generate import Callback
from ..sampling.plan import Request
from ..sampling.settings import Sampling
from ..sampling.sizes import make_grid
from .base import MAX_IMAGES, Pipeline
from .loading import choose, load
from .output import GenerateOutput


class UnseenWords(UserWarning):
    """A prompt has words on which a small model was not trained."""


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
        quantize: str | None = None,
        offload: bool = False,
        triton_kernels: bool = True,
    ) -> BitDancePipeline:
        """Load a model from a folder (official, diffusers, or with single files), a file, a set of files with their
        tokenizer.json, a hub id (downloaded unless `local_files_only`) or a built-in name.

        `device` defaults to the GPU if there is one, `dtype` to bfloat16 on a GPU and float32 on the CPU. The embedding
        table stays on the CPU. `compile_head` compiles the head with torch.compile: worthwhile for many images; on a
        CPU it keeps a second copy of the head's weights. `cuda_graphs` captures a patch's flow and its reading; use it
        if kernel launches dominate. `tokenizer`, a file or a folder, replaces the model's own binary tokenizer; its
        tokens must have as many bits and pixels. `quantize` "int8" stores the weights of the layers in one byte each;
        what that changes is in docs/memory.md. `offload` keeps the language model in system memory, pinned, and copies
        each layer to the GPU just before its turn; all else stays on the GPU. It is refused on a CPU. `triton_kernels`
        fuses the head's small operations on NVIDIA GPUs, if Triton is installed. `attend=FlashAttention()` uses the
        package flash-attn. Raises BitDanceError (a ValueError), which names the file and the fault.
        """
        device, dtype = choose(device, dtype, cuda_graphs, quantize, offload)
        replacement = None if tokenizer is None else Path(tokenizer)
        checkpoint = read_text_checkpoint(locate(source, local_files_only=local_files_only), replacement)
        options = attend, cuda_graphs, compile_head, quantize, offload, triton_kernels
        return load(cls, checkpoint, device, dtype, *options)

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
        progress: bool | None = None,
        **settings: Any,
    ) -> GenerateOutput:
        """Draw `num_images` images of a prompt. The same arguments mean the same noise on every device.

        Size (pixels), steps and guidance default to the model's own; with `init_bits` the size is theirs. guidance <= 1
        draws without an unconditional branch. `callback(patch, patches, bits)` is called after each drawn patch with
        the grid so far (n, C, h, w): +-1, and 0 where nothing is drawn yet. `cancel()` is called before every network
        evaluation and stops the run with `Cancelled` when it returns True. `progress` shows a bar over the
        patches; None: in notebooks only. Raises BitDanceError for invalid settings before any work, and warns
        (UnseenWords) of words on which a model of few words was not trained.

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
        texts = [prompt, settings.get("negative_prompt") or "", *(text for text, _ in settings.get("regions") or ())]
        if note := self.unseen_note(texts):
            warnings.warn(note, UnseenWords, stacklevel=3)  # no_grad is between
        return self._draw(request, seed, callback, cancel, progress)

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

    def unseen_note(self, texts: Iterable[str]) -> str | None:
        """Say which words of prompts neither the model nor its LoRAs were trained on; None where there are none, and
        for a model that was trained on any words.
        """
        return unseen_note(self.prompts.vocabulary, texts, self.taught)

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
            raise BitDanceError(f"init_bits are of {size[1]}x{size[0]} pixels (width x height), not {width}x{height}")
        return size
