"""Look up the 1000 classes of ImageNet-1k by name: line i of class_names.txt, counted from 0, is class i.

The names are those of torchvision (BSD-3-Clause), `ResNet50_Weights.DEFAULT.meta["categories"]`; except
that Cardigan (the dog) and cardigan (the garment) are marked as such here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from ..errors import BitDanceError, whole_number
from .class_config import ImageNetConfig

IMAGENET_CLASSES = 1000  # a model of as many classes has ImageNet's names for them
NUMBER = re.compile(r"[+-]?\d{1,9}")
LABEL = re.compile(r"(\d{1,9}): *(.+)")  # as in `class_labels`


def class_names() -> list[str]:
    """Return the names of the classes; name i belongs to class i."""
    return list(_names())


def class_labels() -> list[str]:
    """Return number and name of every class in order, such as "207: golden retriever"."""
    return [f"{number}: {name}" for number, name in enumerate(_names())]


def class_index(name_or_number: str | int) -> int:
    """Return the number of a class, given its name (in any case), number or label.

    Raises BitDanceError, which lists close names, for an unknown class.
    """
    if not isinstance(name_or_number, str):
        return whole_number("a class", name_or_number, least=0, most=len(_names()) - 1)
    text = " ".join(name_or_number.split())
    if NUMBER.fullmatch(text):
        return class_index(int(text))
    label = LABEL.fullmatch(text)
    name = label[2] if label else text
    index = _numbers().get(name.casefold())
    if index is None:
        close = ", ".join(_close(name.casefold()))
        hint = f"close names: {close}" if close else "give an ImageNet class by name, or by number from 0 to 999"
        raise BitDanceError(f"there is no class '{name}'; {hint}")
    if label and int(label[1]) != index:
        raise BitDanceError(f"'{text}' names two classes: {name} is number {index}, not {label[1]}")
    return index


def parse_classes(text: str) -> list[int]:
    """Parse classes, by name, number or label, separated by commas, semicolons or newlines; return their numbers."""
    return [class_index(entry) for entry in re.split(r"[,;\n]", text) if entry.strip()]


def class_numbers(labels: Sequence[int | str], config: ImageNetConfig) -> list[int]:
    """Look up a model's classes by number or by name. Raises BitDanceError with the valid ones."""
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


def _close(name: str) -> list[str]:
    """Return up to three class names that contain `name` or are spelled similarly."""
    holding = [known for known in _numbers() if name and name in known]
    alike = difflib.get_close_matches(name, _numbers(), n=3)
    return [_names()[_numbers()[known]] for known in dict.fromkeys([*holding, *alike])][:3]


@cache
def _names() -> tuple[str, ...]:
    path = Path(__file__).with_suffix(".txt")
    return tuple(path.read_text(encoding="utf-8").splitlines())


@cache
def _numbers() -> dict[str, int]:
    return {name.casefold(): number for number, name in enumerate(_names())}
