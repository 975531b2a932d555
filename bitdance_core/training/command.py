"""The command `finetune`: its options, its checks before any weight is read, and a run from data to file."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
from importlib import import_module
from pathlib import Path
from types import ModuleType

from .. import devices
from ..checkpoints.checkpoint import ClassCheckpoint, TextCheckpoint, read_checkpoint
from ..checkpoints.fingerprint import files_of, fingerprint
from ..checkpoints.locate import locate
from ..errors import BitDanceError, MissingFileError, whole_number
from ..pipeline import outline
from .data import DataSet, Subjects, read_data
from .encoded import FITS, BitsFolder
from .others import common_words
from .run_folder import RunFolder
from .settings import ADAPTERS, OPTIMIZERS, QUANTIZED, TARGETS, WHOLE, Settings, defaults_for

CACHE = ".bitdance-bits"  # in the folder of the pictures


def add_parser(commands) -> None:
    """Add `finetune` to the commands of a parser."""
    parser = commands.add_parser("finetune", help="train a LoRA, or all weights, on a folder of pictures")
    parser.add_argument(
        "data", type=Path, help="pictures with .txt captions beside them, or with metadata.jsonl; for an ImageNet "
        "model, folders named by classes"
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the LoRA to write, .safetensors; with --full a folder"
    )
    parser.add_argument("--model", default="builtin", help="a folder, a file, a hub id or a built-in name")
    parser.add_argument("--tokenizer", help="a binary tokenizer in place of the model's own")
    own = add_run_options(parser)
    parser.add_argument("--times", type=int, metavar="N", help=f"use each patch at N times of the flow ({own})")
    parser.add_argument("--drop", type=float, default=0.1, help="share of pictures without caption (default: 0.1)")
    parser.add_argument(
        "--keep", type=float, default=0.3, help="share of pictures that teach what stays as it is (default: 0.3)"
    )
    parser.add_argument("--adapter", choices=ADAPTERS, default="lora", help="default: %(default)s")
    parser.add_argument("--rank", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--alpha", type=float, help="alpha / rank scales the change (default: the rank)")
    parser.add_argument("--targets", choices=TARGETS, help=f"the layers that learn ({own})")
    parser.add_argument("--full", action="store_true", help="train all weights and write a model")
    parser.add_argument("--quantize", choices=QUANTIZED, default="none", help="keep frozen weights in 8 bits")
    parser.add_argument("--checkpoint-layers", action="store_true", help="less memory, a third more time")
    parser.add_argument("--fit", choices=FITS, default="crop", help="how pictures come to a trained size: %(choices)s")
    parser.add_argument("--cache", type=Path, metavar="DIR", help=f"for encoded pictures (default: DATA/{CACHE})")
    parser.add_argument(
        "--sample", action="append", default=[], metavar="PROMPT", help="draw it on the way; repeatable"
    )
    parser.set_defaults(run=finetune)


def add_run_options(parser: argparse.ArgumentParser) -> str:
    """Add what every training has; return how its help names a default that depends on the model."""
    own = "default: by model"
    parser.add_argument("--check", action="store_true", help="say what would be trained, and train nothing")
    parser.add_argument("--resume", action="store_true", help="go on with a stopped run")
    parser.add_argument("--steps", type=int, help=own)
    parser.add_argument("--batch", type=int, help=f"pictures of a step, on all GPUs together ({own})")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="split a step's pictures into N passes")
    parser.add_argument("--lr", type=float, help=f"learning rate ({own})")
    parser.add_argument("--warmup", type=int, help=f"steps in which the learning rate rises ({own})")
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="adamw", help="adamw8bit: less memory, by bitsandbytes"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same file (default: 0)")
    parser.add_argument("--flip", action="store_true", help="mirror every second picture, at random")
    parser.add_argument("--save-every", type=int, default=50, metavar="N", help="steps that a crash can cost at most")
    parser.add_argument("--sample-every", type=int, metavar="N", help="steps between samples (default: a fifth of all)")
    parser.add_argument("--log-with", choices=("tensorboard",), help="log there too")
    parser.add_argument("--device", help="cpu, cuda, … (default: the GPU if there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on the CPU, else bfloat16")
    return own


def check_intervals(args: argparse.Namespace) -> None:
    """Raise BitDanceError for numbers of steps that are none."""
    for name in ("save_every", "sample_every"):
        if getattr(args, name) is not None:
            whole_number(f"--{name.replace('_', '-')}", getattr(args, name), least=1)


def finetune(args: argparse.Namespace) -> None:
    """Run the command. Raises BitDanceError for anything that would stop it later, before weights are read."""
    check_intervals(args)
    if not args.check:
        check_out(args.out, args.full)
        model_run = import_part("model_run", "finetune")
    checkpoint = read_checkpoint(locate(args.model), args.tokenizer and Path(args.tokenizer))
    device, dtype = devices.choose(args.device, args.dtype)
    settings_of(args, checkpoint, dtype, 1)  # bad options are reported before pictures are read
    plain = outline(checkpoint)
    for prompt in args.sample:
        plain.check(**plain.subject(prompt, num_images=1))
    subjects = Subjects(checkpoint.config, checkpoint.prompts)
    stamp = f"{fingerprint(checkpoint.tokenizer.component.files)} {dtype}"
    bits = BitsFolder(args.cache or args.data / CACHE, checkpoint.tokenizer.config, stamp, args.fit)
    data = read_data(args.data, subjects, bits.has)
    settings = settings_of(args, checkpoint, dtype, len(data.examples))
    if args.check:
        print(report(data, checkpoint, settings))
        return
    stamps = {"model": fingerprint(files_of(checkpoint.components)), "pictures": stamp_of(data)}
    folder = RunFolder(args.out.absolute(), settings, stamps)
    model_run.ModelRun(args, settings, data, folder, device, dtype, checkpoint, subjects, bits).start()


def settings_of(
    args: argparse.Namespace, checkpoint: TextCheckpoint | ClassCheckpoint, dtype: object, pictures: int
) -> Settings:
    """Resolve the options: given ones, else the model's. Raises BitDanceError for values that no run can have."""
    defaults = defaults_for(checkpoint.config, args.full, pictures)
    names = [field.name for field in dataclasses.fields(Settings) if field.name not in ("alpha", "dtype")]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    given |= {"adapter": WHOLE} if args.full else {}
    alpha = float(args.rank) if args.alpha is None else args.alpha
    settings = Settings(**{**defaults, **given}, alpha=alpha, dtype=str(dtype).removeprefix("torch."))
    settings.check()
    return settings


