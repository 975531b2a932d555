"""A run of `finetune-tokenizer`: load the tokenizer, train it, measure it before and after, write it."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image

from ..bits import metrics
from ..checkpoints.files import SAFETENSORS_DTYPES
from ..checkpoints.layouts import HEADER_KEY
from ..checkpoints.load import load_weights
from ..checkpoints.recode import recoded
from ..checkpoints.tokenizer_files import TokenizerCheckpoint
from ..checkpoints.writer import Planned, write_safetensors
from ..errors import BitDanceError
from ..parts import TOKENIZER
from ..tokenizer import BinaryTokenizer, to_images, to_pixels
from ..version import __version__
from .data import Example
from .perceptual import Lpips
from .run_folder import planned
from .runner import Run
from .tokenizer import PictureSource, Reconstruction, cut
from .trainer import Trainer

HELD_OUT = 10  # every tenth picture is kept back to measure on,
MOST_HELD_OUT = 64  # but no more than these
SHOWN = 8  # pictures of a sample


@dataclasses.dataclass
class TokenizerRun(Run):
    """A run on a binary tokenizer; its settings are `TokenizerSettings`."""

    checkpoint: TokenizerCheckpoint
    perceptual: Lpips | None

    @cached_property
    def held_out(self) -> list[Example]:
        """Pictures to measure on that are not trained on; of fewer than HELD_OUT, all, which are trained on too."""
        examples = self.data.examples
        return examples[:: max(HELD_OUT, math.ceil(len(examples) / MOST_HELD_OUT))] if self.is_split else examples

    @property
    def is_split(self) -> bool:
        return len(self.data.examples) >= HELD_OUT

    can_be_split = False  # it is small, and measured by parts of it

    def is_mixed(self) -> bool:
        return self.dtype == torch.bfloat16

    def prepare(self) -> Trainer:
        self.autoencoder = autoencoder = self.checkpoint.build()
        load_weights([(autoencoder, self.checkpoint.component)], self.accelerator.device, torch.float32)
        learns = autoencoder.decoder if self.settings.decoder_only else autoencoder
        learns.requires_grad_(True)
        self.before = self._measure() if self.accelerator.is_main_process else None
        kept = set() if not self.is_split else {example.path for example in self.held_out}
        taught = [example for example in self.data.examples if example.path not in kept]
        objective = Reconstruction(autoencoder, self.settings, self.perceptual)
        parameters = {name: p for name, p in autoencoder.named_parameters() if p.requires_grad}
        source = PictureSource(taught, self.settings.flip)
        return Trainer(objective, parameters, source, self.settings, self.accelerator)

    @torch.no_grad()
    def _measure(self) -> metrics.Reconstruction:
        """Return mean PSNR and SSIM of the pictures kept back, rounded to 8 bits as files are."""
        figures = []
        for example in self.held_out:
            pixels = to_pixels(cut(example))
            result = to_pixels(self._reconstructed(pixels))
            figures += metrics.measure((pixels + 1) / 2, (result + 1) / 2, 0)
        return metrics.mean(figures)

    def _reconstructed(self, pixels: torch.Tensor) -> Image.Image:
        tokenizer = BinaryTokenizer(self.autoencoder, self.accelerator.device, torch.float32)
        return to_images(tokenizer.decode(tokenizer.encode(pixels)))[0]

    @torch.no_grad()
    def sample(self, step: int) -> None:
        """Log the quality as of a step; write the first pictures kept back, and below them what becomes of them."""
        figures = self._measure() if step else self.before
        self.folder.log({"step": step, "psnr": figures.psnr, "ssim": figures.ssim})
        pictures = [cut(example) for example in self.held_out[:SHOWN]]
        side = self.settings.size
        sheet = Image.new("RGB", (side * len(pictures), 2 * side))
        for number, picture in enumerate(pictures):
            sheet.paste(picture, (side * number, 0))
            sheet.paste(self._reconstructed(to_pixels(picture)), (side * number, side))
        self.folder.sample(sheet, step, 1)

    def save(self, step: int) -> None:
        self._write(self.folder.latest, step)

    def write(self) -> None:
        self._write(self.folder.out, self.settings.steps)
        where = "kept back from the training" if self.is_split else "trained on"
        print(f"before: {self.before}\nafter: {self._measure()} ({len(self.held_out)} pictures {where})")

    def _write(self, path: Path, step: int) -> None:
        """Write the tokenizer with its published names and types; what was not trained stays byte for byte."""
        trained = {name: p.detach() for name, p in self.autoencoder.named_parameters() if p.requires_grad}
        if not all(tensor.isfinite().all() for tensor in trained.values()):
            raise BitDanceError(f"{path} was not written: the training diverged (NaN or infinity); lower --lr")
        tensors: list[Planned] = []
        for name, info in self.checkpoint.component.tensors.items():
            if name in trained:
                kind = SAFETENSORS_DTYPES[info.dtype]
                tensors.append(planned(name, trained[name].to(kind)))
            else:
                tensors += recoded(name, info, None)
        about = {
            "source": self.checkpoint.path.name,
            "configs": {TOKENIZER: self.checkpoint.config.to_dict()},
            "pictures": len(self.data.examples),
            "step": step,
            "settings": dataclasses.asdict(self.settings),
            "version": __version__,
        }
        write_safetensors(path, tensors, {"format": "pt", HEADER_KEY: json.dumps(about)}, lambda _: None)
