"""Configurations of text-to-image models: frozen dataclasses, the published models, and their trained sizes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import BitDanceError
from .fields import MAX_LAYERS, Shapes, Size, count_modules, read_dimensions, read_field
from .tokenizer_config import AutoencoderConfig

SIZES_1024 = (
    (2048, 512), (1920, 512), (1536, 640), (1280, 768), (1152, 896), (1024, 1024),
    (896, 1152), (768, 1280), (640, 1536), (512, 1920), (512, 2048),
)  # fmt: skip
SIZES_512 = ((1024, 256), (896, 256), (640, 384), (512, 512), (384, 640), (256, 896), (256, 1024))

POSITIONS = "max_position_embeddings"


@dataclass(frozen=True)
class BackboneConfig:
    """Qwen3 decoder stack. Sizes and widths count features. `max_positions` None: no file says so."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    max_positions: int | None = None

    @classmethod
    def from_dict(cls, config: dict[str, Any], source: str) -> BackboneConfig:
        """Read a Hugging Face `config.json`; `source` is the file named in errors.

        Raises BitDanceError for missing or wrong values, and for settings that BitDance's Qwen3 does not use.
        """
        if config.get("model_type", "qwen3") != "qwen3":
            raise BitDanceError(f"{source}: model_type is '{config['model_type']}', expected 'qwen3'")
        # transformers 5 moved the rotary settings into one dictionary
        rope = config.get("rope_parameters") or {}
        scaling = config.get("rope_scaling") or rope
        if not isinstance(rope, dict) or not isinstance(scaling, dict):
            raise BitDanceError(f"{source}: 'rope_parameters' and 'rope_scaling' must be objects or null")
        unsupported = {
            "rope scaling": scaling.get("rope_type", scaling.get("type", "default")) != "default",
            "attention biases": config.get("attention_bias"),
            "sliding windows": config.get("use_sliding_window"),
            f"the activation {config.get('hidden_act')!r}": config.get("hidden_act", "silu") != "silu",
        }
        if any(unsupported.values()):
            found = ", ".join(name for name, is_set in unsupported.items() if is_set)
            raise BitDanceError(f"{source}: unsupported setting: {found} (BitDance's Qwen3 does not use it)")
        backbone = cls(
            vocab_size=read_field(config, "vocab_size", int, source),
            hidden_size=read_field(config, "hidden_size", int, source),
            num_layers=read_field(config, "num_hidden_layers", int, source, most=MAX_LAYERS),
            num_heads=read_field(config, "num_attention_heads", int, source),
            num_kv_heads=read_field(config, "num_key_value_heads", int, source),
            head_dim=read_field(config, "head_dim", int, source),
            intermediate_size=read_field(config, "intermediate_size", int, source),
            rms_norm_eps=read_field(config, "rms_norm_eps", float, source),
            rope_theta=read_field({**rope, **config}, "rope_theta", float, source),
            max_positions=read_field(config, POSITIONS, int, source) if config.get(POSITIONS) is not None else None,
        )
        if backbone.hidden_size % 4 or backbone.head_dim % 2 or backbone.num_heads % backbone.num_kv_heads:
            raise BitDanceError(
                f"{source}: hidden_size must be a multiple of 4, head_dim of 2, and num_attention_heads of "
                f"num_key_value_heads, found {backbone.hidden_size}, {backbone.head_dim}, {backbone.num_heads} and "
                f"{backbone.num_kv_heads}"
            )
        return backbone

    @classmethod
    def from_shapes(cls, shapes: Shapes, source: str) -> BackboneConfig:
        """Derive from the shapes of a language model's tensors; values that no shape gives are Qwen3's.

        `source` is the file named in errors.
        """
        layer = "layers.0.self_attn."
        vocab_size, hidden_size = read_dimensions(shapes, "embed_tokens.weight", 2, source)
        (head_dim,) = read_dimensions(shapes, layer + "q_norm.weight", 1, source)
        rows = [read_dimensions(shapes, f"{layer}{name}_proj.weight", 2, source)[0] for name in "qk"]
        if any(n % head_dim for n in rows):
            raise BitDanceError(
                f"{source}: q_proj and k_proj have {rows} rows, expected multiples of head_dim {head_dim}"
            )
        config = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "num_hidden_layers": count_modules(shapes, "layers."),
            "num_attention_heads": rows[0] // head_dim,
            "num_key_value_heads": rows[1] // head_dim,
            "head_dim": head_dim,
            "intermediate_size": read_dimensions(shapes, "layers.0.mlp.gate_proj.weight", 2, source)[0],
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
        }
        return cls.from_dict(config, source)

    def to_dict(self) -> dict[str, Any]:
        """Return a `config.json` that `from_dict` and transformers can read."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "attention_bias": False,
            "tie_word_embeddings": False,
        } | ({} if self.max_positions is None else {POSITIONS: self.max_positions})


@dataclass(frozen=True)
class HeadConfig:
    """Binary diffusion head: `bits` per token in and out, `cond_width` = the backbone's width."""

    bits: int
    cond_width: int
    width: int
    depth: int
    num_modulations: int  # adaLN layers; each modulates depth / num_modulations blocks
    swiglu: bool
    time_shift: float
    tokens_per_patch: int | None  # None: not in the file; the number of query tokens decides
    head_dim: int = 128  # of an attention head
    attends: bool = True  # the tokens of a patch attend to each other; else a block is only its MLP
    squashes: bool = True  # predictions go through 2 * sigmoid - 1 into [-1, 1]

    @property
    def modulations(self) -> int:
        """Outputs of an adaLN layer: scale, shift and gate for each norm of a block."""
        return 6 if self.attends else 3

    @classmethod
    def from_dict(cls, config: dict[str, Any], source: str) -> HeadConfig:
        """Read a `vision_head_config.json`; `source` is the file named in errors."""
        head = cls(
            bits=read_field(config, "ch_target", int, source),
            cond_width=read_field(config, "ch_cond", int, source),
            width=read_field(config, "ch_latent", int, source),
            depth=read_field(config, "depth_latent", int, source, most=MAX_LAYERS),
            num_modulations=read_field(config, "depth_adanln", int, source),
            swiglu=read_field(config, "use_swiglu", bool, source),
            time_shift=read_field(config, "time_shift", float, source),
            tokens_per_patch=read_field(config, "parallel_num", int, source) if "parallel_num" in config else None,
        )
        if head.width % 128:
            raise BitDanceError(
                f"{source}: ch_latent must be a multiple of 128 (one attention head), found {head.width}"
            )
        if not 0.01 <= head.time_shift <= 100:
            raise BitDanceError(f"{source}: time_shift must be from 0.01 to 100, found {head.time_shift}")
        if head.depth % head.num_modulations:
            raise BitDanceError(
                f"{source}: depth_latent {head.depth} must be a multiple of depth_adanln {head.num_modulations}"
            )
        return head

    @classmethod
    def from_shapes(cls, shapes: Shapes, source: str) -> HeadConfig:
        """Derive from the shapes of a text-to-image head's tensors; `source` is the file named in errors.

        No shape gives the number of tokens per patch: the prompt tokenizer's query tokens do.
        """
        width, bits = read_dimensions(shapes, "input_proj.weight", 2, source)
        config = {
            "ch_target": bits,
            "ch_cond": read_dimensions(shapes, "cond_embed.weight", 2, source)[1],
            "ch_latent": width,
            "depth_latent": count_modules(shapes, "res_blocks."),
            "depth_adanln": count_modules(shapes, "ada_ln_blocks."),
            "use_swiglu": "res_blocks.0.w1.weight" in shapes,
            "time_shift": 1.0,
        }
        return cls.from_dict(config, source)

    def to_dict(self) -> dict[str, Any]:
        """Return a text-to-image head's `vision_head_config.json`."""
        config = {
            "ch_target": self.bits,
            "ch_cond": self.cond_width,
            "ch_latent": self.width,
            "depth_latent": self.depth,
            "depth_adanln": self.num_modulations,
            "use_swiglu": self.swiglu,
            "time_shift": self.time_shift,
        }
        return config | ({"parallel_num": self.tokens_per_patch} if self.tokens_per_patch else {})


