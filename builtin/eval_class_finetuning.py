"""Measure fine-tuning of a class-conditional model: does it learn a class that it never knew, and keep the others?

    python -m builtin.eval_class_finetuning --run runs/classes --sheet classes.png

No published class model can be had everywhere, and those of the tests have random weights. So this first trains the
smallest one that draws: four shapes, one class each, in one pair of colours, over the built-in tokenizer's bits. Then
`finetune` teaches it a fifth class from 60 pictures (further arguments go there). Pictures are read back by stencil.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from bitdance_core import BinaryTokenizer, ImageNetPipeline
from bitdance_core.checkpoints.locate import ASSETS
from bitdance_core.cli import main as command_line
from bitdance_core.model.class_config import ImageNetConfig
from bitdance_core.model.class_model import ImageNetModel
from bitdance_core.model.text_config import Defaults, HeadConfig
from bitdance_core.training.loss import Corruption, Draws, velocity_loss
from builtin.eval import contact_sheet
from builtin.pictures import SHAPES, Picture, draw, read

NEW_CLASS, NEW_SHAPE, TAUGHT = len(SHAPES), "diamond", 60
INK, GROUND, SIDE = "red", "white", 64
CONFIG = ImageNetConfig(
    family="shapes", num_classes=len(SHAPES) + 1, class_tokens=4, width=128, num_layers=3, intermediate_size=256,
    projection_size=128, tokens_per_patch=16, grid_side=8, downscale=8,
    head=HeadConfig(
        bits=32, cond_width=128, width=128, depth=3, num_modulations=1, swiglu=True, time_shift=1.0,
        tokens_per_patch=16, attends=True, squashes=False,
    ),
    defaults=Defaults((SIDE, SIDE), steps=25, guidance=3.0, trained_sizes=((SIDE, SIDE),), schedule="linear"),
)  # fmt: skip


def picture_of(shape: str) -> Picture:
    return Picture("large", INK, shape, GROUND)


def write_pictures(folder: Path, shape: str, count: int, seed: int) -> None:
    """Write pictures of a shape at random offsets."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels = draw(picture_of(shape), SIDE, SIDE, rng).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")


def train(file: Path, tokenizer: BinaryTokenizer, steps: int, batch: int = 16, each: int = 150) -> None:
    """Train a model of the four old classes from nothing, and write it with the published names."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    drawn = [draw(picture_of(shape), SIDE, SIDE, rng) for shape in SHAPES for _ in range(each)]
    pixels = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1
    bits = torch.cat([tokenizer.encode(part) for part in pixels.split(50)])
    labels = np.repeat(np.arange(len(SHAPES)), each)
    torch.manual_seed(0)  # initial weights only
    model = ImageNetModel(CONFIG)
    initialize(model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    corruption = Corruption(times=2)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
        chosen = rng.integers(len(labels), size=batch)
        tokens = model.grid.patchify(bits[chosen])
        draws = Draws.make(tokens.shape, corruption, CONFIG.head.time_shift, generator)
        loss, wrong = velocity_loss(model, labels[chosen].tolist(), CONFIG.null_class, tokens, model.grid, draws)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {loss:.3f}, wrong bits {wrong:.3f}", flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({published(name): shaped(name, p.detach()) for name, p in model.named_parameters()}, file)


def initialize(model: ImageNetModel) -> None:
    """Initialize a head that ignores its modulation and predicts 0 (Peebles & Xie 2023), and small embeddings."""
    for embedding in (model.cls_embedding, model.query_token, model.pos_for_diff):
        nn.init.normal_(embedding.weight, std=0.5)
    for linear in (*model.head.ada_ln_blocks, model.head.final_layer.ada_ln_modulation, model.head.final_layer.linear):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def published(name: str) -> str:
    return "query_token" if name == "query_token.weight" else name.replace("head.", "head.net.", 1)


def shaped(name: str, tensor: Tensor) -> Tensor:
    return tensor[None].clone() if name == "query_token.weight" else tensor


def measure(pipe: ImageNetPipeline, each: int) -> tuple[int, int, list[Image.Image]]:
    """Draw `each` pictures of every class; return how many of the new one and of the old ones are right, and a row."""
    shapes = (*SHAPES, NEW_SHAPE)
    right, row = [], []
    for label, shape in enumerate(shapes):
        images = [pipe.generate([label], seed=seed, steps=25, guidance=3.0).images[0] for seed in range(each)]
        right.append(sum(read(image, shapes) == picture_of(shape) for image in images))
        row += images[: 6 if label == NEW_CLASS else 2]
    return right[NEW_CLASS], sum(right[:NEW_CLASS]), row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/classes"), help="folder for pictures, model and LoRA")
    parser.add_argument("--train-steps", type=int, default=800, help="steps of the model before it is fine-tuned")
    parser.add_argument("--each", type=int, default=24, help="pictures to draw of each class")
    parser.add_argument("--sheet", type=Path, help="file for a contact sheet, before and after")
    args, options = parser.parse_known_args(argv)
    tokenizer, file = ASSETS / "builtin" / "ae.safetensors", args.run / "shapes.safetensors"
    if not file.exists():
        begun = time.process_time()
        train(file, BinaryTokenizer.from_pretrained("builtin", "cpu"), args.train_steps)
        print(f"the model: {time.process_time() - begun:.0f} s of one core", flush=True)
    pipe = ImageNetPipeline.from_pretrained(file, tokenizer, device="cpu")
    new, old, before = measure(pipe, args.each)
    print(f"before: new class {new}/{args.each}, old classes {old}/{args.each * len(SHAPES)}", flush=True)
    out = args.run / f"{NEW_SHAPE}.safetensors"
    if not out.exists():
        write_pictures(args.run / "data" / str(NEW_CLASS), NEW_SHAPE, TAUGHT, seed=1)
        begun = time.process_time()
        command = ["finetune", args.run / "data", "--model", file, "--tokenizer", tokenizer, "--out", out]
        if command_line([*map(str, command), "--device", "cpu", *options]):
            raise SystemExit(1)
        print(f"training: {time.process_time() - begun:.0f} s of one core", flush=True)
    pipe.add_lora(out)
    new, old, after = measure(pipe, args.each)
    print(f"after: new class {new}/{args.each}, old classes {old}/{args.each * len(SHAPES)}")
    if args.sheet:
        contact_sheet([*before, *after], columns=len(before)).save(args.sheet)


if __name__ == "__main__":
    main()
