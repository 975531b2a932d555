"""The public way in to the class-conditional models: classes become pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import devices
from .attention import AttentionFn, attention
from .autoencoder import BinaryAutoencoder
from .checkpoint import Source, locate, read_imagenet
from .config import Size
from .editing import make_edit
from .errors import BitDanceError, Cancel, whole_number
from .flow import Sampling
from .generate import Callback
from .head import compiled
from .imagenet import ImageNetModel
from .imagenet_classes import class_index
from .imagenet_config import ImageNetConfig
from .pipeline import GenerateOutput, draw
from .tokenizer import BinaryTokenizer
from .weights import load_weights

IMAGENET_CLASSES = 1000  # models of as many know their names


class ImageNetPipeline:
    """A class-conditional model ready to draw. Make one with `from_pretrained`."""

    def __init__(
        self,
        model: ImageNetModel,
        tokenizer: BinaryTokenizer,
        device: torch.device,
        dtype: torch.dtype,
        cuda_graphs: bool = False,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device = device
        self.dtype = dtype
        self.cuda_graphs = cuda_graphs

    @classmethod
    def from_pretrained(
        cls,
        path: Source,
        tokenizer: str | Path | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        attend: AttentionFn = attention,
        cuda_graphs: bool = False,
        compile_head: bool = False,
    ) -> ImageNetPipeline:
        """Load a model from its file (.pt or .safetensors) and its binary tokenizer, by default the one in the file or
        beside it.

        All else is as for `BitDancePipeline`. Raises BitDanceError, which names the file and what
        is wrong.
        """
        device, dtype = devices.choose(device, dtype)
        devices.check_graphs(device, cuda_graphs)
        checkpoint = read_imagenet(locate(path, files=None), None if tokenizer is None else Path(tokenizer))
        model = ImageNetModel(checkpoint.config, attend=attend, device="meta").eval()
        autoencoder = BinaryAutoencoder(checkpoint.autoencoder_config, device="meta").eval()
        parts = [(model, checkpoint.backbone), (autoencoder, checkpoint.autoencoder)]
        load_weights(parts, device, dtype)
        if compile_head:
            model.head = compiled(model.head, frozen=device.type == "cpu")
        return cls(model, BinaryTokenizer(autoencoder, device, dtype), device, dtype, cuda_graphs)

    @property
    def config(self) -> ImageNetConfig:
        return self.model.config

    @property
    def default_size(self) -> Size:
        """(height, width) in pixels, the only one."""
        return self.config.defaults.default_size

    @torch.no_grad()  # and not inference_mode: a user may go on to edit the bits
    def generate(
        self,
        labels: Sequence[int | str] = (207,),
        steps: int | None = None,
        guidance: float | None = None,
        schedule: str | None = None,
        seed: int = 0,
        sampler: str = "euler_maruyama",
        init_bits: Tensor | None = None,
        denoise: float = 1.0,
        mask: Tensor | None = None,
        callback: Callback | None = None,
        cancel: Cancel | None = None,
        last_steps: int | None = None,
        last_guidance: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        noise_scale: float = 1.0,
        time_shift: float | None = None,
    ) -> GenerateOutput:
        """Draw one picture of each class in `labels`: its number or, of a model of ImageNet's 1000, its name.

        Steps, guidance and its schedule default to the model's own; "linear" lets guidance grow from 1 with the
        patches, "constant" is the same for all. All else is as in `BitDancePipeline.generate`. Raises BitDanceError
        before any work for what cannot be.
        """
        defaults = self.config.defaults
        if schedule is None:  # the model's own would be a second one beside `last_guidance`
            schedule = defaults.schedule if last_guidance is None else "constant"
        classes = class_numbers(labels, self.config)
        seed = whole_number("seed", seed, least=0, most=2**64 - 1)
        sampling = Sampling(
            sampler=sampler,
            steps=defaults.steps if steps is None else steps,
            guidance=defaults.guidance if guidance is None else guidance,
            time_shift=self.config.head.time_shift if time_shift is None else time_shift,
            last_steps=last_steps,
            last_guidance=last_guidance,
            guided=guidance_interval,
            noise_scale=noise_scale,
            schedule=schedule,
        )
        grid = self.model.grid
        if init_bits is not None:
            init_bits = torch.as_tensor(init_bits)
        edit = make_edit(init_bits, denoise, mask, grid, len(classes), self.config.bits)
        branches = [classes]
        if sampling.branches > 1:
            branches.append([self.config.null_class] * len(classes))
        return draw(
            self.model, self.tokenizer, branches, grid, sampling, len(classes), seed, callback, cancel, edit,
            cuda_graphs=self.cuda_graphs,
        )  # fmt: skip


def class_numbers(labels: Sequence[int | str], config: ImageNetConfig) -> list[int]:
    """Of classes by number or by name, or BitDanceError with those that there are."""
    most = config.num_classes - 1
    labels = labels.tolist() if hasattr(labels, "tolist") else labels
    labels = [labels] if isinstance(labels, str) or not isinstance(labels, Iterable) else list(labels)
    if not labels:
        raise BitDanceError(f"labels must be one class for each picture, each from 0 to {most}; found none")
    if any(isinstance(label, str) for label in labels):
        if config.num_classes != IMAGENET_CLASSES:
            raise BitDanceError(f"{config.family} has classes without names; labels must be numbers from 0 to {most}")
        labels = [class_index(label) if isinstance(label, str) else label for label in labels]
    return [whole_number("a label", label, least=0, most=most) for label in labels]
