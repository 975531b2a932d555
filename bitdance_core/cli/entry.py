"""Read the command line, run one command, and turn what goes wrong into one line and an exit status."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

import torch

from ..errors import BitDanceError, is_out_of_memory
from ..pipeline.text import UnseenWords
from ..training import command as finetune
from ..training import tokenizer_command as finetune_tokenizer
from ..version import __version__
from . import batch, generate, models, reconstruct

# in the order of the help
COMMANDS = (
    generate.add_to, batch.add_to, finetune.add_parser, finetune_tokenizer.add_parser, reconstruct.add_to,
    *models.COMMANDS,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status. Bad input prints one line to standard error and returns 1."""
    prepare_streams()
    args = build_parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
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


def show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_) -> None:
    """Print ours as one line, as errors are; others as Python does."""
    ours = issubclass(category, UnseenWords)
    text = f"bitdance: {message}\n" if ours else warnings.formatwarning(message, category, filename, lineno)
    sys.stderr.write(text)


def prepare_streams() -> None:
    """Let standard output take every character, whatever its code page, and give progress bars a standard error."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.stderr is None:  # closed by the caller
        sys.stderr = open(os.devnull, "w", encoding="utf-8")


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of all commands; each sets `run`, a function of the parsed arguments."""
    parser = argparse.ArgumentParser(prog="python -m bitdance_core", description="Draw pictures with BitDance.")
    parser.add_argument("--version", action="version", version=f"bitdance {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add_to in COMMANDS:
        add_to(commands)
    return parser
