"""Encode pictures to bits once, and keep the bits: a 1024x1024 picture is 16 KB.

A file of bits is named by a hash of the picture's content, the binary tokenizer and the way of fitting, so a changed
picture or another tokenizer is never mistaken for it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..checkpoints.files import write_whole
from ..errors import BitDanceError
from ..model.binarize import pack, unpack
from ..model.fields import Size
from ..model.tokenizer_config import AutoencoderConfig
from ..tokenizer import BinaryTokenizer, opened, to_pixels, to_rgb
from .data import Example

FITS = {
    "crop": "cut the longer sides",
    "pad": "fill up with white",
}


@dataclass(frozen=True)
class BitsFolder:
    """The encoded pictures of one tokenizer (`stamp` identifies it and its dtype), fitted in one way."""

    folder: Path
    config: AutoencoderConfig
    stamp: str
    fit: str = "crop"

    def has(self, picture: Path, size: Size, flipped: bool = False) -> bool:
        """Whether a picture's bits are stored. False for a picture that cannot be read."""
        try:
            return self._bits(self.path_of(picture, size, flipped), size) is not None
        except OSError:
            return False

    def load(self, picture: Path, size: Size, flipped: bool = False) -> Tensor:
        """Return stored bits, bool [C, h, w]. Raises BitDanceError if picture or bits have been removed since."""
        try:
            bits = self._bits(self.path_of(picture, size, flipped), size)
        except OSError as error:
            raise BitDanceError(f"{picture} cannot be read any more ({error.strerror})") from error
        if bits is None:
            raise BitDanceError(f"{picture} or its bits in {self.folder} changed during the run; start it again")
        return bits

    def store(self, picture: Path, size: Size, flipped: bool, tokenizer: BinaryTokenizer) -> None:
        """Encode a picture. Raises BitDanceError for one that cannot be read, and if the bits cannot be written."""
        with opened(picture) as image:
            try:
                fitted = fit(to_rgb(image), size, self.fit)
            except (OSError, ValueError, SyntaxError) as error:
                raise BitDanceError(f"{picture} is not a readable picture ({error})") from error
        bits = tokenizer.encode(to_pixels(ImageOps.mirror(fitted) if flipped else fitted)) > 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BitDanceError(f"{self.folder} cannot be written ({error}); give another --cache") from error
        write_whole(self.path_of(picture, size, flipped), pack(bits)[0].numpy().tobytes())

    def path_of(self, picture: Path, size: Size, flipped: bool) -> Path:
        """Return the file of a picture's bits. Raises OSError for a picture that cannot be read."""
        made = json.dumps([self.stamp, size, self.fit, flipped])
        return self.folder / f"{hashlib.sha256(picture.read_bytes() + made.encode()).hexdigest()[:40]}.bits"

    def _bits(self, path: Path, size: Size) -> Tensor | None:
        shape = self.config.bits, size[0] // self.config.downscale, size[1] // self.config.downscale
        if not path.is_file() or path.stat().st_size != math.ceil(math.prod(shape) / 8):
            return None
        return unpack(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)[None], shape)[0]


def fit(image: Image.Image, size: Size, how: str) -> Image.Image:
    """Bring a picture to `size` (height, width): scale it, then cut its longer sides or fill up with white."""
    target, method = (size[1], size[0]), Image.Resampling.LANCZOS
    if how == "pad":
        return ImageOps.pad(image, target, method, color="white")
    return ImageOps.fit(image, target, method)


def encode_all(
    bits: BitsFolder,
    examples: Sequence[Example],
    flips: bool,
    tokenizer: BinaryTokenizer,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Encode the pictures whose bits are not stored yet, mirrored too with `flips`.

    `progress(done, total)` is called after each. Raises BitDanceError for a picture that cannot be encoded.
    """
    both = (False, True) if flips else (False,)
    missing = [(e, flip) for e in examples for flip in both if not bits.has(e.path, e.size, flip)]
    for done, (example, flip) in enumerate(missing, start=1):
        bits.store(example.path, example.size, flip, tokenizer)
        progress(done, len(missing))
