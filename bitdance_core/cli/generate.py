"""`generate`: draw a prompt, or classes with an ImageNet model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..bits.grid import BitGrid, save_bits
from ..checkpoints.checkpoint import read_checkpoint
from ..checkpoints.fingerprint import files_of, fingerprint
from ..checkpoints.locate import locate
from ..checkpoints.lora_merge import Lora, check_loras
from ..errors import BitDanceError
from ..pipeline import Pipeline, load_pipeline, outline
from ..pipeline.loading import choose
from ..recipe import lora_names, make, model_stamp, public_name
from .editing import Start, add_editing_options, edit_arguments, read_start
from .options import DEFAULT_MODEL, add_drawing_options
from .pictures import check_apart, check_output, check_writable, save
from .repeat import check_model, fill


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
    drawing = commands.add_parser("generate", help="draw a prompt, or classes with an ImageNet model")
    drawing.add_argument(
        "prompt", nargs="?", help='for an ImageNet model: classes by name or number, "golden retriever, 980"'
    )
    drawing.add_argument(
        "-o", "--out", type=Path, default=Path("bitdance.png"), help="picture to write (default: %(default)s)"
    )
    drawing.add_argument(
        "--from",
        type=Path,
        dest="repeat",
        metavar="PICTURE",
        help="draw as this PNG file was drawn; an option given beside it wins",
    )
    drawing.add_argument("--save-bits", type=Path, metavar="FILE", help="write the bits too, to a .safetensors file")
    drawing.add_argument(
        "--num-images", type=int, help="pictures to draw together, written as OUT_1, OUT_2, … (default: 1)"
    )
    add_drawing_options(drawing)
    add_editing_options(drawing)
    drawing.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    check_output(args.out)
    check_bits_file(args.save_bits)
    expected = fill(args)
    if args.prompt is None:
        raise BitDanceError('give a prompt, such as "a large red star on a blue background", or a picture with --from')
    args.model = args.model or DEFAULT_MODEL
    checkpoint = read_checkpoint(locate(args.model), args.tokenizer and Path(args.tokenizer))
    found = fingerprint(files_of(checkpoint.components))
    check_model(args, expected, found)
    device, dtype = choose(args.device, args.dtype, False, args.quantize, args.offload)
    plain = outline(checkpoint, args.quantize, args.offload)
    check_options(args, plain)
    loras = [Lora.parse(text) for text in args.lora or ()]
    check_loras(plain.model, loras)
    start = read_start(args, plain)
    arguments = subject_of(args, plain, start) | plain.settings(vars(args))
    edit = edit_arguments(args, start, plain)
    stand_in = {} if start is None else {"init_bits": start.stand_in(plain.tokenizer.channels)}
    request = plain.check(**arguments, **edit, **stand_in)
    plain.check_memory(request, device, dtype)
    paths = picture_paths(args.out, request.num_images)
    check_apart(paths, files_read(args))
    pipe = load_pipeline(checkpoint, device, dtype, quantize=args.quantize, offload=args.offload, loras=loras)
    if start is not None:
        edit["init_bits"] = start.encode(pipe)
    output = pipe.generate(**arguments, **edit, progress=True)
    stamp = model_stamp(pipe.config.family, found, str(dtype).removeprefix("torch."), args.quantize, loras)
    made = make(arguments | named_files(args), args.model, args.tokenizer, stamp, str(device))
    for image, path in zip(output.images, paths):
        save(image, path, None if args.no_metadata else made)
    if args.save_bits is not None:
        save_bits(BitGrid.from_bits(output.bits, pipe.tokenizer.downscale, args.prompt), args.save_bits)
    print("\n".join(map(str, paths)))  # at last: a closed standard output must cost no picture


def picture_paths(out: Path, count: int) -> list[Path]:
    """Return the file of each picture: `out` itself for one, OUT_1, OUT_2, … for several."""
    return [out] if count == 1 else [out.with_stem(f"{out.stem}_{number}") for number in range(1, count + 1)]


def files_read(args: argparse.Namespace) -> list[Path]:
    """Return the pictures that the options name."""
    masks = [Path(mask) for _, mask in args.region or ()]
    return [path for path in (args.repeat, args.init, args.mask, *masks) if path is not None]


def check_options(args: argparse.Namespace, plain: Pipeline) -> None:
    """Raise BitDanceError for options that the model cannot follow."""
    if unused := ["--" + name.replace("_", "-") for name in plain.unused if getattr(args, name)]:
        raise BitDanceError(
            f"{args.model} is an ImageNet model, which draws classes in one size; leave {', '.join(unused)} out"
        )


def subject_of(args: argparse.Namespace, plain: Pipeline, start: Start | None) -> dict[str, Any]:
    """Return the arguments of `generate` that say what to draw. Raises BitDanceError for a size beside a picture's."""
    size, step = {"height": args.height, "width": args.width}, plain.tokenizer.downscale
    if start is not None:
        own = {name: tokens * step for name, tokens in zip(size, start.size)}
        if any(side not in (None, own[name]) for name, side in size.items()):
            found = f"{own['width']}x{own['height']} (width x height)"
            raise BitDanceError(f"the picture to start from makes one of {found}; leave --height and --width out")
        size = own
    count = (start.grid[0] if start and not plain.unused else 1) if args.num_images is None else args.num_images
    options = {"negative_prompt": args.negative_prompt, "allow_untrained_size": args.allow_untrained_size}
    return plain.subject(args.prompt, num_images=count, **size, **options)


def named_files(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the options say of an edit, for a recipe: its files by name."""
    named = {name: getattr(args, name) for name in ("denoise", "outpaint")}
    named |= {name: public_name(path) for name in ("init", "bits", "mask") if (path := getattr(args, name)) is not None}
    named["lora"] = lora_names([Lora.parse(text) for text in args.lora or ()])
    return named | {"region": args.region and [[prompt, public_name(mask)] for prompt, mask in args.region]}


def check_bits_file(path: Path | None) -> None:
    """Raise BitDanceError, before any work, for a path that cannot be written as a file of bits."""
    if path is None:
        return
    if path.suffix.lower() != ".safetensors":
        raise BitDanceError(f"--save-bits '{path}' must end in .safetensors")
    check_writable(path)
