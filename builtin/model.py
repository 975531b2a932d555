"""Define the built-in model: sizes, configurations, prompt tokenizer, and its files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from bitdance_core.checkpoints.files import read_json
from bitdance_core.model.prompt import PromptTokenizer
from bitdance_core.model.text_config import (
    AutoencoderConfig,
    BackboneConfig,
    BitDanceConfig,
    Defaults,
    HeadConfig,
)
from builtin.pictures import ALL_PICTURES

SIDE = 64
SIZES = ((SIDE, SIDE), (SIDE, 2 * SIDE))
TOKENS_PER_PATCH = 16
RES_TOKENS = 32
SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    *(f"<|res_{k}|>" for k in range(1, RES_TOKENS + 1)),
    *(f"<|query_{i}|>" for i in range(1, TOKENS_PER_PATCH)),
]
AUTOENCODER_CONFIG = AutoencoderConfig(
    channels=32, channel_multipliers=(1, 1, 2, 2), num_res_blocks=1, bits=32, gan_decoder=False
)
HEAD_CONFIG = HeadConfig(
    bits=AUTOENCODER_CONFIG.bits,
    cond_width=192,
    width=256,
    depth=4,
    num_modulations=1,
    swiglu=True,
    time_shift=1.0,
    tokens_per_patch=TOKENS_PER_PATCH,
)
# what bitdance.json says of prompts with other words
WORDS = sorted({word for picture in ALL_PICTURES for word in picture.prompt.split()})
DRAWS = 'circles, squares, triangles and stars in eight colours, such as "a large red star on a blue background"'
DEFAULTS = Defaults(default_size=SIZES[0], steps=25, guidance=3.0, trained_sizes=SIZES)


def backbone_config(vocab_size: int) -> BackboneConfig:
    return BackboneConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=448,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
    )


def model_config(prompts: PromptTokenizer) -> BitDanceConfig:
    backbone = backbone_config(prompts.max_id + 1)
    return BitDanceConfig("builtin", backbone, HEAD_CONFIG, AUTOENCODER_CONFIG, TOKENS_PER_PATCH, DEFAULTS)


def train_prompt_tokenizer() -> Tokenizer:
    """Train a byte-level BPE that can spell any text and has one token per word of the built-in model's prompts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()  # "A Red Star" is a red star
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    corpus = [f"user\n{p.prompt}" for p in ALL_PICTURES] + ["assistant\n"] * 100
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def write_folder(folder: Path, tokenizer_json: Path, model: dict[str, Tensor], autoencoder: dict[str, Tensor]) -> None:
    """Write weights as fp16, and what describes them, in the official folder layout (docs/facts.md#official-folder)."""
    backbone, head = model_config(PromptTokenizer(read_json(tokenizer_json), str(tokenizer_json))).backbone, HEAD_CONFIG
    folder.mkdir(parents=True, exist_ok=True)

    def part(prefix: str, new_prefix: str) -> dict[str, Tensor]:
        n = len(prefix)
        return {new_prefix + k[n:]: v.half().contiguous() for k, v in model.items() if k.startswith(prefix)}

    save_file(part("backbone.", "model."), folder / "model.safetensors")
    save_file(part("head.", "net."), folder / "vision_head.safetensors")
    save_file(part("projector.", ""), folder / "projector.safetensors")
    save_file({k: v.half().contiguous() for k, v in autoencoder.items()}, folder / "ae.safetensors")
    configs = {
        "config.json": backbone.to_dict() | {"dtype": "float16"},
        "vision_head_config.json": head.to_dict(),
        "ae_config.json": AUTOENCODER_CONFIG.to_dict(),
        "bitdance.json": {"name": "builtin", **dataclasses.asdict(DEFAULTS), "draws": DRAWS, "words": WORDS},
    }
    for name, config in configs.items():
        (folder / name).write_text(json.dumps(config, indent=2) + "\n")
    (folder / "tokenizer.json").write_text(tokenizer_json.read_text())
    total = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{folder}: {total / 1e6:.2f} MB")