def check_out(out: Path | None, is_whole: bool) -> None:
    """Raise BitDanceError, before any work, for an --out that cannot be written."""
    if out is None:
        raise BitDanceError("--out is missing: give the file to write, such as --out my_style.safetensors")
    if is_whole and out.suffix == ".safetensors" or not is_whole and out.suffix != ".safetensors":
        wanted = "a folder for the model" if is_whole else "a file that ends in .safetensors"
        raise BitDanceError(f"--out must be {wanted}, found '{out}'")
    folder = out.absolute().parent
    if not folder.is_dir():
        raise MissingFileError(f"the folder {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise BitDanceError(f"{out} cannot be written")


def import_part(name: str, command: str) -> ModuleType:
    """Import a module that needs PEFT or accelerate. Raises BitDanceError if they are not installed."""
    try:
        return import_module(f".{name}", __package__)
    except ModuleNotFoundError as error:
        if error.name not in ("peft", "accelerate"):
            raise
        raise BitDanceError(f"{command} needs {error.name}, which is missing: pip install peft accelerate") from error


def stamp_of(data: DataSet) -> str:
    """Hash the contents of the usable pictures, their captions and sizes."""
    digest = hashlib.sha256()
    for example in data.examples:
        content = hashlib.sha256(example.path.read_bytes()).hexdigest()
        digest.update(json.dumps([content, example.words, example.size]).encode())
    return digest.hexdigest()[:16]


def report(data: DataSet, checkpoint: TextCheckpoint | ClassCheckpoint, settings: Settings) -> str:
    """Describe what would be trained, for --check."""
    buckets = ", ".join(f"{len(examples)} of {w}x{h}" for (h, w), examples in data.buckets().items())
    looks = settings.steps * settings.batch / len(data.examples)
    kind = "all weights" if settings.adapter == WHOLE else f"{settings.adapter} of rank {settings.rank}"
    lines = [
        f"model: {checkpoint.config.family}",
        f"pictures: {len(data.examples)} ({buckets}; width x height)",
        f"first: {data.examples[0].path.name}: {data.examples[0].words}",
        f"words: {' '.join(common_words(data))}",
        f"training: {kind}, {settings.steps} steps of {settings.batch}, so {looks:.0f} looks at each picture, "
        f"learning rate {settings.lr:g}",
        *data.lines_of_left_out(),
    ]
    return "\n".join(lines)
