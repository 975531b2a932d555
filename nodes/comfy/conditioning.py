"""Read CONDITIONING: prompts as token ids, or ImageNet classes as numbers, with ComfyUI's areas and masks."""

from __future__ import annotations

import torch
from torch import Tensor

from ...bitdance_core.errors import BitDanceError
from ...bitdance_core.model.class_config import ImageNetConfig
from ...bitdance_core.model.grid import Grid
from ...bitdance_core.model.prompt import PromptTokenizer
from ...bitdance_core.sampling.editing import THRESHOLD, region_map, token_mask

# keys in a CONDITIONING's options: token ids, class numbers, the text of either, and what the CLIP left out
IDS, LABELS, TEXT, NOTES = "bitdance_ids", "bitdance_labels", "bitdance_text", "bitdance_notes"
# conditioning options that BitDance cannot follow, with the value that means "unused"
REFUSED = {"start_percent": 0.0, "end_percent": 1.0, "control": None, "hooks": None}
AREA_UNIT = 8  # pixels: the unit of ComfyUI's areas


def read_prompt(conditioning, prompts: PromptTokenizer, name: str) -> list[int]:
    """Read the token ids of a CONDITIONING of one prompt; None is the unconditional template.

    Raises BitDanceError, naming the input, for several prompts, areas, and prompts of another model.
    """
    if conditioning is None:
        return prompts.unconditional()
    if len(conditioning) != 1:
        raise BitDanceError(f"'{name}' combines {len(conditioning)} prompts; put them in one text")
    entry = conditioning[0]
    if _has_region(entry[1]):
        raise BitDanceError(f"'{name}' has an area, but only 'positive' can have areas; connect a prompt without one")
    return _read_entry(entry, prompts, name)


def read_positive(
    conditioning, prompts: PromptTokenizer, grid: Grid, step: int
) -> tuple[list[list[int]], Tensor | None, str]:
    """Read prompts, the index of the prompt that each token follows [patches, P] (None if there is one), and the texts.

    Prompts for areas or masks (Conditioning Set Area, Set Mask) win over the one for the whole picture, later ones over
    earlier ones. Without a prompt for the whole picture, the rest follows the unconditional template. Raises
    BitDanceError for several prompts for the whole picture and for prompts of another model.
    """
    whole = [entry for entry in conditioning if not _has_region(entry[1])]
    regional = [entry for entry in conditioning if _has_region(entry[1])]
    if len(whole) > 1:
        raise BitDanceError(
            f"'positive' combines {len(whole)} prompts for the whole picture; put them in one text, or give them areas"
        )
    text = " | ".join(entry[1].get(TEXT, "") for entry in (*whole, *regional))
    branches = [_read_entry(whole[0], prompts, "positive") if whole else prompts.unconditional()]
    if not regional:
        return branches, None, text
    branches += [_read_entry(entry, prompts, "positive") for entry in regional]
    return branches, region_map([_region(entry[1], grid, step) for entry in regional], grid), text


def _has_region(options: dict) -> bool:
    return options.get("area") is not None or options.get("mask") is not None


def _region(options: dict, grid: Grid, step: int) -> Tensor:
    """Mark the tokens, bool [h, w], in a CONDITIONING's area and mask; `step` is the pixels of a token's side."""
    strengths = {options.get(name, 1.0) for name in ("strength", "mask_strength")}
    if other := strengths - {1.0}:
        raise BitDanceError(
            f"the area or mask of a prompt must have strength 1, found {other.pop():g}: each token follows one prompt"
        )
    covered = torch.ones(grid.height, grid.width, dtype=torch.bool)
    if (area := options.get("area")) is not None:
        if area[0] == "percentage":
            h, w, y, x = (part * side for part, side in zip(area[1:], (grid.height, grid.width) * 2))
        else:
            h, w, y, x = (part * AREA_UNIT / step for part in area)
        rows, columns = torch.arange(grid.height) + 0.5, torch.arange(grid.width) + 0.5  # centres of tokens
        covered &= ((rows >= y) & (rows < y + h))[:, None] & (columns >= x) & (columns < x + w)
    if (mask := options.get("mask")) is not None:
        if mask.ndim == 3 and len(mask) > 1:
            raise BitDanceError(f"the mask of a prompt must be 1 mask for all pictures, found {len(mask)}")
        covered &= token_mask(mask, grid, 1, step)[0] >= THRESHOLD
    return covered


def _check_options(options: dict, name: str) -> None:
    """Raise BitDanceError if a CONDITIONING has options of stock nodes that BitDance cannot follow."""
    used = [key for key, unused in REFUSED.items() if options.get(key, unused) != unused]
    if used:
        raise BitDanceError(
            f"'{name}' has {used[0].replace('_', ' ')} set, which BitDance cannot follow; remove the node that sets it"
        )


def _read_entry(entry, prompts: PromptTokenizer, name: str) -> list[int]:
    """Read the token ids of one entry of a CONDITIONING; one that ConditioningZeroOut zeroed is unconditional.

    Raises BitDanceError, naming the input, for an entry of another model's CLIP, and for one that was changed since.
    """
    surrogate, options = entry
    if IDS not in options:
        raise BitDanceError(
            f"'{name}' was not encoded for BitDance; encode it with the CLIP of Load BitDance Model, "
            "by BitDance Text Encode or CLIP Text Encode"
        )
    _check_options(options, name)
    if not surrogate.any():
        return prompts.unconditional()
    if not torch.equal(surrogate.flatten().float().cpu(), options[IDS].flatten().float()):
        raise BitDanceError(
            f"'{name}' was averaged or concatenated, but token ids cannot be mixed; put the words in one prompt"
        )
    ids = options[IDS][0].tolist()
    if not prompts.is_own(ids):
        raise BitDanceError(
            f"'{name}' was encoded by another model's CLIP; use the CLIP that was loaded with the MODEL"
        )
    return ids


def read_classes(config: ImageNetConfig, positive, negative, batch: int, guided: bool) -> tuple[list[list[int]], str]:
    """Read the class numbers of each guidance branch, one for each picture, and the names of the positive ones.

    Raises BitDanceError for prompts, for classes of another model, and for counts other than 1 and the batch's.
    """
    labels = _read_labels(positive, config, "positive")
    if len(labels) > 1 and batch not in (1, len(labels)):
        raise BitDanceError(
            f"found {len(labels)} classes for a batch of {batch}; choose 1 or {batch} classes, or set batch_size to 1"
        )
    count = max(batch, len(labels))
    branches = [labels if len(labels) > 1 else labels * count]
    if guided:
        others = [config.null_class] if negative is None else _read_labels(negative, config, "negative")
        if set(others) == {config.null_class}:
            others = others[:1]
        if len(others) not in (1, count):
            raise BitDanceError(
                f"'negative' has {len(others)} classes for a batch of {count}; choose 1 or {count}, or disconnect it"
            )
        branches.append(others if len(others) > 1 else others * count)
    return branches, positive[0][1].get(TEXT, "")


def _read_labels(conditioning, config: ImageNetConfig, name: str) -> list[int]:
    if len(conditioning) != 1:
        raise BitDanceError(
            f"'{name}' combines {len(conditioning)} conditionings; list all classes in one ImageNet Class"
        )
    surrogate, options = conditioning[0]
    if LABELS not in options:
        raise BitDanceError(f"{config.family} draws classes, not prompts: connect ImageNet Class to '{name}'")
    _check_options(options, name)
    if _has_region(options):
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
