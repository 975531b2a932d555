"""Which graphics card a model fits: counted from its configuration, not measured (docs/memory.md)."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from functools import singledispatch
from math import prod
from pathlib import Path

from torch import nn

from .checkpoints.checkpoint import ClassCheckpoint, TextCheckpoint
from .checkpoints.hub import PUBLISHED_MODELS, RECOMMENDED
from .checkpoints.layouts import find_layout
from .checkpoints.load import LAYERS
from .checkpoints.quantization import FORMATS
from .checkpoints.tensor_names import Component, TensorInfo
from .checkpoints.tokenizer_files import TokenizerCheckpoint, tokenizer_of
from .model.grid import Grid
from .model.text_config import BackboneConfig, BitDanceConfig, HeadConfig, identify
from .model.text_model import BitDance
from .parts import HEAD, LANGUAGE_MODEL, PROJECTOR
from .sampling.memory import decoding_bytes, drawing_bytes

GB = 1e9
# bits per weight of a layer's matrix, scales included; all other weights are bfloat16. 4 bits of convrot_w4a4 with a
# scale a row, but 8 of the layers that it spares
PRECISIONS = {"bf16": 16.0, "fp8 or int8": 8.0, "nvfp4, asym_w4a8_int8": 4.5, "convrot_w4a4": 4.0}
SPARED = FORMATS["convrot_w4a4"].spares
CARDS = (8, 12, 16, 24, 48)  # GiB, sold as GB
RESERVE = 1.5 * GB  # used by other programs
PROMPT, UNCONDITIONAL = 64, 4  # tokens of a prompt of about 50 words in its template, and of the empty template
TOKENIZER_SIDE = 1024  # pixels of the picture that a binary tokenizer alone is counted for
NOMINAL = 0.95  # of a card's GB that it may report as less

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Machine:
    """What a model has to fit, in bytes: a GPU's memory (0: there is none), system memory, free disk."""

    card: int
    memory: int
    disk: int


def recommend(machine: Machine, here: Container[str]) -> str | None:
    """Name the best published text-to-image model that a machine has room for; `here` are those on its disk.

    None: only the built-in model. The weights have to fit into system memory, from where they are streamed.
    """
    for name, card in RECOMMENDED.items():
        size = PUBLISHED_MODELS[name].gigabytes * GB
        has_card = machine.card >= card * NOMINAL * 2**30
        if has_card and machine.memory >= size and (name in here or machine.disk >= size):
            return name
    return None


def size_and_card(source: Path | tuple[Path, ...]) -> tuple[int, int | None]:
    """Return a model's bytes on disk and its `comfortable_card`, from the headers of its files alone.

    Raises BitDanceError for files that are no model.
    """
    layout = find_layout(source)
    parts = layout.parts
    size = sum(file.stat().st_size for file in {file for part in parts.values() for file in part.files})
    if HEAD not in parts or LANGUAGE_MODEL not in parts:  # an ImageNet model, or a tokenizer
        return size, smallest_card(sum(map(_loaded, parts.values())))
    backbone, head = (
        kind.from_dict(*layout.configs[part]) if part in layout.configs else kind.from_shapes(parts[part].shapes, "")
        for part, kind in ((LANGUAGE_MODEL, BackboneConfig), (HEAD, HeadConfig))
    )
    # a head that does not say how many tokens it draws at once counts as 14B-64x's
    config = identify(backbone, head, tokenizer_of(layout).config, head.tokens_per_patch or 64)
    on_card = parts[LANGUAGE_MODEL].without("embed_tokens.weight", "lm_head.weight")
    language_model = _loaded(on_card) + _loaded(parts[PROJECTOR])
    return size, comfortable_card(language_model, _loaded(parts[HEAD]), drawing_of(config, 1))


def _loaded(part: Component) -> int:
    return sum(map(loaded_bytes, part.tensors.values()))


def loaded_bytes(info: TensorInfo) -> int:
    """Return the bytes of a tensor once it is loaded: as bfloat16, or as quantized as it is in its file."""
    if info.quantization is None:
        return 2 * prod(info.shape)
    return prod(info.shape) // (2 if FORMATS[info.quantization.format].packed else 1)


def comfortable_card(language_model: float, head: float, drawing: float) -> int | None:
    """Return the smallest card, in GiB, for the head, what drawing takes, and half of the language model, in bytes.

    The other half is streamed. None where none of `CARDS` is large enough.
    """
    return smallest_card(head + drawing + language_model / 2)


