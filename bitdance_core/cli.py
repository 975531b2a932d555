"""The command line: `python -m bitdance_core generate | batch | finetune | reconstruct | convert | download | info`."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .batch import run as batch
from .batch.jobs import PICTURE_LAYOUTS
from .bits import metrics
from .checkpoints import hub
from .checkpoints.checkpoint import ClassCheckpoint, TextCheckpoint, read_checkpoint
from .checkpoints.convert import OUTPUT_LAYOUTS, PRECISIONS, convert
from .checkpoints.files import write_whole
from .checkpoints.hub import DOWNLOADS
from .checkpoints.info import describe
from .checkpoints.locate import locate
from .checkpoints.lora_merge import Lora, check_loras
from .devices import COMPUTE_DTYPES, choose
from .errors import BitDanceError, MissingFileError, format_bytes, is_out_of_memory
from .pipeline import PIPELINES, load_pipeline, outline
from .sampling.editing import crop_to_tokens
from .sampling.flow import DEFAULT_SAMPLER, SAMPLERS
from .sampling.settings import Sampling, option_names
from .tokenizer import BinaryTokenizer, opened, to_images, to_pixels, to_rgb
from .training import command as finetuning

# the types of `Sampling`'s options -> argparse's type and number of values
OPTION_TYPES = {
    "int | None": (int, None), "float | None": (float, None), "float": (float, None), "str": (str, None),
    "tuple[float, float]": (float, 2),
}  # fmt: skip
PICTURE_FORMATS = (".png", ".webp", ".jpg", ".jpeg", ".bmp", ".tiff")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status. Bad input prints one line to standard error and returns 1."""
    prepare_streams()
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BitDanceError as error:
        print(f"bitdance: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read standard output is gone; Python flushes it once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        device = getattr(args, "device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
        advice = "draw fewer or smaller pictures at once" if device == "cpu" else "try --device cpu"
        print(f"bitdance: not enough memory on {device}; {advice}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bitdance: stopped", file=sys.stderr)
        return 130
    return 0


def prepare_streams() -> None:
    """Let standard output take every character, whatever its code page, and give progress bars a standard error."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.stderr is None:  # closed by the caller
        sys.stderr = open(os.devnull, "w", encoding="utf-8")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bitdance_core", description="Draw pictures with BitDance.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    drawing = commands.add_parser("generate", help="draw a prompt, or classes with an ImageNet model")
    drawing.add_argument("prompt", help='for an ImageNet model: classes by name or number, "golden retriever, 980"')
    drawing.add_argument(
        "-o", "--out", type=Path, default=Path("bitdance.png"), help="picture to write (default: %(default)s)"
    )
    drawing.add_argument(
        "--num-images", type=int, default=1, help="pictures to draw together, written as OUT_1, OUT_2, …"
    )
    add_drawing_options(drawing)
    drawing.set_defaults(run=generate)

    batching = commands.add_parser("batch", help="draw a file of prompts into a folder; run it again to resume")
    batching.add_argument(
        "prompts",
        type=Path,
        help='JSON lines, {"prompt": "a cat"} and optionally id, negative_prompt, height, width, steps, guidance, '
        "sampler, seed, num_images (ImageNet: labels); or a folder of .txt files, one prompt each",
    )
    batching.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="with several hosts: on a disk that they share"
    )
    batching.add_argument(
        "--layout",
        choices=PICTURE_LAYOUTS,
        default=PICTURE_LAYOUTS[0],
        help="flat: ID.png; geneval: ID/metadata.jsonl, ID/samples/0000.png, …; dpg: images/ID.png, four in a square "
        "(default: %(default)s)",
    )
    batching.add_argument(
        "--num-images", type=int, help="pictures per prompt, drawn together (default: 1; geneval, dpg: 4)"
    )
    batching.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="draw on the Ray cluster at ADDRESS or RAY_ADDRESS, else on a new one on this machine",
    )
    batching.add_argument("--workers", type=int, help="with --ray (default: one per GPU of the cluster, or one)")
    add_drawing_options(batching)
    batching.set_defaults(run=batch.run)

    finetuning.add_parser(commands)

    reconstructing = commands.add_parser("reconstruct", help="encode pictures to bits and decode them again")
    reconstructing.add_argument("image", nargs="+", type=Path)
    reconstructing.add_argument(
        "-o",
        "--out",
        type=Path,
        help="picture to write, or a folder for several (default: reconstructed.png, reconstructed)",
    )
    reconstructing.add_argument(
        "--model", default="builtin", help="a tokenizer file, a model folder, a hub id or a built-in name"
    )
    add_device_options(reconstructing)
    reconstructing.set_defaults(run=reconstruct)

    converting = commands.add_parser("convert", help="write a model in another layout or precision")
    converting.add_argument("source", nargs="+", help="a folder, a file, a set of files, a hub id or a built-in name")
    converting.add_argument("destination", type=Path, help="a folder; for single also a .safetensors file")
    converting.add_argument(
        "--format",
        choices=OUTPUT_LAYOUTS,
        required=True,
        help="official: the published folder; comfy: files in ComfyUI's folders below DESTINATION; single: one file",
    )
    converting.add_argument("--dtype", choices=PRECISIONS, default="keep", help="default: %(default)s")
    converting.add_argument("--name", help="name of the new files (default: the source's)")
    converting.add_argument("--tokenizer", help="tokenizer of an ImageNet model (default: in its file, or beside it)")
    converting.set_defaults(run=convert_model)

    downloading = commands.add_parser("download", help="download a published model")
    downloading.add_argument("name", choices=DOWNLOADS, metavar="NAME", help=", ".join(DOWNLOADS))
    downloading.add_argument("--to", type=Path, metavar="DIR", help="default: a new folder in the working folder")
    downloading.set_defaults(run=download_model)

    describing = commands.add_parser("info", help="describe a model file or folder")
    describing.add_argument("path", nargs="+", help="a path, the files of a set, or a built-in name")
    describing.set_defaults(run=info)
    return parser


def add_drawing_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the model and for the settings of a picture."""
    parser.add_argument(
        "--model", default="builtin", help="a folder, a file, a hub id or a built-in name (default: %(default)s)"
    )
    parser.add_argument("--tokenizer", help="a binary tokenizer in place of the model's own")
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="apply a LoRA file; strength 1 is as trained; repeatable",
    )
    parser.add_argument("--negative-prompt", help="the prompt to steer away from")
    parser.add_argument("--height", type=int, help="pixels (default: the model's own)")
    parser.add_argument("--width", type=int, help="pixels (default: the model's own)")
    parser.add_argument("--steps", type=int, help="head steps per patch (default: the model's own)")
    parser.add_argument("--guidance", type=float, help="1 or less draws without guidance (default: the model's own)")
    parser.add_argument("--sampler", choices=SAMPLERS, default=DEFAULT_SAMPLER, help="default: %(default)s")
    for option in dataclasses.fields(Sampling):
        if "help" in option.metadata:
            kind, count = OPTION_TYPES[option.type]
            name = "--" + option.name.replace("_", "-")
            parser.add_argument(name, type=kind, nargs=count, metavar="N", help=option.metadata["help"])
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--allow-untrained-size", action="store_true", help="try a size the model was not trained for")
    add_device_options(parser)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, … (default: the GPU if there is one)")
    parser.add_argument("--dtype", choices=COMPUTE_DTYPES, help="default: float32 on the CPU, bfloat16 elsewhere")


