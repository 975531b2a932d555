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
    import torch  # noqa: F401
except ImportError:  # outside the environment that the demo and the tests run in
    sys.exit(run(ensure_all()[0], "-m", "benchmarks.memory_table", *sys.argv[1:]))

from bitdance_core.cards import CARDS, GB, PRECISIONS, drawing_of, grid_of, parts_of, room_of, split, weight_bytes
from bitdance_core.model.tokenizer_network import BinaryAutoencoder
from bitdance_core.sampling.memory import decoding_bytes

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
    print(f"{config.family}, {width}x{height} (width x height), batch {args.batch}, in GB (1e9 bytes)\n")
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
            found = split(config, bits, room_of(card, args.reserve * GB) - drawing)
            if found is None:
                cells.append("too small")
            else:
                seconds = (grid.num_patches + 1) * found[1] / GB / args.bus
                cells.append(f"{found[0] / GB:.1f} + {found[1] / GB:.1f}" + (f", {seconds:.0f} s" if seconds else ""))
        print(f"| {card} GB | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
