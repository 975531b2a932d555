"""`generate`: draw a prompt, or classes with an ImageNet model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ..checkpoints.checkpoint import ClassCheckpoint, TextCheckpoint, read_checkpoint
from ..checkpoints.locate import locate
from ..devices import choose
from ..errors import BitDanceError
from ..pipeline import PIPELINES, load_pipeline, outline
from ..sampling.settings import option_names
from .options import add_drawing_options
from .pictures import check_output, save


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
    drawing = commands.add_parser("generate", help="draw a prompt, or classes with an ImageNet model")
    drawing.add_argument("prompt", help='for an ImageNet model: classes by name or number, "golden retriever, 980"')
    drawing.add_argument(
        "-o", "--out", type=Path, default=Path("bitdance.png"), help="picture to write (default: %(default)s)"
    )
    drawing.add_argument(
        "--num-images", type=int, default=1, help="pictures to draw together, written as OUT_1, OUT_2, …"
    )
    add_drawing_options(drawing)
    drawing.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    check_output(args.out)
    checkpoint = read_checkpoint(locate(args.model), args.tokenizer and Path(args.tokenizer))
    arguments = subject_of(args, checkpoint)
    arguments |= {name: getattr(args, name) for name in ("steps", "guidance", "sampler", *option_names())}
    plain = outline(checkpoint)
    request, (device, dtype) = plain.check(**arguments, seed=args.seed), choose(args.device, args.dtype)
    plain.check_memory(request, device, dtype)
    pipe = load_pipeline(checkpoint, device, dtype)
    bar = None

    def show(done: int, total: int, bits: Tensor) -> None:
        nonlocal bar
        if bar is None:  # not before the first patch: an error about settings must be the only output
            bar = tqdm(total=total, unit="patch", desc="drawing")
        bar.update()

    output = pipe.generate(**arguments, seed=args.seed, callback=show)
    bar.close()
    paths = [args.out.with_stem(f"{args.out.stem}_{number}") for number in range(1, len(output.images) + 1)]
    paths = [args.out] if len(paths) == 1 else paths
    for image, path in zip(output.images, paths):
        save(image, path)
    print("\n".join(map(str, paths)))  # at last: a closed standard output must cost no picture


def subject_of(args: argparse.Namespace, checkpoint: TextCheckpoint | ClassCheckpoint) -> dict[str, Any]:
    """Return the arguments of `generate` that say what to draw. Raises BitDanceError for options it cannot follow."""
    kind = PIPELINES[type(checkpoint)]
    if unused := ["--" + name.replace("_", "-") for name in kind.unused if getattr(args, name)]:
        raise BitDanceError(
            f"{args.model} is an ImageNet model, which draws classes in one size; leave {', '.join(unused)} out"
        )
    names = ("num_images", "height", "width", "negative_prompt", "allow_untrained_size")
    return outline(checkpoint).subject(args.prompt, **{name: getattr(args, name) for name in names})