def generate(args: argparse.Namespace) -> None:
    check_output(args.out)
    checkpoint = read_checkpoint(locate(args.model), args.tokenizer and Path(args.tokenizer))
    arguments = subject_of(args, checkpoint)
    arguments |= {name: getattr(args, name) for name in ("steps", "guidance", "sampler", *option_names())}
    plain, loras = outline(checkpoint), [Lora.parse(text) for text in args.lora]
    check_loras(plain.model, loras)
    request, (device, dtype) = plain.check(**arguments, seed=args.seed), choose(args.device, args.dtype)
    plain.check_memory(request, device, dtype)
    pipe = load_pipeline(checkpoint, device, dtype, loras=loras)
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


def reconstruct(args: argparse.Namespace) -> None:
    targets = reconstruction_targets(args.image, args.out)
    for path in args.image:
        with opened(path):
            pass  # unreadable pictures are reported before any work
    check_apart(targets, args.image)
    if len(targets) > 1:
        make_folder(targets[0].parent)
    for target in targets:
        check_output(target)
    tokenizer = BinaryTokenizer.from_pretrained(args.model, args.device, COMPUTE_DTYPES.get(args.dtype))
    step = tokenizer.downscale
    least = math.ceil(metrics.SSIM_WINDOW / step) * step
    figures = []
    for path, target in zip(args.image, targets):
        with opened(path) as file:
            image = to_rgb(file)
        if image.width < least or image.height < least:
            raise BitDanceError(
                f"{path} is {image.height}x{image.width} (height x width), expected at least {least}x{least} pixels"
            )
        pixels = crop_to_tokens(to_pixels(image), step)
        bits = tokenizer.encode(pixels)
        (result,) = to_images(tokenizer.decode(bits))
        save(result, target)
        per_pixel = metrics.bits_per_pixel(tokenizer.channels, step)
        figures += metrics.measure((pixels + 1) / 2, (to_pixels(result) + 1) / 2, per_pixel)
        size = f"{result.height}x{result.width} (height x width)"
        count = f"{bits.numel()} bits ({math.ceil(bits.numel() / 8)} bytes)"
        print(f"{target}: {size}, {count}, {figures[-1]}", flush=True)
    if len(figures) > 1:
        print(f"mean of {len(figures)}: {metrics.mean(figures)}")


