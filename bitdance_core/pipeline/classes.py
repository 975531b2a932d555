"""Draw classes: the pipeline of ImageNet models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.checkpoint import read_class_checkpoint
from ..checkpoints.locate import Source, locate
from ..errors import BitDanceError, Cancel, whole_number
from ..model.attention import AttentionFn, attention
from ..model.class_names import class_numbers, parse_classes
from ..sampling.editing import make_edit
from ..sampling.flow import DEFAULT_SAMPLER
from ..sampling.generate import Callback
from ..sampling.plan import Request
from ..sampling.settings import Sampling
from .base import MAX_IMAGES, Pipeline
from .loading import choose, load
from .output import GenerateOutput


class ImageNetPipeline(Pipeline):
    """A class-conditional model ready to draw. Make one with `from_pretrained`."""

    settings_of_memory = {"images": "the number of classes", "steps": "steps"}
    unused = ("height", "width", "negative_prompt", "allow_untrained_size", "outpaint", "region")

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
        quantize: str | None = None,
        offload: bool = False,
        triton_kernels: bool = True,
    ) -> ImageNetPipeline:
        """Load a model from its file (.pt or .safetensors) and its binary tokenizer, by default the one in the file or
        beside it.

        All else is as for `BitDancePipeline`. Raises BitDanceError, which names the file and the fault.
        """
        device, dtype = choose(device, dtype, cuda_graphs, quantize, offload)
        checkpoint = read_class_checkpoint(locate(path, files=None), None if tokenizer is None else Path(tokenizer))
        options = attend, cuda_graphs, compile_head, quantize, offload, triton_kernels
        return load(cls, checkpoint, device, dtype, *options)

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
        progress: bool | None = None,
        **settings: Any,
    ) -> GenerateOutput:
        """Draw one image of each class in `labels`: its number or, for a model of ImageNet's 1000, its name.

        Steps, guidance and its schedule default to the model's own; "linear" lets guidance rise from 1 with the
        patches, "constant" is the same for all. `settings` are sampler, init_bits, denoise, mask and the options of
        `Sampling`; all else is as in `BitDancePipeline.generate`. Raises BitDanceError for invalid settings before any
        work.
        """
        request = self.check(seed, labels=labels, steps=steps, guidance=guidance, schedule=schedule, **settings)
        return self._draw(request, seed, callback, cancel, progress)

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
