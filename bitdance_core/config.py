"""What a model is made of: frozen records, the published models by name, and the sizes they were trained on."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from .errors import BitDanceError

Size = tuple[int, int]  # (height, width) in pixels

# what no model comes near: a damaged file must not make us build networks without end
MAX_WIDTH, MAX_LAYERS = 2**20, 512

SIZES_1024 = (
    (2048, 512), (1920, 512), (1536, 640), (1280, 768), (1152, 896), (1024, 1024),
    (896, 1152), (768, 1280), (640, 1536), (512, 1920), (512, 2048),
)  # fmt: skip
SIZES_512 = ((1024, 256), (896, 256), (640, 384), (512, 512), (384, 640), (256, 896), (256, 1024))


@dataclass(frozen=True)
class BackboneConfig:
    """Qwen3 decoder stack. Widths in features, counts in units."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float

    @classmethod
    def from_dict(cls, config: dict[str, Any], source: str) -> BackboneConfig:
        """Read a Hugging Face `config.json`; `source` is named in errors."""
        if config.get("model_type", "qwen3") != "qwen3":
            raise BitDanceError(
                f"{source}: model_type is '{config['model_type']}', BitDance's language model is a 'qwen3'"
            )
        # transformers 5 moved the rotary settings into one dictionary
        rope = config.get("rope_parameters") or {}
        scaling = config.get("rope_scaling") or rope
        if not isinstance(rope, dict) or not isinstance(scaling, dict):
            raise BitDanceError(f"{source}: 'rope_parameters' and 'rope_scaling' must be objects or null")
        strange = {
            "rope scaling": scaling.get("rope_type", scaling.get("type", "default")) != "default",
            "attention biases": config.get("attention_bias"),
            "sliding windows": config.get("use_sliding_window"),
            f"the activation {config.get('hidden_act')!r}": config.get("hidden_act", "silu") != "silu",
        }
        if any(strange.values()):
            found = ", ".join(name for name, is_there in strange.items() if is_there)
            raise BitDanceError(f"{source}: {found} cannot be: no BitDance language model has it")
        backbone = cls(
            vocab_size=_field(config, "vocab_size", int, source),
            hidden_size=_field(config, "hidden_size", int, source),
            num_layers=_field(config, "num_hidden_layers", int, source, most=MAX_LAYERS),
            num_heads=_field(config, "num_attention_heads", int, source),
            num_kv_heads=_field(config, "num_key_value_heads", int, source),
            head_dim=_field(config, "head_dim", int, source),
            intermediate_size=_field(config, "intermediate_size", int, source),
            rms_norm_eps=_field(config, "rms_norm_eps", float, source),
            rope_theta=_field({**rope, **config}, "rope_theta", float, source),
        )
        if backbone.hidden_size % 4 or backbone.head_dim % 2 or backbone.num_heads % backbone.num_kv_heads:
            raise BitDanceError(
                f"{source}: hidden_size must be a multiple of 4, head_dim of 2, and num_attention_heads of "
                f"num_key_value_heads, found {backbone.hidden_size}, {backbone.head_dim}, {backbone.num_heads} and "
                f"{backbone.num_kv_heads}"
            )
        return backbone


@dataclass(frozen=True)
class HeadConfig:
    """Binary diffusion head: `bits` per token in and out, `cond_width` = the backbone's width."""

    bits: int
    cond_width: int
    width: int
    depth: int
    num_modulations: int  # adaLN layers; each serves depth / num_modulations blocks
    swiglu: bool
    time_shift: float
    tokens_per_patch: int | None  # None: the file does not say, the prompt tokenizer's queries do

    @classmethod
    def from_dict(cls, config: dict[str, Any], source: str) -> HeadConfig:
        """Read a `vision_head_config.json`; `source` is named in errors."""
        head = cls(
            bits=_field(config, "ch_target", int, source),
            cond_width=_field(config, "ch_cond", int, source),
            width=_field(config, "ch_latent", int, source),
            depth=_field(config, "depth_latent", int, source, most=MAX_LAYERS),
            num_modulations=_field(config, "depth_adanln", int, source),
            swiglu=_field(config, "use_swiglu", bool, source),
            time_shift=_field(config, "time_shift", float, source),
            tokens_per_patch=_field(config, "parallel_num", int, source) if "parallel_num" in config else None,
        )
        if head.width % 128:
            raise BitDanceError(
                f"{source}: ch_latent is {head.width}, it must be a multiple of 128 (one attention head)"
            )
        if not 0.01 <= head.time_shift <= 100:
            raise BitDanceError(f"{source}: time_shift is {head.time_shift}, it must lie between 0.01 and 100")
        if head.depth % head.num_modulations:
            raise BitDanceError(
                f"{source}: depth_adanln {head.num_modulations} does not divide depth_latent {head.depth}"
            )
        return head