def reconstruction_targets(images: Sequence[Path], out: Path | None) -> list[Path]:
    """Return the file for each reconstruction: `out` itself for one image, files in the folder `out` for several."""
    if len(images) == 1:
        return [out or Path("reconstructed.png")]
    out = out or Path("reconstructed")
    if out.suffix.lower() in PICTURE_FORMATS:
        raise BitDanceError(f"--out '{out}' is one picture; for {len(images)} pictures give a folder")
    targets = [out / f"{image.stem}.png" for image in images]
    if len({target.name.casefold() for target in targets}) < len(targets):
        raise BitDanceError("two of the pictures have the same name, and would overwrite each other; rename one")
    return targets


def check_apart(targets: Sequence[Path], images: Sequence[Path]) -> None:
    """Raise BitDanceError if writing a target would overwrite a picture that is read, under whatever name or link."""
    for target in targets:
        if target.exists() and any(target.samefile(image) for image in images):
            raise BitDanceError(
                f"--out would overwrite the picture '{target}' itself; give another file, or another folder"
            )


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BitDanceError(f"the folder {folder} cannot be created ({error})") from error


def convert_model(args: argparse.Namespace) -> None:
    source = args.source[0] if len(args.source) == 1 else args.source
    with tqdm(unit="B", unit_scale=True, desc="converting") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        paths = convert(source, args.destination, args.format, args.dtype, args.name, args.tokenizer, show)
    for path in paths:
        print(f"{path} ({format_bytes(path.stat().st_size)})")


def download_model(args: argparse.Namespace) -> None:
    published = DOWNLOADS[args.name]
    folder = args.to or Path(published.folder(args.name))
    sizes = hub.remote_files(published.repository, published.files)
    for name, size in sizes.items():
        print(f"{format_bytes(size):>14}  {name}")
    print(f"{format_bytes(sum(sizes.values())):>14}  from {published.repository} to {folder}", flush=True)
    hub.check_space(sizes, folder)
    print(hub.fetch(published.repository, sizes, folder) / (published.loads or ""))


def info(args: argparse.Namespace) -> None:
    print(describe(locate(args.path[0] if len(args.path) == 1 else args.path, local_files_only=True)))


def check_output(path: Path) -> None:
    """Raise BitDanceError, before any work, for a path that cannot be written as a picture."""
    if path.suffix.lower() not in PICTURE_FORMATS:
        raise BitDanceError(f"'{path}' must end in a picture format: {', '.join(PICTURE_FORMATS)}")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise MissingFileError(f"the folder {folder} does not exist")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise BitDanceError(f"{path} cannot be written")


def save(image: Image.Image, path: Path) -> None:
    """Write a picture completely or not at all."""
    format = Image.registered_extensions()[path.suffix.lower()]
    write_whole(path, lambda file: image.save(file, format))


if __name__ == "__main__":
    sys.exit(main())
