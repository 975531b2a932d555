"""Fetch the drawings of Fluent Emoji (flat style, MIT) and rasterize them into one file; the only part that needs
`npm` and `resvg-py`. Another package of Iconify's has the same things in another style.

    python -m builtin.scenes.drawings runs/scenes/drawings.npz
    python -m builtin.scenes.drawings runs/scenes/noto.npz --package @iconify-json/noto
    python -m builtin.scenes.drawings runs/scenes/drawings.npz --icons package/icons.json
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from builtin.scenes.things import THINGS

PACKAGE = "@iconify-json/fluent-emoji-flat"
SIDE = 256  # pixels of a rasterized drawing
Art = dict[str, Image.Image]  # a thing's name -> its drawing, RGBA


def fetch_icons(package: str) -> dict:
    """The icons of an Iconify package, from npm."""
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(["npm", "pack", package], cwd=folder, capture_output=True, text=True, check=True)
        with tarfile.open(Path(folder) / run.stdout.split()[-1]) as archive:
            return json.load(archive.extractfile("package/icons.json"))


def rasterize(icons: dict, name: str, side: int = SIDE) -> Image.Image:
    """One drawing, RGBA, side x side pixels."""
    import resvg_py

    icon = icons["icons"][name]
    box = [icon.get(key, icons.get(key, 16)) for key in ("width", "height")]
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {box[0]} {box[1]}" width="{side}" height="{side}">{icon["body"]}</svg>'
    )
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")


def trim(drawing: Image.Image) -> Image.Image:
    """The drawing without its transparent margin, centred in a square, so that all things are equally large."""
    left, top, right, bottom = drawing.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
    side = max(right - left, bottom - top)
    square = Image.new("RGBA", (side, side))
    square.paste(drawing.crop((left, top, right, bottom)), ((side - right + left) // 2, (side - bottom + top) // 2))
    return square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def load_art(path: Path) -> Art:
    """What this script wrote."""
    with np.load(path) as file:
        return {name: Image.fromarray(file[name]) for name in file.files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("to", type=Path)
    parser.add_argument("--package", default=PACKAGE, help="of npm")
    parser.add_argument("--icons", type=Path, help="icons.json of the package (default: fetch it by npm)")
    args = parser.parse_args()
    icons = json.loads(args.icons.read_text()) if args.icons else fetch_icons(args.package)
    art = {thing.name: np.asarray(trim(rasterize(icons, thing.icon, 2 * SIDE))) for thing in THINGS}
    args.to.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.to, **art)
    print(f"{args.to}: {len(art)} drawings, {args.to.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