@dataclass(frozen=True)
class AutoencoderConfig:
    """Binary tokenizer: one token of `bits` bits per `downscale` x `downscale` pixels."""

    channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    bits: int
    gan_decoder: bool

    @property
    def downscale(self) -> int:
        return 2 ** (len(self.channel_multipliers) - 1)

    @classmethod
    def from_dict(cls, config: dict[str, Any], source: str) -> AutoencoderConfig:
        """Read an `ae_config.json`; `source` is named in errors."""
        levels = _field(config, "ddconfig", dict, source)
        multipliers = _field(levels, "ch_mult", list, source)
        if not 1 <= len(multipliers) <= 8 or any(type(m) is not int or not 1 <= m <= 64 for m in multipliers):
            raise BitDanceError(f"{source}: 'ch_mult' must be 1 to 8 whole numbers up to 64, found {multipliers}")
        channels = _field(levels, "ch", int, source)
        if channels % 32:
            raise BitDanceError(f"{source}: 'ch' is {channels}, it must be a multiple of 32 (groups of a norm)")
        return cls(
            channels=channels,
            channel_multipliers=tuple(multipliers),
            num_res_blocks=_field(levels, "num_res_blocks", int, source, most=MAX_LAYERS),
            bits=_field(levels, "z_channels", int, source),
            gan_decoder=bool(config.get("gan_decoder", False)),
        )


@dataclass(frozen=True)
class Defaults:
    """What a model was trained for, and good settings. `trained_sizes` None: every size that the patch divides."""

    default_size: Size
    steps: int
    guidance: float
    trained_sizes: tuple[Size, ...] | None = None

    @classmethod
    def from_dict(cls, config: dict[str, Any], source: str) -> Defaults:
        """Read a folder's own `bitdance.json`; `source` is named in errors."""
        sizes = tuple(_size(s, source) for s in _field(config, "trained_sizes", list, source))
        defaults = cls(
            default_size=_size(config.get("default_size"), source),
            steps=_field(config, "steps", int, source),
            guidance=_field(config, "guidance", float, source),
            trained_sizes=sizes,
        )
        if defaults.default_size not in sizes:
            raise BitDanceError(f"{source}: 'default_size' is not one of 'trained_sizes'")
        return defaults


@dataclass(frozen=True)
class BitDanceConfig:
    """A whole text-to-image model. `tokens_per_patch` tokens (a square number) are drawn at once."""

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
PUBLISHED = (BITDANCE_14B_64X, BITDANCE_14B_16X)


def identify(
    backbone: BackboneConfig, head: HeadConfig, autoencoder: AutoencoderConfig, tokens_per_patch: int
) -> BitDanceConfig:
    """Name a model by its shapes: a published one with its trained sizes, or "custom" with any size.

    The vocabulary is not compared: files pad it differently. Nor are numbers that no shape shows.
    """
    other = {"vocab_size": 0, "rms_norm_eps": 0.0, "rope_theta": 0.0}
    for known in PUBLISHED:
        if (
            dataclasses.replace(backbone, **other) == dataclasses.replace(known.backbone, **other)
            and (head.bits, head.width, head.depth) == (known.head.bits, known.head.width, known.head.depth)
            and autoencoder == known.autoencoder
            and tokens_per_patch == known.tokens_per_patch
        ):
            return dataclasses.replace(known, backbone=backbone, head=head)
    side = 4 * math.isqrt(tokens_per_patch) * autoencoder.downscale
    defaults = Defaults((side, side), steps=50, guidance=7.5)
    return BitDanceConfig("custom", backbone, head, autoencoder, tokens_per_patch, defaults)


def _field(config: dict[str, Any], name: str, kind: type, source: str, most: int = MAX_WIDTH) -> Any:
    """A required value of a JSON object, checked to be a `kind` (numbers: above 0, whole ones at most `most`)."""
    if name not in config:
        raise BitDanceError(f"{source}: '{name}' is missing")
    value = config[name]
    if kind is int and type(value) is int and 1 <= value <= most:
        return value
    if kind is float and type(value) in (int, float) and 0 < value < 1e30:
        return float(value)
    if kind not in (int, float) and type(value) is kind:
        return value
    wanted = {int: f"a whole number from 1 to {most}", float: "a number above 0", dict: "an object", list: "a list"}
    raise BitDanceError(f"{source}: '{name}' must be {wanted.get(kind, 'true or false')}, found {str(value)[:40]}")


def _size(value: Any, source: str) -> Size:
    if not (isinstance(value, list) and len(value) == 2 and all(type(v) is int and v > 0 for v in value)):
        raise BitDanceError(f"{source}: a size is [height, width] in pixels, found {value!r}")
    return value[0], value[1]
