"""Configurations of class-conditional models: read from the shapes of their tensors, and the five published ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import BitDanceError
from .fields import MAX_LAYERS, Shapes, count_modules, read_dimensions
from .text_config import Defaults, HeadConfig

HEAD_DIM = 64  # of every attention head


@dataclass(frozen=True)
class ImageNetConfig:
    """A class-conditional model: a transformer over class tokens, queries and patches, and its diffusion head.

    It draws one size, a square of `grid_side` tokens. Attention heads have 64 features in both networks.
    """

    family: str
    num_classes: int
    class_tokens: int
    width: int
    num_layers: int
    intermediate_size: int
    projection_size: int  # hidden width of the network that embeds tokens
    tokens_per_patch: int
    grid_side: int
    head: HeadConfig
    downscale: int
    defaults: Defaults
    head_dim: int = HEAD_DIM

    @property
    def num_heads(self) -> int:
        return self.width // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads, for a KV cache: one per query head."""
        return self.num_heads

    @property
    def bits(self) -> int:
        return self.head.bits

    @property
    def patch_size(self) -> int:
        """Tokens on a patch's side."""
        return math.isqrt(self.tokens_per_patch)

    @property
    def null_class(self) -> int:
        """The class of the unconditional branch."""
        return self.num_classes

    def prompt_length(self, branch: Sequence[int]) -> int:
        """Count the tokens of a guidance branch (one class per image) before the first patch, queries included."""
        return self.class_tokens + self.tokens_per_patch - 1

    @classmethod
    def from_shapes(cls, shapes: Shapes, downscale: int, source: str) -> ImageNetConfig:
        """Derive from the shapes in a published file, by its names; `source` is the file named in errors.

        `downscale` is the binary tokenizer's, in pixels per token. Raises BitDanceError for shapes of no such model.
        """
        (width,) = read_dimensions(shapes, "norm.weight", 1, source)
        classes, class_width = read_dimensions(shapes, "cls_embedding.weight", 2, source)
        tokens, _ = read_dimensions(shapes, "pos_for_diff.weight", 2, source)
        hidden = [
            read_dimensions(shapes, name, 2, source)[0]
            for name in ("layers.0.feed_forward.w1.weight", "proj_in.w1.weight")
        ]
        queries = read_dimensions(shapes, "query_token", 3, source)[1] if "query_token" in shapes else 0
        patch, side, layers = queries + 1, math.isqrt(tokens), count_modules(shapes, "layers.")
        head = _imagenet_head(shapes, patch, source)
        wrong = {
            f"a width of {width}, not a multiple of {HEAD_DIM}": width % HEAD_DIM,
            f"class tokens of {class_width} features, not a multiple of {width}": class_width % width,
            f"{classes} rows of classes, fewer than 2 (the last is the null class)": classes < 2,
            f"{layers} layers": layers > MAX_LAYERS,
            f"hidden widths {hidden}, not even": any(n % 2 for n in hidden),
            f"a grid of {tokens} tokens, not a square": side**2 != tokens,
            f"patches of {patch} tokens, not squares": math.isqrt(patch) ** 2 != patch,
            f"a grid side of {side} tokens, not a multiple of a patch's": side % math.isqrt(patch),
            f"a head for {head.cond_width} features, not {width}": head.cond_width != width,
        }
        if any(wrong.values()):
            found = "; ".join(problem for problem, is_so in wrong.items() if is_so)
            raise BitDanceError(f"{source} is not a class-conditional model: it has {found}")
        size = side * downscale, side * downscale
        config = cls(
            family="imagenet-custom",
            num_classes=classes - 1,
            class_tokens=class_width // width,
            width=width,
            num_layers=layers,
            intermediate_size=hidden[0] // 2,
            projection_size=hidden[1] // 2,
            tokens_per_patch=patch,
            grid_side=side,
            head=head,
            downscale=downscale,
            defaults=Defaults(size, steps=100, guidance=4.0, trained_sizes=(size,), schedule="linear"),
        )
        for known in IMAGENET.values():
            if dataclasses.replace(config, family=known.family, defaults=known.defaults) == known:
                return known
        return config


def _imagenet_head(shapes: Shapes, tokens_per_patch: int, source: str) -> HeadConfig:
    prefix = "head.net."
    width, bits = read_dimensions(shapes, prefix + "input_proj.weight", 2, source)
    _, cond_width = read_dimensions(shapes, prefix + "cond_embed.weight", 2, source)
    depth, modulations = count_modules(shapes, prefix + "res_blocks."), count_modules(shapes, prefix + "ada_ln_blocks.")
    attends = prefix + "res_blocks.0.attn.wqkv.weight" in shapes
    if not 1 <= modulations <= depth <= MAX_LAYERS or depth % modulations or (attends and width % HEAD_DIM):
        raise BitDanceError(
            f"{source}: the head has {depth} blocks, {modulations} adaLN layers and width {width}; expected the same "
            f"number of blocks for each layer, and a width that is a multiple of {HEAD_DIM}"
        )
    return HeadConfig(
        bits=bits,
        cond_width=cond_width,
        width=width,
        depth=depth,
        num_modulations=modulations,
        swiglu=prefix + "res_blocks.0.w1.weight" in shapes,
        time_shift=1.0,
        tokens_per_patch=tokens_per_patch,
        head_dim=HEAD_DIM,
        attends=attends,
        squashes=False,
    )


def _imagenet(
    size: str, width: int, layers: int, depth: int, modulations: int, tokens_per_patch: int, guidance: float
) -> ImageNetConfig:
    return ImageNetConfig(
        family=f"imagenet-{size}-{tokens_per_patch}x",
        num_classes=1000,
        class_tokens=64,
        width=width,
        num_layers=layers,
        intermediate_size=-(-8 * width // (3 * 256)) * 256,
        projection_size=int(1.5 * width),
        tokens_per_patch=tokens_per_patch,
        grid_side=16,
        head=HeadConfig(
            bits=32,
            cond_width=width,
            width=width,
            depth=depth,
            num_modulations=modulations,
            swiglu=True,
            time_shift=1.0,
            tokens_per_patch=tokens_per_patch,
            head_dim=HEAD_DIM,
            attends=tokens_per_patch > 1,
            squashes=False,
        ),
        downscale=16,
        defaults=Defaults((256, 256), steps=100, guidance=guidance, trained_sizes=((256, 256),), schedule="linear"),
    )


IMAGENET = {
    config.family: config
    for config in (
        _imagenet("b", 768, 24, 6, 2, 1, 3.2),
        _imagenet("b", 768, 24, 6, 2, 4, 3.9),
        _imagenet("b", 768, 24, 6, 2, 16, 6.1),
        _imagenet("l", 1024, 32, 8, 2, 1, 4.0),
        _imagenet("h", 1280, 40, 12, 3, 1, 4.55),
    )
}
