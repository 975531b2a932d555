"""What a binary tokenizer is trained for: pictures that come back from their bits as they were.

The built-in models' trainers use the loss too (builtin/train.py). There is no discriminator: a decoder is not taught to
invent what the bits do not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ..model.binarize import binarize
from ..model.fields import Size
from ..model.tokenizer_network import BinaryAutoencoder
from ..tokenizer import opened, to_pixels, to_rgb
from .data import Example
from .objective import Objective
from .settings import TokenizerSettings

Perceptual = Callable[[Tensor, Tensor], Tensor]  # of two batches of pixels: their distance


@dataclass(frozen=True)
class Weights:
    """How much each term counts. Commitment and entropy act on the encoder alone."""

    l1: float = 1.0
    mse: float = 1.0
    perceptual: float = 0.0
    commitment: float = 0.02  # draws the encoder's output to -1 and +1
    entropy: float = 0.02  # for each bit to be set as often as not


def reconstruction_loss(
    autoencoder: BinaryAutoencoder,
    pixels: Tensor,
    weights: Weights,
    flipped: Tensor | None = None,
    perceptual: Perceptual | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of pixels [B, 3, H, W] in [-1, 1], float32, with its mean squared error and the bits' entropy.

    `flipped` bool [B, C, h, w] says which bits the decoder receives wrong. A frozen encoder keeps no activations.
    """
    learns = any(parameter.requires_grad for parameter in autoencoder.encoder.parameters())
    with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
        z = autoencoder.encoder(pixels)
    bits = binarize(z)
    read = z + (bits - z).detach()  # straight-through: the gradient of the sign is 1
    if flipped is not None:
        read = torch.where(flipped, -read, read)
    output = autoencoder.decoder(read).float()
    mse = F.mse_loss(output, pixels)
    share = torch.sigmoid(4 * z).mean(dim=(0, 2, 3))  # share of +1 for each bit
    entropy = -(share * share.clamp_min(1e-6).log2() + (1 - share) * (1 - share).clamp_min(1e-6).log2()).mean()
    loss = weights.l1 * F.l1_loss(output, pixels) + weights.mse * mse
    if learns:
        loss = loss + weights.commitment * F.mse_loss(z, bits) - weights.entropy * entropy
    if perceptual is not None:
        loss = loss + weights.perceptual * perceptual(output, pixels)
    return loss, {"mse": mse, "entropy": entropy}


def random_flips(shape: Sequence[int], most: float, generator: torch.Generator) -> Tensor:
    """Draw a mask of bits to flip, with a random share of up to `most` for each row of the batch."""
    share = most * torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator)
    return torch.rand(shape, generator=generator) < share


@dataclass(frozen=True)
class Pixels:
    """Pictures of one size: float32 [B, 3, H, W] in [-1, 1]."""

    values: Tensor

    def rows(self, rows: slice) -> Pixels:
        return Pixels(self.values[rows])


@dataclass(frozen=True)
class Flips:
    """The bits that a step's decoder receives wrong: bool [B, C, h, w]."""

    flipped: Tensor

    def rows(self, rows: slice) -> Flips:
        return Flips(self.flipped[rows])

    def to(self, device: torch.device | str) -> Flips:
        return Flips(self.flipped.to(device))


class Reconstruction(Objective):
    """A binary tokenizer and its loss."""

    figure = "mse"

    def __init__(
        self, autoencoder: BinaryAutoencoder, settings: TokenizerSettings, perceptual: torch.nn.Module | None
    ) -> None:
        super().__init__()
        self.autoencoder, self.perceptual, self.wrong_bits = autoencoder, perceptual, settings.wrong_bits
        terms = ("l1", "mse", "perceptual", "commitment", "entropy")
        self.weights = Weights(**{name: getattr(settings, name) for name in terms})

    def draw(self, batch: Pixels, generator: torch.Generator) -> Flips:
        config, (count, _, *sides) = self.autoencoder.config, batch.values.shape
        shape = count, config.bits, *(side // config.downscale for side in sides)
        return Flips(random_flips(shape, self.wrong_bits, generator))

    def forward(self, batch: Pixels, draws: Flips) -> Tensor:
        pixels = batch.values.to(draws.flipped.device)
        loss, figures = reconstruction_loss(self.autoencoder, pixels, self.weights, draws.flipped, self.perceptual)
        return torch.stack([loss, figures["mse"]])


class PictureSource:
    """Pictures, cut to one size at places that each step draws; with `flip` every second one is mirrored, at random."""

    def __init__(self, examples: Sequence[Example], flip: bool) -> None:
        self.examples, self.flip = examples, flip
        self.counts = [len(examples)]

    def batch(self, bucket: int, chosen: Sequence[int], rng: np.random.Generator) -> Pixels:
        places, mirrored = rng.random((len(chosen), 2)), rng.random(len(chosen)) < 0.5
        pictures = [cut(self.examples[number], place) for number, place in zip(chosen, places)]
        mirror = [ImageOps.mirror(p) if m and self.flip else p for p, m in zip(pictures, mirrored)]
        return Pixels(torch.cat([to_pixels(picture) for picture in mirror]))


def cut(example: Example, place: Sequence[float] = (0.5, 0.5)) -> Image.Image:
    """Read a picture and cut it to its size at a place (x, y) in [0, 1]; the shorter side is kept whole."""
    size: Size = example.size
    with opened(example.path) as image:
        target, method = (size[1], size[0]), Image.Resampling.LANCZOS
        return ImageOps.fit(to_rgb(image), target, method, centering=tuple(place))
