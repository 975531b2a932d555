"""Find the pictures of a data set and what each shows: captions, or classes. Reads no weights.

Three forms: pictures with .txt captions beside them; metadata.jsonl of file_name and text, as imagefolder has it; and,
for class-conditional models, one folder per class.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ImageOps

from ..checkpoints.files import read_text
from ..errors import BitDanceError, MissingFileError, shorten
from ..model.class_config import ImageNetConfig
from ..model.class_names import class_numbers
from ..model.fields import Size
from ..model.grid import Grid
from ..model.prompt import PromptTokenizer
from ..model.text_config import BitDanceConfig
from ..sampling.sizes import make_grid
from ..tokenizer import opened
from .loss import Condition

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
METADATA = "metadata.jsonl"
CAPTION_FIELDS = ("text", "caption", "prompt")
CLASS_FIELDS = ("label", "class")
LISTED = 5  # pictures left out that a report names


@dataclass(frozen=True)
class Example:
    """A usable picture: its file, its caption or class as a user wrote it, what that is to the model, and its size."""

    path: Path
    words: str
    condition: Condition
    size: Size  # of its bucket, in pixels


@dataclass(frozen=True)
class DataSet:
    """Usable pictures, and those left out, each with the reason."""

    folder: Path
    examples: list[Example]
    left_out: list[tuple[Path, str]]

    def buckets(self) -> dict[Size, list[Example]]:
        """Group the pictures by size; the largest bucket comes first."""
        counts = Counter(example.size for example in self.examples)
        return {size: [e for e in self.examples if e.size == size] for size, _ in counts.most_common()}

    def lines_of_left_out(self) -> list[str]:
        """Name the pictures left out, at most LISTED of them."""
        lines = [f"left out: {path} ({reason})" for path, reason in self.left_out[:LISTED]]
        rest = len(self.left_out) - LISTED
        return [*lines, f"left out: {rest} more"] if rest > 0 else lines


class Subjects:
    """What pictures show, as a model takes it: token ids with their image opening, or classes."""

    def __init__(self, config: BitDanceConfig | ImageNetConfig, prompts: PromptTokenizer | None) -> None:
        self.config, self.prompts = config, prompts

    @property
    def is_of_classes(self) -> bool:
        return isinstance(self.config, ImageNetConfig)

    @property
    def words(self) -> str:
        """What comes with each picture: a caption or a class."""
        return "class" if self.is_of_classes else "caption"

    def bucket(self, size: Size) -> Size:
        """Choose the size that a picture of (height, width) comes to."""
        return bucket_of(size, self.sizes())

    def sizes(self) -> tuple[Size, ...]:
        """Return the sizes of the buckets, height x width: those that the model was trained at, or its default."""
        return self.config.defaults.trained_sizes or (self.config.defaults.default_size,)

    def grid(self, size: Size) -> Grid:
        if self.is_of_classes:
            return Grid(self.config.grid_side, self.config.grid_side, self.config.patch_size)
        return make_grid(self.config, self.prompts, *size)

    def condition(self, words: str, size: Size) -> Condition:
        """Return what a caption or a class is to the model. Raises BitDanceError for one that it does not have."""
        if self.is_of_classes:
            return class_numbers([int(words) if words.isdecimal() else words], self.config)[0]
        return self.prompts.conditional(words) + self._opening(size)

    def unconditional(self, size: Size) -> Condition:
        return self.config.null_class if self.is_of_classes else self.prompts.unconditional() + self._opening(size)

    def _opening(self, size: Size) -> list[int]:
        grid = self.grid(size)
        return self.prompts.opening(grid.height, grid.width, grid.tokens_per_patch)


class Pictures:
    """In place of `Subjects` for a tokenizer, to which a picture needs no words; all come to one size, a square."""

    words = None

    def __init__(self, side: int) -> None:
        self.side = side

    def bucket(self, size: Size) -> Size:
        """Return the size to cut to. Raises BitDanceError for a smaller picture: enlarging would teach blur."""
        if min(size) < self.side:
            raise BitDanceError(f"is {size[1]}x{size[0]} (width x height), smaller than --size {self.side}")
        return self.side, self.side

    def condition(self, words: str, size: Size) -> Condition:
        return 0


def read_data(
    folder: Path, subjects: Subjects | Pictures, is_encoded: Callable[[Path, Size], bool] = lambda *_: False
) -> DataSet:
    """Find and check all pictures of a folder; those that `is_encoded` knows are not decoded again.

    Raises BitDanceError if none can be used, and for a metadata.jsonl that is damaged.
    """
    if not folder.is_dir():
        raise MissingFileError(f"DATA must be a folder of pictures, but there is none at {folder}")
    examples, left_out = [], []
    for path, words in _find(folder, subjects.words):
        try:
            if isinstance(words, BitDanceError):
                raise words
            size = subjects.bucket(_size_of(path))
            condition = subjects.condition(words, size)
            if not is_encoded(path, size):
                _check_readable(path)
            examples.append(Example(path, words, condition, size))
        except BitDanceError as error:
            left_out.append((path, str(error).removeprefix(f"{path} ")))
    if not examples:
        raise BitDanceError(_nothing_in(folder, subjects.words, left_out))
    return DataSet(folder, examples, left_out)


def bucket_of(size: Size, sizes: Sequence[Size]) -> Size:
    """Choose the size whose shape is nearest; of several that near, the largest that the picture fills, or else the
    smallest. Sizes are (height, width).
    """

    def distance(other: Size) -> float:
        ratio = size[0] * other[1] / (size[1] * other[0])
        return max(ratio, 1 / ratio)

    nearest = min(map(distance, sizes))
    near = sorted((s for s in sizes if distance(s) <= 1.02 * nearest), key=lambda s: s[0] * s[1])
    filled = [s for s in near if s[0] * s[1] <= size[0] * size[1]]
    return filled[-1] if filled else near[0]


def _find(folder: Path, wanted: str | None) -> Iterator[tuple[Path, str | BitDanceError]]:
    """Yield each picture with its caption or class, or with the reason why it has none; in the order of names."""
    if wanted is None:
        yield from ((path, "") for path in sorted(_pictures(folder)))
        return
    if (folder / METADATA).is_file():
        yield from _from_metadata(folder / METADATA, CLASS_FIELDS if wanted == "class" else CAPTION_FIELDS)
        return
    for path in sorted(_pictures(folder)):
        if wanted == "class":
            parts = path.relative_to(folder).parts
            yield path, parts[0] if len(parts) > 1 else BitDanceError("in no folder named by its class")
            continue
        caption = path.with_suffix(".txt")
        try:
            yield path, read_text(caption).strip() or BitDanceError(f"{caption.name} is empty")
        except MissingFileError:
            yield path, BitDanceError(f"no caption; put it into {caption.name} beside the picture")
        except BitDanceError as error:
            yield path, error


def _from_metadata(file: Path, fields: Sequence[str]) -> Iterator[tuple[Path, str | BitDanceError]]:
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
            name = row["file_name"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise BitDanceError(
                f'{file}, line {number} must be a JSON object such as {{"file_name": "a.png", "{fields[0]}": …}}, '
                f"found {shorten(line)}"
            ) from None
        words = next((row[field] for field in fields if row.get(field) is not None), None)
        if isinstance(words, str | int) and not isinstance(words, bool) and str(words).strip():
            yield file.parent / str(name), str(words).strip()
        else:
            yield file.parent / str(name), BitDanceError(f"line {number} of {METADATA} has no {fields[0]}")


def _pictures(folder: Path) -> Iterator[Path]:
    """Yield the files that are pictures by name, in subfolders too, without hidden files and folders."""
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and name.lower().endswith(PICTURES):
                yield Path(root, name)


def _size_of(path: Path) -> Size:
    """Return (height, width) of a picture file as it is shown. Raises BitDanceError for a file that is none."""
    with opened(path) as image:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def _check_readable(path: Path) -> None:
    """Raise BitDanceError for a picture that cannot be decoded to its end."""
    with opened(path) as image:
        ImageOps.exif_transpose(image).load()


def _nothing_in(folder: Path, wanted: str | None, left_out: Sequence[tuple[Path, str]]) -> str:
    if left_out:
        path, reason = left_out[0]
        return f"none of the {len(left_out)} pictures in {folder} can be used; {path.name}: {reason}"
    how = {
        "class": ", in folders named by their classes", "caption": ", with captions in .txt files beside them", None: ""
    }[wanted]  # fmt: skip
    return f"{folder} has no pictures ({', '.join(PICTURES)}); put them there{how}, or give another DATA"
