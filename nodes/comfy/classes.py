"""Make and read the CONDITIONING of ImageNet classes: the numbers of the classes to draw."""

from __future__ import annotations

import torch

from ...bitdance_core.errors import BitDanceError
from ...bitdance_core.imagenet_classes import class_index, class_labels, parse_classes
from ...bitdance_core.imagenet_config import ImageNetConfig
from .clip import TEXT, check_options, has_region
from .model import check_model

LABELS = "bitdance_labels"  # a key in a CONDITIONING's options


def names() -> list[str]:
    """List the options of the `class` widget: number and name of each class."""
    return class_labels()


def read_names(first: str | int, more: str) -> list[int]:
    """Read `class` and `more_classes` as class numbers. Raises BitDanceError for an unknown class."""
    return [class_index(first), *parse_classes(more)]


def condition(model, first: str | int, more: str):
    """Make two CONDITIONINGs for a MODEL: of the classes, and of no class.

    Raises BitDanceError if the model draws prompts or has fewer classes.
    """
    host = check_model(model)
    if host.prompts is not None:
        raise BitDanceError(
            f"{host.config.family} draws prompts, not classes: use BitDance Text Encode, or load an ImageNet model"
        )
    config: ImageNetConfig = host.config
    labels = read_names(first, more)
    if too_large := [label for label in labels if label >= config.num_classes]:
        raise BitDanceError(
            f"{config.family} has classes 0 to {config.num_classes - 1}, found {', '.join(map(str, too_large))}; "
            "choose others in class and more_classes"
        )
    all_names = class_labels()
    text = ", ".join(all_names[label].partition(": ")[2] for label in labels)
    return _conditioning(labels, text), _conditioning([config.null_class], "")


def _conditioning(labels: list[int], text: str):
    numbers = torch.tensor([labels])
    # stock nodes need an embedding; it is the number + 1, because ConditioningZeroOut makes it 0, which means no class
    return [[(numbers + 1).unsqueeze(-1).float(), {LABELS: numbers, TEXT: text}]]


def read_classes(config: ImageNetConfig, positive, negative, batch: int, guided: bool) -> tuple[list[list[int]], str]:
    """Read the class numbers of each guidance branch, one for each picture, and the names of the positive ones.

    Raises BitDanceError for prompts, for classes of another model, and for counts other than 1 and the batch's.
    """
    labels = _read(positive, config, "positive")
    if len(labels) > 1 and batch not in (1, len(labels)):
        raise BitDanceError(
            f"found {len(labels)} classes for a batch of {batch}; choose 1 or {batch} classes, or set batch_size to 1"
        )
    count = max(batch, len(labels))
    branches = [labels if len(labels) > 1 else labels * count]
    if guided:
        others = [config.null_class] if negative is None else _read(negative, config, "negative")
        if set(others) == {config.null_class}:
            others = others[:1]
        if len(others) not in (1, count):
            raise BitDanceError(
                f"'negative' has {len(others)} classes for a batch of {count}; choose 1 or {count}, or disconnect it"
            )
        branches.append(others if len(others) > 1 else others * count)
    return branches, positive[0][1].get(TEXT, "")


def _read(conditioning, config: ImageNetConfig, name: str) -> list[int]:
    if len(conditioning) != 1:
        raise BitDanceError(
            f"'{name}' combines {len(conditioning)} conditionings; list all classes in one ImageNet Class"
        )
    surrogate, options = conditioning[0]
    if LABELS not in options:
        raise BitDanceError(f"{config.family} draws classes, not prompts: connect ImageNet Class to '{name}'")
    check_options(options, name)
    if has_region(options):
        raise BitDanceError(
            f"'{name}' has an area, but a class is drawn on the whole picture; use the sampler's mask instead"
        )
    labels = options[LABELS][0].tolist()
    if not surrogate.any():  # ConditioningZeroOut
        return [config.null_class] * len(labels)
    if not torch.equal(surrogate.flatten().long().cpu(), options[LABELS].flatten() + 1):
        raise BitDanceError(
            f"'{name}' was averaged or concatenated, but classes cannot be mixed; list them in more_classes"
        )
    if max(labels) > config.num_classes:
        raise BitDanceError(f"'{name}' was made for another model; connect the MODEL that draws to ImageNet Class")
    return labels
