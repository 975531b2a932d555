"""`generate --from PICTURE`: settings that a picture was drawn with, where no option says otherwise."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from .. import recipe
from ..checkpoints.hub import HUB_ID
from ..checkpoints.locate import builtin_models
from ..devices import COMPUTE_DTYPES
from ..errors import BitDanceError
from ..tokenizer import opened

FILES = ("init", "bits", "mask", "region", "lora")  # options that name files, which a recipe does not hold


def fill(args: argparse.Namespace) -> str | None:
    """Complete the options with the recipe of the picture `args.repeat`; return the fingerprint of its model.

    Returns None without `args.repeat`. Raises BitDanceError for a picture without a recipe, and for files that must be
    given again.
    """
    if args.repeat is None:
        return None
    with opened(args.repeat) as file:
        found = recipe.read(file, args.repeat)
    settings = dict(found["settings"])
    if "labels" in settings:
        settings["prompt"] = ", ".join(map(str, settings.pop("labels")))
        settings["num_images"] = 1
    if args.init is not None or args.bits is not None:  # another picture to start from, of its own size
        settings = {name: value for name, value in settings.items() if name not in ("init", "bits", "height", "width")}
    if args.outpaint is not None:
        settings = {name: value for name, value in settings.items() if name not in ("height", "width")}
    missing = [name for name in FILES if name in settings and getattr(args, name) is None]
    if missing:
        names = " ".join(_shown(name, settings[name]) for name in missing)
        raise BitDanceError(f"{args.repeat} was drawn from other files; give them again: {names}")
    for name, value in settings.items():
        given = getattr(args, name)
        if given is None or given is False:
            setattr(args, name, value)
    if args.dtype is None and found["model"]["dtype"] in COMPUTE_DTYPES:
        args.dtype = found["model"]["dtype"]
    args.quantize = args.quantize or found["model"].get("quantize")
    _name_model(args, found["model"])
    return found["model"]["fingerprint"]


def check_model(args: argparse.Namespace, expected: str | None, found: str) -> None:
    """Raise BitDanceError if the picture to repeat is of another model."""
    if expected not in (None, found):
        raise BitDanceError(
            f"{args.repeat} was drawn by another model than {args.model}; give that one with --model (and "
            "--tokenizer), or leave --from out"
        )


def _name_model(args: argparse.Namespace, model: dict[str, Any]) -> None:
    """Choose the recipe's model where no option does: a built-in one, or a path from here."""
    for option in ("model", "tokenizer"):
        name = model.get(option if option == "tokenizer" else "name")
        if getattr(args, option) is not None or name is None:
            continue
        # a stranger's picture must not start a download
        if name not in builtin_models() and not Path(name).exists():
            where = "a hub id" if re.fullmatch(HUB_ID, name) else "a file or folder that is not here"
            raise BitDanceError(f"{args.repeat} was drawn with the {option} '{name}', {where}; give it with --{option}")
        setattr(args, option, name)


def _shown(name: str, value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    return " ".join(f"--{name} {' '.join(map(repr, v)) if isinstance(v, list) else repr(v)}" for v in values)