@dataclass(frozen=True)
class Defaults:
    """Recommended settings and trained sizes of a model. `trained_sizes` None: every multiple of the patch's side."""

    default_size: Size
    steps: int
    guidance: float
    trained_sizes: tuple[Size, ...] | None = None
    schedule: str = "constant"  # of the guidance over the patches

    @classmethod
    def from_dict(cls, config: dict[str, Any], source: str) -> Defaults:
        """Read a model folder's `bitdance.json`; `source` is the file named in errors."""
        sizes = tuple(_size(s, source) for s in read_field(config, "trained_sizes", list, source))
        defaults = cls(
            default_size=_size(config.get("default_size"), source),
            steps=read_field(config, "steps", int, source),
            guidance=read_field(config, "guidance", float, source),
            trained_sizes=sizes,
        )
        if defaults.default_size not in sizes:
            raise BitDanceError(
                f"{source}: 'default_size' must be one of 'trained_sizes', found {defaults.default_size}"
            )
        return defaults


@dataclass(frozen=True)
class BitDanceConfig:
    """A text-to-image model, which draws `tokens_per_patch` tokens (a square number) at once."""

    family: str
    backbone: BackboneConfig
    head: HeadConfig
    autoencoder: AutoencoderConfig
    tokens_per_patch: int
    defaults: Defaults

    @property
    def patch_size(self) -> int:
        """Tokens on a patch's side."""
        return math.isqrt(self.tokens_per_patch)

    def prompt_length(self, branch: Sequence[int]) -> int:
        """Count the tokens of a guidance branch before the first patch, image opening included."""
        return len(branch)


