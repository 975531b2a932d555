"""Build models of the published sizes with random weights, and count their parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from types import ModuleType

import torch
from torch import nn

from bitdance_core.checkpoints.checkpoint import read_checkpoint
from bitdance_core.checkpoints.locate import ASSETS
from bitdance_core.model.class_config import IMAGENET, ImageNetConfig
from bitdance_core.model.class_model import ImageNetModel
from bitdance_core.model.grid import Grid
from bitdance_core.model.text_config import AE_D16C32, PUBLISHED_CONFIGS, BitDanceConfig
from bitdance_core.model.text_model import BitDance
from bitdance_core.model.tokenizer_config import AutoencoderConfig
from bitdance_core.model.tokenizer_network import BinaryAutoencoder

Config = BitDanceConfig | ImageNetConfig
Model = BitDance | ImageNetModel

CONFIGS = {
    **IMAGENET,
    **{config.family: config for config in PUBLISHED_CONFIGS},
    "builtin": read_checkpoint(ASSETS / "builtin").config,
}
WORDS = "embed_tokens.weight"
TABLES = (WORDS, "cls_embedding.weight")
# as rounded in the authors' README
PUBLISHED_COUNTS = {
    "imagenet-b-1x": {"model": 242e6},
    "imagenet-b-4x": {"model": 260e6},
    "imagenet-b-16x": {"model": 260e6},
    "imagenet-l-1x": {"model": 527e6},
    "imagenet-h-1x": {"model": 1.0e9},
} | dict.fromkeys(
    (config.family for config in PUBLISHED_CONFIGS),
    {"transformer": 13.2e9, "table": 0.78e9, "head": 1.76e9, "tokenizer": 0.46e9},
)


def with_layers(config: Config, layers: int) -> Config:
    family = f"{config.family} with {layers} layers"
    if isinstance(config, ImageNetConfig):
        return replace(config, family=family, num_layers=layers)
    return replace(config, family=family, backbone=replace(config.backbone, num_layers=layers))


def build(config: Config, operations: ModuleType | type = nn) -> Model:
    """Build a model on the meta device, without weights."""
    return (ImageNetModel if isinstance(config, ImageNetConfig) else BitDance)(config, operations, device="meta")


def tokenizer_of(config: Config) -> AutoencoderConfig:
    return AE_D16C32 if isinstance(config, ImageNetConfig) else config.autoencoder


def make_grid(config: Config) -> Grid:
    downscale = tokenizer_of(config).downscale
    height, width = config.defaults.default_size
    return Grid(height // downscale, width // downscale, config.patch_size)


def random_weight(name: str, parameter: nn.Parameter, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Make a weight that keeps features near 1; the embedding stays on the CPU, as in a real run."""
    weight = torch.empty(parameter.shape, device="cpu" if name.endswith(WORDS) else device, dtype=dtype)
    if weight.ndim > 1:
        bound = (3 / weight[0].numel()) ** 0.5
        return weight.uniform_(-bound, bound)
    return weight.fill_(0 if name.endswith("bias") else 1)


def fill_randomly(
    model: nn.Module, device: torch.device, dtype: torch.dtype, make: Callable[..., torch.Tensor | None] = random_weight
) -> None:
    """Fill a model with the weights that `make` makes; where it makes None, the parameter stays as it is."""
    for name, parameter in list(model.named_parameters()):
        weight = make(name, parameter, device, dtype)
        if weight is not None:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))


def count(config: Config) -> dict[str, int]:
    """Count parameters by part; "model" is all but the tokenizer. Without lm_head, which drawing does not use."""
    model = build(config)

    def size(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    table = sum(parameter.numel() for name, parameter in model.named_parameters() if name.endswith(TABLES))
    projector = size(model.proj_in if isinstance(config, ImageNetConfig) else model.projector)
    parts = {"table": table, "projector": projector, "head": size(model.head), "model": size(model)}
    rest = parts["model"] - table - projector - parts["head"]
    return {"transformer": rest, **parts, "tokenizer": size(BinaryAutoencoder(tokenizer_of(config), device="meta"))}


def print_counts(configs: Iterable[Config]) -> None:
    """Print a table in millions, with published numbers in brackets."""
    for row, config in enumerate(configs):
        counts, published = count(config), PUBLISHED_COUNTS.get(config.family, {})
        if not row:
            print(f"| parameters | {' | '.join(counts)} |\n| --- |{' --- |' * len(counts)}")
        cells = (
            f"{number / 1e6:,.1f} M" + (f" ({published[part] / 1e6:,.0f} M)" if part in published else "")
            for part, number in counts.items()
        )
        print(f"| {config.family} | {' | '.join(cells)} |")
