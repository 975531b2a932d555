"""Make a tokenizer-only CLIP: its CONDITIONING carries token ids, which the MODEL's language model reads."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.memory_management
import comfy.model_patcher
import comfy.sd
import torch
from torch import nn

from ...bitdance_core.errors import BitDanceError
from ...bitdance_core.model.prompt import PromptTokenizer, published_tokenizer
from ...bitdance_core.model.vocabulary import unseen_note
from .conditioning import IDS, NOTES, TEXT
from .outputs import keep_note
from .saving import TokenizerOnly

# what nodes give to a tokenizer beside the text -> its words in a warning
BESIDE = {
    "image": "a picture beside the prompt (connect its bits to the sampler)", "video": "a video beside the prompt",
    "audio": "a sound beside the prompt", "system_prompt": "a system prompt (put it into the text)",
    "minimax_ref_items": "pictures or sounds beside the prompt",
}  # fmt: skip
BESIDE |= {f"{name}s": BESIDE[name] for name in ("image", "video", "audio")}


class Tokens(dict):
    """The tokens of a prompt by encoder; BitDance has one. Raises BitDanceError if a node asks for another's."""

    def __missing__(self, name: str):
        raise BitDanceError(
            f"this node needs a text encoder '{name}' of another model, but BitDance reads one text; use BitDance Text "
            "Encode or CLIP Text Encode instead"
        )


class Tokenizer:
    """The tokenizer in the form that ComfyUI's CLIP calls. Weights such as "(red:1.3)" are read as plain words."""

    def __init__(self, prompts: PromptTokenizer | None) -> None:
        """`prompts` is None for an ImageNet model, which draws no prompts."""
        self.prompts = prompts

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs):
        if self.prompts is None:
            raise BitDanceError("this model draws ImageNet's classes, not prompts: use the ImageNet Class node")
        ids = self.prompts.conditional(text) if text.strip() else self.prompts.unconditional()
        self._say_unseen(text)
        given = [name for name, value in kwargs.items() if value is not None and not _is_empty(value)]
        notes = list(dict.fromkeys(BESIDE[name] for name in given if name in BESIDE))
        tokens = [(i, 1.0, 0) if return_word_ids else (i, 1.0) for i in ids]
        return Tokens({"bitdance": [tokens], "text": text} | ({"notes": notes} if notes else {}))

    def _say_unseen(self, text: str) -> None:
        """Show on the running node, ours or a stock one, which words a model of few words was not trained on."""
        if self.prompts.vocabulary is None:
            return
        note = unseen_note(self.prompts.vocabulary, [text])
        if note:
            note += "; a LoRA may have taught it more"
            logging.info(f"[BitDance] {note}")
        keep_note(note or "")

    def state_dict(self):
        return {}

    def decode(self, token_ids, skip_special_tokens: bool = True):
        raise RuntimeError("BitDance's text encoder only tokenizes: there is no text to decode.")


def _is_empty(value: Any) -> bool:
    return isinstance(value, list | tuple | str | dict) and not value


class Encoder(nn.Module):
    """Return token ids instead of an embedding; stock nodes need one, so the ids as floats take its place."""

    disable_offload = True  # there are no weights for dynamic memory to manage

    def __init__(self, device=None, dtype=None, model_options=None) -> None:
        super().__init__()
        self.dtypes = {torch.float32}
        self.device = torch.device("cpu")
        self.notes: list[str] = []

    def encode_token_weights(self, tokens):
        if "bitdance" not in tokens:
            raise BitDanceError("these tokens come from another tokenizer; tokenize with the CLIP that encodes them")
        ids = torch.tensor([[token[0] for token in tokens["bitdance"][0]]])
        notes = [*tokens.get("notes", ()), *self.notes]
        return (
            ids.unsqueeze(-1).float(),
            None,
            {IDS: ids, TEXT: tokens.get("text", ""), **({NOTES: notes} if notes else {})},
        )

    def load_sd(self, sd):
        return [], []

    def set_clip_options(self, options):
        if options.get("layer") is not None:
            self.notes = ["CLIP Set Last Layer (token ids have no layers)"]

    def reset_clip_options(self):
        self.notes = []

    def generate(self, *args, **kwargs):
        raise RuntimeError("BitDance's text encoder only tokenizes: it cannot write text.")


class TokenizerClip(comfy.sd.CLIP):
    """ComfyUI's CLIP class around our tokenizer."""

    def clone(self, *args, **kwargs) -> TokenizerClip:
        copy = super().clone(*args, **kwargs)
        copy.__class__ = TokenizerClip  # ComfyUI's clone is of its own class
        return copy

    def is_dynamic(self) -> bool:
        # ComfyUI asks whether its cache frees memory by dropping the nodes whose outputs these are: a tokenizer has
        # none, and must not take the models beside it along
        return comfy.memory_management.aimdo_enabled

    def state_dict_for_saving(self) -> TokenizerOnly:
        return TokenizerOnly()


def make_clip(prompts: PromptTokenizer | None) -> comfy.sd.CLIP:
    """Make the CLIP of a model; None is for an ImageNet model, whose CLIP refuses every prompt."""

    def tokenizer(embedding_directory=None, tokenizer_data=None):
        return Tokenizer(prompts)

    clip = TokenizerClip(SimpleNamespace(params={}, clip=Encoder, tokenizer=tokenizer))
    clip.patcher.cached_patcher_init = (_load_patcher, (prompts,))
    return clip


def _load_patcher(prompts: PromptTokenizer | None, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """Make the patcher again for ComfyUI: Select CLIP Device moves a tokenizer too."""
    return make_clip(prompts).patcher


def check_clip(clip) -> comfy.sd.CLIP:
    """Return a CLIP that is BitDance's. Raises BitDanceError for any other."""
    if not isinstance(getattr(clip, "tokenizer", None), Tokenizer):
        raise BitDanceError("this CLIP is not BitDance's; connect the CLIP of Load BitDance Model")
    return clip


def prompts_of_comfyui(rows: int) -> tuple[dict[str, Any], str] | None:
    """Make a published model's prompt tokenizer from ComfyUI's Qwen vocabulary, for files without a tokenizer.json.

    `rows` of the embedding table identify the model. Returns the tokenizer and its origin, or None.
    """
    folder = Path(comfy.sd.__file__).parent / "text_encoders" / "qwen25_tokenizer"
    files = folder / "vocab.json", folder / "merges.txt"
    if not all(file.is_file() for file in files):
        return None
    data = published_tokenizer(*files, rows)
    return data and (data, f"ComfyUI's {folder.name}")