QWEN3_14B = BackboneConfig(
    vocab_size=151988,
    hidden_size=5120,
    num_layers=40,
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=17408,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
)
HEAD_14B = HeadConfig(
    bits=32,
    cond_width=5120,
    width=5120,
    depth=6,
    num_modulations=2,
    swiglu=True,
    time_shift=1.0,
    tokens_per_patch=64,
)
AE_D16C32 = AutoencoderConfig(
    channels=256, channel_multipliers=(1, 1, 2, 2, 4), num_res_blocks=4, bits=32, gan_decoder=False
)
BITDANCE_14B_64X = BitDanceConfig(
    family="bitdance-14b-64x",
    backbone=QWEN3_14B,
    head=HEAD_14B,
    autoencoder=AE_D16C32,
    tokens_per_patch=64,
    defaults=Defaults((1024, 1024), steps=50, guidance=7.5, trained_sizes=SIZES_1024),
)
BITDANCE_14B_16X = dataclasses.replace(
    BITDANCE_14B_64X,
    family="bitdance-14b-16x",
    backbone=dataclasses.replace(QWEN3_14B, vocab_size=151940),
    head=dataclasses.replace(HEAD_14B, tokens_per_patch=16),
    tokens_per_patch=16,
    defaults=dataclasses.replace(BITDANCE_14B_64X.defaults, trained_sizes=SIZES_1024 + SIZES_512),
)
PUBLISHED_CONFIGS = (BITDANCE_14B_64X, BITDANCE_14B_16X)


def identify(
    backbone: BackboneConfig, head: HeadConfig, autoencoder: AutoencoderConfig, tokens_per_patch: int
) -> BitDanceConfig:
    """Identify a model by its shapes: a published one with its trained sizes, or "custom" with any size.

    Ignores the vocabulary, which files pad differently, and numbers that no shape gives.
    """
    ignored = {"vocab_size": 0, "rms_norm_eps": 0.0, "rope_theta": 0.0, "max_positions": None}
    for known in PUBLISHED_CONFIGS:
        if (
            dataclasses.replace(backbone, **ignored) == dataclasses.replace(known.backbone, **ignored)
            and (head.bits, head.width, head.depth) == (known.head.bits, known.head.width, known.head.depth)
            and autoencoder == known.autoencoder
            and tokens_per_patch == known.tokens_per_patch
        ):
            return dataclasses.replace(known, backbone=backbone, head=head)
    side = 4 * math.isqrt(tokens_per_patch) * autoencoder.downscale
    defaults = Defaults((side, side), steps=50, guidance=7.5)
    return BitDanceConfig("custom", backbone, head, autoencoder, tokens_per_patch, defaults)


def _size(value: Any, source: str) -> Size:
    if not (isinstance(value, list) and len(value) == 2 and all(type(v) is int and v > 0 for v in value)):
        raise BitDanceError(f"{source}: a size must be [height, width] in pixels, found {value!r}")
    return value[0], value[1]
