"""What the scenes model is: configurations, prompt tokenizer, and how it lies on disk."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from bitdance_core.checkpoints.files import read_json
from bitdance_core.model.prompt import PromptTokenizer
from bitdance_core.model.text_config import AutoencoderConfig, BackboneConfig, BitDanceConfig, Defaults, HeadConfig
from bitdance_core.model.vocabulary import WORD, Vocabulary
from builtin.scenes.batches import sizes_of
from builtin.scenes.captions import NUMBERS, OPENINGS, PLACE_WORDS, RELATIONS, SIZES
from builtin.scenes.compose import random_scene
from builtin.scenes.grounds import COLOURS
from builtin.scenes.things import THINGS

NAME = "scenes"
# what bitdance.json says of prompts with words that no caption has
DRAWS = (
    f"{len(THINGS)} things in their own colours, such as foxes, trees and rockets: one to four, large or small, or "
    "two beside, above or below each other, on a colour, a gradient, grass, at night or by the sea, such as "
    '"a fox next to a mushroom on grass"'
)
PATCH_SIDE = 4
TOKENS_PER_PATCH = PATCH_SIDE**2
RES_TOKENS = 32
SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    *(f"<|res_{k}|>" for k in range(1, RES_TOKENS + 1)),
    *(f"<|query_{i}|>" for i in range(1, TOKENS_PER_PATCH)),
]


def backbone_config(vocab_size: int, width: int = 256, layers: int = 6) -> BackboneConfig:
    return BackboneConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_layers=layers,
        num_heads=width // 64,
        num_kv_heads=max(1, width // 128),
        head_dim=64,
        intermediate_size=width * 11 // 4 // 64 * 64,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
    )


def head_config(bits: int, cond_width: int, width: int = 384, depth: int = 4) -> HeadConfig:
    return HeadConfig(
        bits=bits,
        cond_width=cond_width,
        width=width,
        depth=depth,
        num_modulations=1,
        swiglu=True,
        time_shift=1.0,
        tokens_per_patch=TOKENS_PER_PATCH,
    )


def model_config(
    prompts: PromptTokenizer, autoencoder: AutoencoderConfig, side: int, width: int, layers: int, head: int, depth: int
) -> BitDanceConfig:
    backbone = backbone_config(prompts.max_id + 1, width, layers)
    defaults = Defaults(default_size=(side, side), steps=25, guidance=3.0, trained_sizes=sizes_of(side))
    return BitDanceConfig(
        NAME, backbone, head_config(autoencoder.bits, width, head, depth), autoencoder, TOKENS_PER_PATCH, defaults
    )


def vocabulary() -> Vocabulary:
    """The words of captions, and what stands behind a colour there: it is the ground's, never a thing's."""
    tables = [*NUMBERS, *COLOURS, *OPENINGS, "background", "gradient", "from", "to", "on", "with", "against", "of"]
    tables += [word for table in (SIZES, RELATIONS, PLACE_WORDS) for group in table.values() for word in group]
    names = [word for thing in THINGS for pair in thing.words for word in pair]
    words, things = ({w.casefold() for text in texts for w in WORD.findall(text)} for texts in (tables + names, names))
    followed_by = dict.fromkeys(COLOURS, frozenset(("background", "gradient", "to")))
    followed_by["blue"] |= {"sky"}
    followed_by["orange"] = frozenset(words - things)  # which is a fruit, too
    return Vocabulary(frozenset(words), DRAWS, followed_by)


def train_prompt_tokenizer() -> Tokenizer:
    """Byte-level BPE that spells anything and has one token for each word of a caption, and for each line of the chat
    template: the fewer tokens before the picture, the cheaper each step.
    """
    tokenizer = Tokenizer(models.BPE())
    # "A Fox" is a fox; captions have one word with a capital
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace("christmas", "Christmas")]
    )
    pieces = pre_tokenizers.Split(Regex(r"\w+\n| ?[\w'-]+|\n|[^\w\s]|\s"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    rng = np.random.default_rng(0)
    words = [word for thing in THINGS for pair in thing.words for word in pair]
    words += [*NUMBERS, *COLOURS, "background", "gradient", "from", "to", "a", "an", "the", *OPENINGS]
    for table in (SIZES, RELATIONS, PLACE_WORDS):
        words += [word for group in table.values() for word in group]
    corpus = [f"user\n{word}" for word in words] + [f"a {word}" for word in words] + ["assistant\n"]
    corpus += [f"user\n{random_scene(rng).caption}" for _ in range(5000)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # so large that every word of the corpus becomes one token; the merges then end by themselves
    trainer = trainers.BpeTrainer(vocab_size=4000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus * 2, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def prompt_tokenizer(path: Path) -> PromptTokenizer:
    """The one at `path`, trained if there is none."""
    if not path.exists():
        train_prompt_tokenizer().save(str(path))
    return PromptTokenizer(read_json(path), str(path))


def write_folder(
    folder: Path, config: BitDanceConfig, tokenizer_json: Path, model: dict[str, Tensor], autoencoder: dict[str, Tensor]
) -> None:
    """Write weights as fp16, and what describes them, in the official folder layout (SPEC.md 2.1)."""
    folder.mkdir(parents=True, exist_ok=True)

    def part(prefix: str, new_prefix: str) -> dict[str, Tensor]:
        n = len(prefix)
        return {new_prefix + k[n:]: v.half().contiguous() for k, v in model.items() if k.startswith(prefix)}

    save_file(part("backbone.", "model."), folder / "model.safetensors")
    save_file(part("head.", "net."), folder / "vision_head.safetensors")
    save_file(part("projector.", ""), folder / "projector.safetensors")
    save_file({k: v.half().contiguous() for k, v in autoencoder.items()}, folder / "ae.safetensors")
    configs = {
        "config.json": config.backbone.to_dict() | {"dtype": "float16"},
        "vision_head_config.json": config.head.to_dict(),
        "ae_config.json": config.autoencoder.to_dict(),
        "bitdance.json": {"name": NAME, **dataclasses.asdict(config.defaults), **vocabulary().to_dict()},
    }
    for name, values in configs.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")
    (folder / "tokenizer.json").write_text(tokenizer_json.read_text())
    total = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{folder}: {total / 1e6:.2f} MB")
