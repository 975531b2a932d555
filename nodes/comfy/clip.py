"""Make a tokenizer-only CLIP, and read its CONDITIONING: token ids, which the MODEL's language model reads."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.sd
import torch
from torch import Tensor, nn

from ...bitdance_core.editing import THRESHOLD, region_map, token_mask
from ...bitdance_core.errors import BitDanceError
from ...bitdance_core.patches import Grid
from ...bitdance_core.prompt import PromptTokenizer

IDS, TEXT = "bitdance_ids", "bitdance_text"  # keys in a CONDITIONING's options
# conditioning options that BitDance cannot follow, with the value that means "unused"
REFUSED = {"start_percent": 0.0, "end_percent": 1.0, "control": None, "hooks": None}
AREA_UNIT = 8  # pixels: the unit of ComfyUI's areas


class Tokenizer:
    """The tokenizer in the form that ComfyUI's CLIP calls. Weights such as "(red:1.3)" are read as plain words."""

    def __init__(self, prompts: PromptTokenizer | None) -> None:
        """`prompts` is None for an ImageNet model, which draws no prompts."""
        self.prompts = prompts

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs):
        if self.prompts is None:
            raise BitDanceError("this model draws ImageNet's classes, not prompts: use the ImageNet Class node")
        ids = self.prompts.conditional(text) if text.strip() else self.prompts.unconditional()
        return {"bitdance": [[(i, 1.0, 0) if return_word_ids else (i, 1.0) for i in ids]], "text": text}

    def state_dict(self):
        return {}

    def decode(self, token_ids, skip_special_tokens: bool = True):
        raise RuntimeError("BitDance's text encoder only tokenizes: there is no text to decode.")


class Encoder(nn.Module):
    """Return token ids instead of an embedding; stock nodes need one, so the ids as floats take its place."""

    disable_offload = True  # there are no weights for dynamic memory to manage

    def __init__(self, device=None, dtype=None, model_options=None) -> None:
        super().__init__()
        self.dtypes = {torch.float32}
        self.device = torch.device("cpu")

    def encode_token_weights(self, tokens):
        if "bitdance" not in tokens:
            raise BitDanceError("these tokens come from another tokenizer; tokenize with the CLIP that encodes them")
        ids = torch.tensor([[token[0] for token in tokens["bitdance"][0]]])
        return ids.unsqueeze(-1).float(), None, {IDS: ids, TEXT: tokens.get("text", "")}

    def load_sd(self, sd):
        return [], []

    def set_clip_options(self, options):
        pass

    def reset_clip_options(self):
        pass

    def generate(self, *args, **kwargs):
        raise RuntimeError("BitDance's text encoder only tokenizes: it cannot write text.")


def make_clip(prompts: PromptTokenizer | None) -> comfy.sd.CLIP:
    """Make the CLIP of a model; None is for an ImageNet model, whose CLIP refuses every prompt."""

    def tokenizer(embedding_directory=None, tokenizer_data=None):
        return Tokenizer(prompts)

    return comfy.sd.CLIP(SimpleNamespace(params={}, clip=Encoder, tokenizer=tokenizer))


def read_prompt(conditioning, prompts: PromptTokenizer, name: str) -> list[int]:
    """Read the token ids of a CONDITIONING of one prompt; None is the unconditional template.

    Raises BitDanceError, naming the input, for several prompts, areas, and prompts of another model.
    """
    if conditioning is None:
        return prompts.unconditional()
    if len(conditioning) != 1:
        raise BitDanceError(f"'{name}' combines {len(conditioning)} prompts; put them in one text")
    entry = conditioning[0]
    if has_region(entry[1]):
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
    whole = [entry for entry in conditioning if not has_region(entry[1])]
    regional = [entry for entry in conditioning if has_region(entry[1])]
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


def has_region(options: dict) -> bool:
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
        covered &= token_mask(mask, grid, 1)[0] >= THRESHOLD
    return covered


def check_options(options: dict, name: str) -> None:
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
    check_options(options, name)
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


def encode(clip, text: str):
    """Encode a prompt as CLIP Text Encode does. Raises BitDanceError if the CLIP is not BitDance's."""
    if clip is None or not isinstance(clip.tokenizer, Tokenizer):
        raise BitDanceError("this CLIP is not BitDance's; connect the CLIP of Load BitDance Model")
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))
