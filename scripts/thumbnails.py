"""Make the workflows' thumbnails by running them: `.venv/bin/python scripts/thumbnails.py` (after scripts/demo.py).

With words, only workflows whose names have one of them: `scripts/thumbnails.py Inpaint Outpaint`.
"""

import io
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from comfyui import Server, comfy_cli, run_workflow
from environment import COMFYUI, ROOT, ensure_comfyui

HEIGHT, GAP = 256, 8  # pixels
# words instead of pictures, for models that are not in the pack
CARDS = {"BitDance 9 ImageNet": ("goldfish", "cock", "ostrich", "great white\nshark")}


def main() -> None:
    python = Path(sys.executable)
    with Server(python, ensure_comfyui(), COMFYUI / "demo", "--cpu") as server:
        for workflow in sorted((ROOT / "workflows").glob("*.json")):
            if sys.argv[1:] and not any(word in workflow.stem for word in sys.argv[1:]):
                continue
            if workflow.stem in CARDS:
                write(in_a_row([card(words) for words in CARDS[workflow.stem]]), workflow.with_suffix(".jpg"))
                continue
            done = comfy_cli(python, "--json", *run_workflow(workflow, server), capture_output=True, text=True)
            prompt_id = json.loads(done.stdout.strip().splitlines()[-1])["data"]["prompt_id"]
            files = server.images(server.wait(prompt_id))
            write(in_a_row([Image.open(io.BytesIO(file)) for file in files]), workflow.with_suffix(".jpg"))
            print(workflow.with_suffix(".jpg"))


def write(image: Image.Image, path: Path) -> None:
    image.save(path, "JPEG", quality=88)


def card(words: str) -> Image.Image:
    image = Image.new("RGB", (HEIGHT, HEIGHT), (70, 74, 84))
    middle = (HEIGHT // 2, HEIGHT // 2)
    font = ImageFont.load_default(34)
    ImageDraw.Draw(image).multiline_text(middle, words, "white", font, anchor="mm", align="center")
    return image


def in_a_row(images: list[Image.Image]) -> Image.Image:
    """Paste all pictures of a run side by side."""
    size = [(max(HEIGHT, image.width * HEIGHT // image.height), HEIGHT) for image in images]
    row = Image.new("RGB", (sum(width + GAP for width, _ in size) - GAP, HEIGHT), "white")
    left = 0
    for image, (width, height) in zip(images, size):
        row.paste(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), (left, 0))
        left += width + GAP
    return row


if __name__ == "__main__":
    main()
