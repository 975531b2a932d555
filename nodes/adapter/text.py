"""A tokenizer-only CLIP: CONDITIONING carries token ids, and the language model is the MODEL's (as for HiDream-O1)."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.sd
import torch
from torch import nn

from ...bitdance_core.errors import BitDanceError
from ...bitdance_core.prompt import PromptTokenizer

IDS, TEXT = "bitdance_ids", "bitdance_text"  # keys in a CONDITIONING's options
# options of stock nodes that ask for what one prompt for the whole picture cannot give
REGIONAL = ("area", "mask", "start_percent", "end_percent", "control", "hooks")


class Tokenizer:
    """What ComfyUI's CLIP asks of a tokenizer. Weights such as "(red:1.3)" stay the user's words."""

    def __init__(self, prompts: PromptTokenizer) -> None:
        self.prompts = prompts

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs):
        ids = self.prompts.conditional(text) if text.strip() else self.prompts.unconditional()
        return {"bitdance": [[(i, 1.0, 0) if return_word_ids else (i, 1.0) for i in ids]], "text": text}

    def state_dict(self):
        return {}

    def decode(self, token_ids, skip_special_tokens: bool = True):
        raise RuntimeError("BitDance's text encoder only tokenizes: there is no text to decode.")


class Encoder(nn.Module):
    """Passes token ids on; the "embedding" beside them only shows stock nodes that there is one."""

    disable_offload = True  # no weights: nothing for dynamic memory to manage

    def __init__(self, device=None, dtype=None, model_options=None) -> None:
        super().__init__()
        self.dtypes = {torch.float32}
        self.device = torch.device("cpu")

    def encode_token_weights(self, tokens):
        if "bitdance" not in tokens:
            raise BitDanceError("these tokens are not of BitDance's tokenizer: tokenize with the CLIP you encode with")
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


def make_clip(prompts: PromptTokenizer) -> comfy.sd.CLIP:
    def tokenizer(embedding_directory=None, tokenizer_data=None):
        return Tokenizer(prompts)

    return comfy.sd.CLIP(SimpleNamespace(params={}, clip=Encoder, tokenizer=tokenizer))


def read_conditioning(conditioning, prompts: PromptTokenizer, name: str) -> tuple[list[int], str]:
    """Token ids and text of a CONDITIONING (None: the unconditional template), or BitDanceError that says what to do.

    A conditioning that ConditioningZeroOut made zero counts as unconditional.
    """
    if conditioning is None:
        return prompts.unconditional(), ""
    if len(conditioning) != 1:
        raise BitDanceError(f"'{name}' combines {len(conditioning)} prompts; BitDance takes one: put them in one text")
    surrogate, options = conditioning[0]
    if IDS not in options:
        raise BitDanceError(
            f"'{name}' was not encoded for BitDance; encode it with the CLIP of Load BitDance Model, "
            "by BitDance Text Encode or CLIP Text Encode"
        )
    asked = [key for key in REGIONAL if options.get(key) is not None]
    if asked:
        raise BitDanceError(f"'{name}' has {asked[0].replace('_', ' ')} set, which BitDance cannot follow")
    ids = options[IDS][0].tolist()
    if not surrogate.any():
        return prompts.unconditional(), ""
    if not torch.equal(surrogate.flatten().float().cpu(), options[IDS].flatten().float()):
        raise BitDanceError(
            f"'{name}' was averaged or concatenated, which token ids cannot be; put the words in one prompt"
        )
    if not prompts.is_own(ids):
        raise BitDanceError(
            f"'{name}' was encoded by another model's CLIP; use the CLIP that was loaded with the MODEL"
        )
    return ids, options.get(TEXT, "")


def encode(clip, text: str):
    """A prompt's CONDITIONING, as CLIP Text Encode makes it."""
    if clip is None or not isinstance(clip.tokenizer, Tokenizer):
        raise BitDanceError("this CLIP is not BitDance's; connect the CLIP of Load BitDance Model")
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))
