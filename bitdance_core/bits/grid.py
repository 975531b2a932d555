"""Bit grids of pictures, packed, in memory and in files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ..checkpoints.files import open_safetensors, write_whole
from ..errors import BitDanceError, whole_number
from ..model.binarize import pack, unpack
from ..model.fields import MAX_WIDTH

FORMAT = "bitdance_bits"


@dataclass(frozen=True)
class BitGrid:
    """`batch` pictures of `height` x `width` tokens, each `channels` bits for `step` x `step` pixels.

    An empty canvas has no bits: `packed` is None, `channels` 0, and a token is one pixel (`step` 1). A height and width
    of 0 mean the model's default size. `step` None means unknown (bits that came as a LATENT).
    """

    batch: int
    height: int
    width: int
    step: int | None = 1
    channels: int = 0
    packed: Tensor | None = None  # uint8 (batch, ceil(channels * height * width / 8)), see bits.pack
    prompt: str = ""  # that the pictures were drawn from
    mask: Tensor | None = None  # (n or 1, H, W): where to redraw; not saved to files
    # each picture's number in a batch that it was taken from, which decides its noise (see `NoiseSource`); None: an
    # ordinary batch; not saved to files
    indices: tuple[int, ...] | None = None
    aspect: str | None = None  # of an empty canvas of no size: one of `sampling.sizes.ASPECTS`, for the model to choose

    @classmethod
    def from_bits(cls, bits: Tensor, step: int | None, prompt: str = "") -> BitGrid:
        """Pack bits (n, C, h, w): bool, or numbers whose sign is the bit."""
        bits = bits if bits.dtype == torch.bool else bits > 0
        n, channels, height, width = bits.shape
        return cls(n, height, width, step, channels, pack(bits), prompt)

    @property
    def tokenizer(self) -> str:
        """The kind of tokenizer that can decode these bits, such as "d16c32": downscale and channels."""
        return f"d{self.step or '?'}c{self.channels}"

    def size(self, step: int) -> tuple[int, int]:
        """Return (height, width) in pixels; `step` is used if the grid's own is unknown."""
        return self.height * (self.step or step), self.width * (self.step or step)

    def bits(self) -> Tensor:
        """Unpack the bits as bool (n, C, h, w)."""
        assert self.packed is not None, "an empty canvas has no bits"
        return unpack(self.packed, (self.channels, self.height, self.width))

    def signs(self) -> Tensor:
        """Unpack the bits as float32 (n, C, h, w), +-1."""
        return torch.where(self.bits(), 1.0, -1.0)

    def check(self, step: int, channels: int, of: str) -> None:
        """Raise BitDanceError unless the bits fit `of`'s tokenizer of `channels` bits per `step` x `step` pixels."""
        if self.channels != channels or self.step not in (step, None):
            raise BitDanceError(
                f"these bits are of a {self.tokenizer} tokenizer ({self.channels} bits per "
                f"{self.step or '?'}x{self.step or '?'} pixels), {of} needs those of a d{step}c{channels} one"
            )


def save_bits(grid: BitGrid, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file: the bits, and the other fields in its header with `metadata`.

    The prompt is under `text`, because ComfyUI's page reads a graph from `prompt`. Raises BitDanceError for an empty
    canvas.
    """
    if grid.packed is None:
        raise BitDanceError("an empty canvas has no bits to save; draw on it first, or encode an image")
    fields = ("batch", "height", "width", "step", "channels")
    header = {name: str(getattr(grid, name) or 0) for name in fields}
    header |= {"format": FORMAT, "tokenizer": grid.tokenizer, "text": grid.prompt}
    write_whole(path, save({"bits": grid.packed.contiguous()}, {**(metadata or {}), **header}))


def load_bits(path: Path) -> BitGrid:
    """Read a file that `save_bits` wrote. Raises BitDanceError, with the reason, for any other file."""
    with open_safetensors(path) as file:
        header = file.metadata() or {}
        keys = list(file.keys())
        if header.get("format") != FORMAT or keys != ["bits"]:
            found = ", ".join(keys[:3]) or "nothing"
            raise BitDanceError(
                f"{path.name} is not a file of bits (it holds {found}); use a file that Save Bits wrote"
            )
        try:
            n, height, width, channels = (
                whole_number(name, int(header.get(name, "")), 1, MAX_WIDTH)
                for name in ("batch", "height", "width", "channels")
            )
            step = whole_number("step", int(header.get("step", "")), 0, 1024) or None
        except ValueError as error:
            raise BitDanceError(f"{path.name} is damaged: invalid grid in its header ({error})") from error
        part = file.get_slice("bits")
        expected = [n, math.ceil(channels * height * width / 8)]
        if part.get_dtype() != "U8" or part.get_shape() != expected:
            raise BitDanceError(
                f"{path.name} is damaged: its header says {n} grids of {channels}x{height}x{width} bits, "
                f"its tensor is {part.get_shape()} of {part.get_dtype()}"
            )
        return BitGrid(
            n, height, width, step, channels, file.get_tensor("bits"), header.get("text", header.get("prompt", ""))
        )  # older files: `prompt`
