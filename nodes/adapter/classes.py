"""CONDITIONING of ImageNet classes: which ones to draw, by number."""

from __future__ import annotations

import torch

from ...bitdance_core.errors import BitDanceError
from ...bitdance_core.model.class_config import ImageNetConfig
from ...bitdance_core.model.class_names import class_index, class_labels, parse_classes
from .model import check_model
from .text import TEXT, check_options, has_region

LABELS = "bitdance_labels"  # a key in a CONDITIONING's options


def names() -> list[str]:
    return class_labels()


def read_names(first: str | int, more: str) -> list[int]:
    """Numbers of the classes that a user picked and wrote. Raises BitDanceError for one that there is not."""
    return [class_index(first), *parse_classes(more)]


def condition(model, first: str | int, more: str):
    """The classes, and no class, as CONDITIONINGs for this MODEL."""
    host = check_model(model)
    if host.prompts is not None:
        raise BitDanceError(
            f"{host.config.family} draws prompts, not classes: encode one with BitDance Text Encode, or load an "
            "ImageNet model"
        )
    config: ImageNetConfig = host.config
    labels = read_names(first, more)
    if too_large := [label for label in labels if label >= config.num_classes]:
        raise BitDanceError(
            f"{config.family} has classes 0 to {config.num_classes - 1}, found {', '.join(map(str, too_large))}"
        )
    all_names = class_labels()
    text = ", ".join(all_names[label].partition(": ")[2] for label in labels)
    return _conditioning(labels, text), _conditioning([config.null_class], "")


def _conditioning(labels: list[int], text: str):
    numbers = torch.tensor([labels])
    # the "embedding" only shows stock nodes that there is one; 0 is ConditioningZeroOut's word for no class
    return [[(numbers + 1).unsqueeze(-1).float(), {LABELS: numbers, TEXT: text}]]


def read_classes(config: ImageNetConfig, positive, negative, batch: int, guided: bool) -> tuple[list[list[int]], str]:
    """Labels of each branch, one for each picture, and their names. Raises BitDanceError for what is no class."""
    labels = _read(positive, config, "positive")
    if len(labels) > 1 and batch not in (1, len(labels)):
        raise BitDanceError(f"{len(labels)} classes and a batch of {batch}: give one class, or one for each picture")
    count = max(batch, len(labels))
    branches = [labels if len(labels) > 1 else labels * count]
    if guided:
        others = [config.null_class] if negative is None else _read(negative, config, "negative")
        if set(others) == {config.null_class}:
            others = others[:1]
        if len(others) not in (1, count):
            raise BitDanceError(
                f"'negative' has {len(others)} classes for {count} picture(s); give one, or none at all"
            )
        branches.append(others if len(others) > 1 else others * count)
    return branches, positive[0][1].get(TEXT, "")


def _read(conditioning, config: ImageNetConfig, name: str) -> list[int]:
    if len(conditioning) != 1:
        raise BitDanceError(
            f"'{name}' combines {len(conditioning)} conditionings; put all classes in one ImageNet Class"
        )
    surrogate, options = conditioning[0]
    if LABELS not in options:
        raise BitDanceError(f"{config.family} draws classes, not prompts: connect ImageNet Class to '{name}'")
    check_options(options, name)
    if has_region(options):
        raise BitDanceError(
            f"'{name}' is for an area, but a class is drawn all over; redraw a part with a mask instead"
        )
    labels = options[LABELS][0].tolist()
    if not surrogate.any():  # ConditioningZeroOut
        return [config.null_class] * len(labels)
    if not torch.equal(surrogate.flatten().long().cpu(), options[LABELS].flatten() + 1):
        raise BitDanceError(
            f"'{name}' was averaged or concatenated, which classes cannot be; list them in ImageNet Class"
        )
    if max(labels) > config.num_classes:
        raise BitDanceError(f"'{name}' was made for another model; connect the MODEL that draws to ImageNet Class too")
    return labels
