"""Options that several commands share: the model, the settings of a picture, the device."""

from __future__ import annotations

import argparse
import dataclasses

from ..devices import COMPUTE_DTYPES
from ..pipeline.loading import QUANTIZE
from ..sampling.flow import DEFAULT_SAMPLER, SAMPLERS
from ..sampling.settings import Sampling

DEFAULT_MODEL = "builtin"
# the types of `Sampling`'s options -> argparse's type and number of values
OPTION_TYPES = {
    "int | None": (int, None), "float | None": (float, None), "float": (float, None), "str": (str, None),
    "tuple[float, float]": (float, 2),
}  # fmt: skip


def add_drawing_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the model and for the settings of a picture; one that is not given is None.

    `Pipeline.settings` and `Pipeline.subject` know the defaults.
    """
    parser.add_argument("--model", help=f"a folder, a file, a hub id or a built-in name (default: {DEFAULT_MODEL})")
    parser.add_argument("--tokenizer", help="a binary tokenizer in place of the model's own")
    parser.add_argument(
        "--lora",
        action="append",
        metavar="FILE[:STRENGTH]",
        help="apply a LoRA file; strength 1 is as trained; repeatable",
    )
    parser.add_argument("--negative-prompt", help="the prompt to steer away from")
    parser.add_argument("--height", type=int, help="pixels (default: the model's own)")
    parser.add_argument("--width", type=int, help="pixels (default: the model's own)")
    parser.add_argument("--steps", type=int, help="head steps per patch (default: the model's own)")
    parser.add_argument("--guidance", type=float, help="1 or less draws without guidance (default: the model's own)")
    parser.add_argument("--sampler", choices=SAMPLERS, help=f"default: {DEFAULT_SAMPLER}")
    for option in dataclasses.fields(Sampling):
        if "help" in option.metadata:
            kind, count = OPTION_TYPES[option.type]
            name = "--" + option.name.replace("_", "-")
            parser.add_argument(name, type=kind, nargs=count, metavar="N", help=option.metadata["help"])
    parser.add_argument("--seed", type=int, help="default: 0")
    parser.add_argument("--allow-untrained-size", action="store_true", help="try a size the model was not trained for")
    parser.add_argument("--quantize", choices=QUANTIZE, help="store the layers' weights in one byte each")
    parser.add_argument(
        "--offload", action="store_true", help="stream the language model from system memory to the GPU"
    )
    parser.add_argument(
        "--no-metadata",
        action="store_true",
        help="write PNG files without prompt, seed, model and settings (other formats never carry them)",
    )
    add_device_options(parser)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, … (default: the GPU if there is one)")
    parser.add_argument("--dtype", choices=COMPUTE_DTYPES, help="default: float32 on the CPU, bfloat16 elsewhere")
