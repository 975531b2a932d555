"""Encode scenes to bits once: what the model is trained on. One file holds scenes of all sizes.

    R=runs/scenes
    python -m builtin.scenes.cache $R/drawings.npz --tokenizer $R/tokenizer128 --to $R/cache --scenes 48000

Further files (--first 48000) make a larger set; the trainer reads all that the folder has.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bitdance_core.model.binarize import pack, unpack
from bitdance_core.model.tokenizer_config import AutoencoderConfig
from bitdance_core.model.tokenizer_network import BinaryAutoencoder
from builtin.scenes.batches import ahead, paint_batch, sizes_of, to_signed
from builtin.scenes.compose import Composer, Scene, random_scene
from builtin.scenes.drawings import load_art
from builtin.scenes.loop import step_rng

STAGE = 2  # of a run's randomness
BATCH = 32
SHARES = (0.7, 0.15, 0.15)  # of the sizes


def load_tokenizer(folder: Path, device: str = "cpu") -> BinaryAutoencoder:
    """The averaged weights of a tokenizer's run, in float32."""
    weights = {name: value.float() for name, value in load_file(folder / "ae.safetensors").items()}
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    model = BinaryAutoencoder(AutoencoderConfig.from_shapes(shapes, str(folder)), nn, device="meta")
    model.load_state_dict(weights, assign=True)
    return model.to(device).requires_grad_(False).eval()


class Cache:
    """Captions and bits of a folder's scenes, by size."""

    def __init__(self, folder: Path) -> None:
        """Raises FileNotFoundError for a folder without any."""
        parts: dict[tuple[int, int], list] = {}
        for path in sorted(folder.glob("scenes-*.npz")):
            with np.load(path) as file:
                self.bits_per_token = int(file["bits_per_token"])
                for name in (n for n in file.files if n.startswith("bits_") and "x" in n):
                    grid = tuple(int(side) for side in name.removeprefix("bits_").split("x"))
                    parts.setdefault(grid, []).append((file[name], file["captions" + name[4:]]))
        if not parts:
            raise FileNotFoundError(f"{folder} has no scenes-*.npz; make one by cache.py")
        self.packed = {grid: np.concatenate([bits for bits, _ in found]) for grid, found in parts.items()}
        self.captions = {grid: np.concatenate([texts for _, texts in found]) for grid, found in parts.items()}
        self.grids = list(self.packed)
        counts = np.array([len(self.packed[grid]) for grid in self.grids], dtype=float)
        self.shares = counts / counts.sum()

    def batch(self, count: int, rng: np.random.Generator) -> tuple[tuple[int, int], list[str], Tensor]:
        """A grid (height, width in tokens), captions, and bits [B, C, h, w] as +-1; fewer where the grid is larger."""
        grid = self.grids[rng.choice(len(self.grids), p=self.shares)]
        smallest = min(height * width for height, width in self.grids)
        rows = rng.integers(len(self.packed[grid]), size=max(1, count * smallest // (grid[0] * grid[1])))
        packed = torch.from_numpy(self.packed[grid][rows])
        bits = unpack(packed, (self.bits_per_token, *grid)).float() * 2 - 1
        return grid, [str(text) for text in self.captions[grid][rows]], bits


def write_cache(
    path: Path, encode, composer: Composer, side: int, scenes: int, first: int, device: str = "cpu"
) -> None:
    """`scenes` scenes from number `first` on, in one file; `encode` takes pixels in [-1, 1]."""
    found: dict[tuple[int, int], tuple[list, list]] = {}

    def make(batch: int) -> tuple[list[Scene], Tensor]:
        rng = step_rng(0, STAGE, first // BATCH + batch)[0]
        size = sizes_of(side)[rng.choice(3, p=SHARES)]
        chosen = [random_scene(rng) for _ in range(BATCH)]
        return chosen, paint_batch(composer, chosen, size)

    get, begun = ahead(make, workers=2), time.time()
    count = scenes // BATCH
    for batch in range(count):
        chosen, pixels = get(batch)
        bits = encode(to_signed(pixels).to(device)) > 0
        packed, captions = found.setdefault(tuple(bits.shape[2:]), ([], []))
        packed.append(pack(bits).numpy())
        captions += [scene.caption for scene in chosen]
        if (batch + 1) % 20 == 0 or batch + 1 == count:
            print(f"{(batch + 1) * BATCH} scenes, {time.time() - begun:.0f} s", flush=True)
    arrays = {"bits_per_token": np.array(bits.shape[1])}
    for (height, width), (packed, captions) in found.items():
        arrays[f"bits_{height}x{width}"] = np.concatenate(packed)
        arrays[f"captions_{height}x{width}"] = np.array(captions)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npz")
    np.savez_compressed(part, **arrays)
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drawings", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with ae.safetensors")
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=48000)
    parser.add_argument("--first", type=int, default=0, help="number of the first scene")
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    model = load_tokenizer(args.tokenizer, args.device)
    composer = Composer(load_art(args.drawings))
    path = args.to / f"scenes-{args.first:07d}.npz"
    with torch.no_grad():
        encode = torch.compile(model.encoder, dynamic=False)
        write_cache(path, encode, composer, args.side, args.scenes, args.first, args.device)


if __name__ == "__main__":
    main()
