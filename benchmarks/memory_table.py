"""Compute the part of a model that fits a card, and the part to stream: from the configuration, not measured.

python -m benchmarks.memory_table                        # BitDance-14B-64x, one 1024x1024 picture
python -m benchmarks.memory_table --model bitdance-14b-16x --batch 4

The head runs at every step, so it stays on the card. As much of the language model as fits stays too; the rest is
copied over the bus once per patch. Drawing and decoding are counted separately, as they do not overlap.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bitdance_core.model.text_config import PUBLISHED_CONFIGS
from scripts.environment import ensure_all, run

try:
    import torch
except ImportError:  # outside the environment that the demo and the tests run in
    sys.exit(run(ensure_all()[0], "-m", "benchmarks.memory_table", *sys.argv[1:]))

from bitdance_core.checkpoints.load import LAYERS
from bitdance_core.checkpoints.quantization import FORMATS
from bitdance_core.model.grid import Grid
from bitdance_core.model.text_config import BitDanceConfig
from bitdance_core.model.text_model import BitDance
from bitdance_core.model.tokenizer_network import BinaryAutoencoder
from bitdance_core.sampling.memory import decoding_bytes, drawing_bytes

GB = 1e9
# bits per weight of a layer's matrix, scales included; all other weights are bfloat16. 4 bits of convrot_w4a4 with a
# scale a row, but 8 of the layers that it spares
PRECISIONS = {"bf16": 16.0, "fp8 or int8": 8.0, "nvfp4, asym_w4a8_int8": 4.5, "convrot_w4a4": 4.0}
SPARED = FORMATS["convrot_w4a4"].spares
CARDS = (8, 12, 16, 24, 48)  # GiB, sold as GB
PROMPT, UNCONDITIONAL = 64, 4  # tokens of a prompt of about 50 words in its template, and of the empty template
TILE = 512  # side of a tile of VAE Decode (Tiled), in pixels


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = {config.family: config for config in PUBLISHED_CONFIGS}
    parser.add_argument("--model", choices=models, default=next(iter(models)), help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=1, help="pictures drawn at once (default: %(default)s)")
    parser.add_argument("--bus", type=float, default=22.0, help="GB/s to the card (default: %(default)s, PCIe 4.0 x16)")
    parser.add_argument("--reserve", type=float, default=1.5, help="GB used by other programs (default: %(default)s)")
    args = parser.parse_args(argv)
    config = models[args.model]
    height, width = config.defaults.default_size
    grid = grid_of(config)
    drawing = drawing_of(config, args.batch)
    decoder = weight_bytes(BinaryAutoencoder(config.autoencoder, device="meta"), "", 16)
    print(f"{config.family}, {height}x{width} (height x width), batch {args.batch}, in GB (1e9 bytes)\n")
    print("| weights as | language model | head | drawing: cache, activations | in all |")
    print("| --- | --- | --- | --- | --- |")
    for name, bits in PRECISIONS.items():
        language_model, head = parts_of(config, bits)
        sizes = language_model, head, drawing, language_model + head + drawing
        print(f"| {name} | {' | '.join(f'{size / GB:.1f}' for size in sizes)} |")
    whole, tile = (decoding_bytes(config.autoencoder, *size, 2) for size in ((height, width), (TILE, TILE)))
    print(
        f"\nDecoding, with the tokenizer: {(decoder + whole) / GB:.1f}; in tiles of {TILE}: {(decoder + tile) / GB:.1f}"
    )
    print("\nLanguage model on the card + streamed per patch, and the minimum time of streaming:")
    print(f"{grid.num_patches} patches and the prompt at {args.bus:g} GB/s\n")
    print(f"| card | {' | '.join(PRECISIONS)} |\n| --- |{' --- |' * len(PRECISIONS)}")
    for card in CARDS:
        cells = []
        for bits in PRECISIONS.values():
            found = split(config, bits, card * 2**30 - args.reserve * GB - drawing)
            if found is None:
                cells.append("too small")
            else:
                seconds = (grid.num_patches + 1) * found[1] / GB / args.bus
                cells.append(f"{found[0] / GB:.1f} + {found[1] / GB:.1f}" + (f", {seconds:.0f} s" if seconds else ""))
        print(f"| {card} GB | {' | '.join(cells)} |")


def parts_of(config: BitDanceConfig, bits: float) -> tuple[int, int]:
    """Return bytes of the language model and projector (without the embedding, kept on the CPU), and of the head."""
    model = BitDance(config, device="meta")
    backbone = weight_bytes(model, "backbone.", bits) - weight_bytes(model, "backbone.embed_tokens.", bits)
    return backbone + weight_bytes(model, "projector.", bits), weight_bytes(model, "head.", bits)


def weight_bytes(model: torch.nn.Module, prefix: str, bits: float) -> int:
    """Return the bytes of the parameters with a prefix, with `bits` per quantized weight."""
    return sum(
        int(weight.numel() * (_bits(name, bits) / 8 if weight.ndim == 2 and LAYERS.fullmatch(name) else 2))
        for name, weight in model.named_parameters()
        if name.startswith(prefix)
    )


def _bits(name: str, bits: float) -> float:
    return 8.0 if bits == 4.0 and SPARED.fullmatch(name) else bits


def grid_of(config: BitDanceConfig) -> Grid:
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


if __name__ == "__main__":
    main()