@singledispatch
def card_rows(checkpoint) -> Rows:
    """List names and values that say which card one kind of checkpoint fits, for `info`."""
    raise TypeError(type(checkpoint))


@card_rows.register
def _(checkpoint: TextCheckpoint) -> Rows:
    return text_rows(checkpoint.config)


@card_rows.register
def _(checkpoint: ClassCheckpoint) -> Rows:
    config, network = checkpoint.config, checkpoint.build()
    lengths = [config.prompt_length([0])] * 2
    drawing = drawing_bytes(config, network.grid, lengths, 1, config.defaults.steps, 2)
    needed = weight_bytes(network, "", 16) + drawing
    return [_row("bf16", needed)]


@card_rows.register
def _(checkpoint: TokenizerCheckpoint) -> Rows:
    side = TOKENIZER_SIDE
    needed = weight_bytes(checkpoint.build(), "", 16) + decoding_bytes(checkpoint.config, side, side, 2)
    return [_row("bf16", needed, f" to decode {side}x{side} pixels")]


def text_rows(config: BitDanceConfig) -> Rows:
    """List what a text-to-image model needs for one picture of its default size, in each precision."""
    rows, drawing = [], drawing_of(config, 1)
    for name, bits in PRECISIONS.items():
        needed = sum(parts_of(config, bits)) + drawing
        whole = smallest_card(needed)
        streamed = next((card for card in CARDS if split(config, bits, room_of(card) - drawing)), None)
        others = f"; {streamed} GB cards with the language model streamed" if streamed and streamed != whole else ""
        rows.append(_row(name, needed, others))
        if whole == CARDS[0]:  # other precisions fit it too
            break
    return rows


def _row(precision: str, needed: float, more: str = "") -> tuple[str, str]:
    amount = f"{needed / GB:.1f} GB" if needed >= 0.1 * GB else "under 0.1 GB"
    card = smallest_card(needed)
    fits = f"fits cards from {card} GB" if card else f"more than a card of {CARDS[-1]} GB"
    return f"memory in {precision}", f"{amount}, {fits}{more}"


def room_of(card: int, reserve: float = RESERVE) -> float:
    """Return the bytes that a card of so many GiB has for a model."""
    return card * 2**30 - reserve


def smallest_card(needed: float) -> int | None:
    """Return the smallest card, in GiB, with room for so many bytes; None where none of `CARDS` has it."""
    return next((card for card in CARDS if needed <= room_of(card)), None)


def parts_of(config: BitDanceConfig, bits: float) -> tuple[int, int]:
    """Return bytes of the language model and projector (without the embedding, kept on the CPU), and of the head."""
    model = BitDance(config, device="meta")
    backbone = weight_bytes(model, "backbone.", bits) - weight_bytes(model, "backbone.embed_tokens.", bits)
    return backbone + weight_bytes(model, "projector.", bits), weight_bytes(model, "head.", bits)


def weight_bytes(model: nn.Module, prefix: str, bits: float) -> int:
    """Return the bytes of the parameters with a prefix, with `bits` per quantized weight."""
    return sum(
        int(weight.numel() * (_bits(name, bits) / 8 if weight.ndim == 2 and LAYERS.fullmatch(name) else 2))
        for name, weight in model.named_parameters()
        if name.startswith(prefix)
    )


def _bits(name: str, bits: float) -> float:
    return 8.0 if bits == 4.0 and SPARED.fullmatch(name) else bits


def grid_of(config: BitDanceConfig) -> Grid:
    """Return the grid of the model's default size."""
    height, width = config.defaults.default_size
    downscale = config.autoencoder.downscale
    return Grid(height // downscale, width // downscale, config.patch_size)


def drawing_of(config: BitDanceConfig, batch: int) -> int:
    """Return the bytes of drawing other than weights, with guidance, in bfloat16."""
    opening = 2 + config.tokens_per_patch
    lengths = [PROMPT + opening, UNCONDITIONAL + opening]
    return drawing_bytes(config, grid_of(config), lengths, batch, config.defaults.steps, 2)


def split(config: BitDanceConfig, bits: float, room: float) -> tuple[float, float] | None:
    """Return bytes of the language model that fit `room` beside the head, and those to stream; None: too small."""
    language_model, head = parts_of(config, bits)
    room -= head
    if language_model <= room:
        return language_model, 0.0
    # one layer is computed while the next is copied
    room -= 2 * language_model / config.backbone.num_layers
    return None if room < 0 else (room, language_model - room)
