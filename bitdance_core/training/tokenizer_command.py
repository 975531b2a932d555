"""The command `finetune-tokenizer`: its options, and its checks before any weight is read."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from .. import devices
from ..checkpoints.fingerprint import fingerprint
from ..checkpoints.layouts import TOKENIZER_FILES
from ..checkpoints.locate import locate
from ..checkpoints.tokenizer_files import TokenizerCheckpoint, read_tokenizer
from ..errors import BitDanceError
from .command import add_run_options, check_intervals, check_out, import_part, stamp_of
from .data import DataSet, Pictures, read_data
from .perceptual import NETWORKS, Lpips
from .run_folder import RunFolder
from .settings import TokenizerSettings, tokenizer_defaults
from .whole import has_plain_weights

ENCODER_TERMS = {"commitment": 0.02, "entropy": 0.02}  # and their weights, where the encoder is trained


def add_parser(commands) -> None:
    """Add `finetune-tokenizer` to the commands of a parser."""
    parser = commands.add_parser("finetune-tokenizer", help="train a binary tokenizer on a folder of pictures")
    parser.add_argument("data", type=Path, help="pictures, in subfolders too; captions are not needed")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the tokenizer to write, .safetensors")
    parser.add_argument(
        "--model", default="builtin", help="a tokenizer file, a model folder, a hub id or a built-in name"
    )
    parser.add_argument(
        "--decoder-only", action=argparse.BooleanOptionalAction, default=True,
        help="train the decoder only, so that all bits keep their meaning (default); or the encoder too",
    )  # fmt: skip
    own = add_run_options(parser)
    parser.add_argument("--size", type=int, help=f"side of the squares that pictures are cut to, in pixels ({own})")
    parser.add_argument(
        "--wrong-bits", type=float, default=0.0, metavar="SHARE",
        help="flip up to this share of a picture's bits, for a decoder that bears a sampler's mistakes (default: 0)",
    )  # fmt: skip
    parser.add_argument("--l1", type=float, default=1.0, help="weight of the mean absolute error (default: 1)")
    parser.add_argument("--mse", type=float, default=1.0, help="weight of the mean squared error (default: 1)")
    parser.add_argument(
        "--perceptual", type=float, default=0.0,
        help="weight of LPIPS, by torchmetrics; downloads its network's weights once (default: 0, without)",
    )  # fmt: skip
    sizes = ", ".join(f"{name} ({size})" for name, (_, size) in NETWORKS.items())
    parser.add_argument("--perceptual-net", choices=NETWORKS, help=f"the network of LPIPS: {sizes}; default: vgg")
    for term, weight in ENCODER_TERMS.items():
        help = f"weight of the encoder's {term} term, with --no-decoder-only (default: {weight})"
        parser.add_argument(f"--{term}", type=float, help=help)
    parser.set_defaults(run=finetune_tokenizer)


def finetune_tokenizer(args: argparse.Namespace) -> None:
    """Run the command. Raises BitDanceError for anything that would stop it later, before weights are read."""
    check_intervals(args)
    if not args.check:
        check_out(args.out, False)
        run = import_part("tokenizer_run", "finetune-tokenizer")
    checkpoint = read_tokenizer(locate(args.model, TOKENIZER_FILES))
    check_trainable(checkpoint)
    device, dtype = devices.choose(args.device, args.dtype)
    settings = settings_of(args, checkpoint, str(dtype).removeprefix("torch."))
    data = read_data(args.data, Pictures(settings.size))
    if args.check:
        print(report(data, checkpoint, settings))
        return
    perceptual = Lpips(settings.perceptual_net) if settings.perceptual else None
    stamps = {"model": fingerprint(checkpoint.component.files), "pictures": stamp_of(data)}
    folder = RunFolder(args.out.absolute(), settings, stamps)
    run.TokenizerRun(args, settings, data, folder, device, dtype, checkpoint, perceptual).start()


def check_trainable(checkpoint: TokenizerCheckpoint) -> None:
    """Raise BitDanceError for a tokenizer that cannot be trained."""
    if checkpoint.config.gan_decoder or checkpoint.config.attention is not None:
        kind = "a UniWeTok" if checkpoint.config.attention is not None else "a tokenizer with a GAN decoder"
        raise BitDanceError(
            f"{checkpoint.path} is {kind}, which learns only against a discriminator, and none was published; "
            "finetune-tokenizer trains plain ones, such as ae_d16c32"
        )
    if not has_plain_weights([checkpoint.component]):
        raise BitDanceError(f"{checkpoint.path} has quantized weights, which cannot be trained; give the plain file")


def settings_of(args: argparse.Namespace, checkpoint: TokenizerCheckpoint, dtype: str) -> TokenizerSettings:
    """Resolve the options: given ones, else the tokenizer's. Raises BitDanceError for values that no run can have."""
    given = {term: getattr(args, term) for term in ENCODER_TERMS if getattr(args, term) is not None}
    if args.decoder_only and given:
        raise BitDanceError(f"--{[*given][0]} acts on the encoder; add --no-decoder-only, or leave it out")
    if args.perceptual_net is not None and not args.perceptual:
        raise BitDanceError(f"--perceptual-net {args.perceptual_net} needs a weight: add --perceptual 0.1")
    names = [field.name for field in dataclasses.fields(TokenizerSettings) if field.name not in ("dtype",)]
    values = tokenizer_defaults(checkpoint.config) | ({} if args.decoder_only else ENCODER_TERMS)
    values |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    settings = TokenizerSettings(**values, dtype=dtype)
    settings.check()
    step = checkpoint.config.downscale
    if settings.size < 1 or settings.size % step:
        raise BitDanceError(f"--size must be a multiple of {step} for this tokenizer, found {settings.size}")
    return settings


def report(data: DataSet, checkpoint: TokenizerCheckpoint, settings: TokenizerSettings) -> str:
    """Describe what would be trained, for --check."""
    what = "the decoder; bits keep their meaning" if settings.decoder_only else "encoder and decoder; bits change"
    looks = settings.steps * settings.batch / len(data.examples)
    lines = [
        f"tokenizer: {checkpoint.config.bits} bits for {checkpoint.config.downscale}x{checkpoint.config.downscale} "
        "pixels",
        f"pictures: {len(data.examples)}, cut to {settings.size}x{settings.size}",
        f"training: {what}; {settings.steps} steps of {settings.batch}, so {looks:.0f} looks at each picture, "
        f"learning rate {settings.lr:g}",
        *data.lines_of_left_out(),
    ]
    return "\n".join(lines)
