"""Read the prompts of a batch, check them before any weight is read, and plan the files that each becomes."""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from PIL import Image

from ..checkpoints.files import read_text
from ..errors import BitDanceError, shorten, whole_number
from ..pipeline import Pipeline, sheet
from ..recipe import png_info
from ..sampling.flow import SAMPLERS
from ..sampling.settings import option_names

PICTURE_LAYOUTS = ("flat", "geneval", "dpg")
# settings that a line may have, whole numbers with their minimum; the other entries of a line are its metadata
WHOLE_NUMBERS = {"height": 1, "width": 1, "steps": 1, "seed": 0, "num_images": 1}
TEXTS = ("prompt", "negative_prompt", "sampler")
SETTINGS = (*WHOLE_NUMBERS, *TEXTS, *option_names(), "guidance", "labels", "id")
EDITS = ("init", "bits", "denoise", "mask", "outpaint", "region")  # options that only `generate` has
ID = re.compile(r"[\w-](?:[\w .-]{0,98}[\w-])?")
# names that Windows reserves
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """One prompt as read: its id, line number, place for errors, and the JSON object of its line."""

    id: str
    line: int
    where: str
    data: dict[str, Any]

    def refuse(self, reason: object) -> BitDanceError:
        return BitDanceError(f"{self.where}: {reason}")


@dataclass(frozen=True)
class Job:
    """One prompt ready to draw: arguments of `generate`, names of its files, and its entries in the manifest."""

    row: Row
    arguments: dict[str, Any]
    names: list[str]
    plan: dict[str, Any]


def read_rows(source: Path, layout: str) -> list[Row]:
    """Read the prompts of a file of JSON lines, or of a folder of .txt files (one prompt each, its id the file's name).

    Raises BitDanceError, with file and line, for an invalid prompt, and for an id that is duplicate or not a file name.
    """
    if source.is_dir():
        texts = sorted(source.glob("*.txt"))
        rows = [Row(path.stem, 1, str(path), {"prompt": read(path).strip()}) for path in texts]
    else:
        rows = []
        for number, line in enumerate(read(source).split("\n"), start=1):
            if line.strip():
                where = f"{source}, line {number}"
                data = parse(line, where)
                name = data.get("id")
                name = f"{len(rows):05}" if name is None else str(name) if type(name) is int else name
                rows.append(Row(name, number, where, data))
    if not rows:
        raise BitDanceError(f"{source} has no prompts" + (" (files named *.txt)" if source.is_dir() else ""))
    seen: dict[str, Row] = {}
    for row in rows:
        check_row(row, layout)
        other = seen.setdefault(row.id.casefold(), row)
        if other is not row:
            raise row.refuse(
                f"duplicate id '{row.id}' (also {other.where}); ids must differ by more than upper/lower case"
            )
    return rows


def read(path: Path) -> str:
    return read_text(path).removeprefix("\ufeff")  # editors on Windows add a byte order mark


def parse(line: str, where: str) -> dict[str, Any]:
    """Parse a line as a JSON object, without Python's NaN and Infinity: NaN never equals itself in the manifest."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        data = json.loads(line, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise BitDanceError(f"{where} is not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise BitDanceError(f'{where} must be an object such as {{"prompt": "a cat"}}, found a {type(data).__name__}')
    return data


def check_row(row: Row, layout: str) -> None:
    """Raise BitDanceError for an id that is not a file name, and for values of the wrong type."""
    if not isinstance(row.id, str) or not ID.fullmatch(row.id) or RESERVED.fullmatch(row.id):
        raise row.refuse(
            f"id {shorten(row.id)} is not a file name; use up to 100 letters, digits, '_', '-', "
            "and '.' or spaces inside"
        )
    if layout == "geneval" and not (row.id.isascii() and row.id.isdigit()):
        raise row.refuse(f"id '{row.id}' must be a number: GenEval reads folders named by numbers only")
    if layout == "dpg" and "." in row.id:
        raise row.refuse(f"id '{row.id}' must not have a dot: DPG-Bench cuts a picture's name at its first dot")
    data = row.data
    try:
        for name, least in WHOLE_NUMBERS.items():
            if data.get(name) is not None:
                whole_number(name, data[name], least)
    except BitDanceError as error:
        raise row.refuse(error) from error
    for name in TEXTS:
        if not isinstance(data.get(name), str | None):
            raise row.refuse(f"{name} must be text, found {shorten(data[name])}")
    guidance, labels, sampler = data.get("guidance"), data.get("labels"), data.get("sampler")
    if guidance is not None and (isinstance(guidance, bool) or not isinstance(guidance, Real)):
        raise row.refuse(f"guidance must be a number, found {shorten(guidance)}")
    if sampler is not None and sampler not in SAMPLERS:
        raise row.refuse(f"unknown sampler '{sampler}', have: {', '.join(SAMPLERS)}")
    if labels is not None and not (isinstance(labels, list) and all(isinstance(k, int | str) for k in labels)):
        raise row.refuse(f"labels must be a list of classes by name or number, found {shorten(labels)}")
    if edits := [name for name in EDITS if data.get(name) is not None]:
        raise row.refuse(f"{edits[0]} edits a picture, and batch only draws new ones; use generate --{edits[0]}")
    if (data.get("prompt") is None) == (labels is None):
        raise row.refuse("give either 'prompt' or, for an ImageNet model, 'labels'")
    if data.get("prompt") is not None and not data["prompt"].strip():
        raise row.refuse("the prompt is empty")


def plan(row: Row, args: argparse.Namespace, model: Pipeline) -> Job:
    """Resolve every setting of a row: its own, else the command's, else the model's.

    Raises BitDanceError for any setting that `generate` would refuse.
    """
    names = (*WHOLE_NUMBERS, "negative_prompt", "guidance", "sampler", *option_names())
    given = {name: getattr(args, name) if row.data.get(name) is None else row.data[name] for name in names}
    count = given["num_images"]
    if count is None:
        count = 1 if args.layout == "flat" else 4
    try:
        for name in model.unused:
            if given.get(name):
                raise BitDanceError(f"an ImageNet model draws classes in one size; leave {name} out")
        subject = {name: given[name] for name in ("height", "width", "negative_prompt")}
        subject |= {"num_images": count, "allow_untrained_size": args.allow_untrained_size}
        arguments = model.subject(row.data.get("prompt"), row.data.get("labels"), **subject)
        arguments |= model.settings(given)
        request = model.check(**arguments)
        height, width = request.size(model.tokenizer.downscale)
        count = request.num_images
        if args.layout == "dpg" and (count > 4 or height != width):
            raise BitDanceError(
                f"layout dpg takes up to four square pictures per prompt, "
                f"found {count} of {width}x{height} (width x height)"
            )
    except BitDanceError as error:
        raise row.refuse(error) from error
    kept = {name: value for name, value in arguments.items() if name not in ("prompt", "allow_untrained_size")}
    metadata = {name: value for name, value in row.data.items() if name not in SETTINGS}
    written = {"id": row.id, "prompt": row.data.get("prompt"), "layout": args.layout, "settings": kept}
    return Job(row, arguments, file_names(args.layout, row.id, count), written | {"metadata": metadata})


def file_names(layout: str, name: str, count: int) -> list[str]:
    """Return the files of one prompt's `count` pictures, relative to the output folder.

    geneval is the layout that GenEval's evaluation/evaluate_images.py reads, dpg that of DPG-Bench's
    compute_dpg_bench.py: a folder with nothing else in it.
    """
    if layout == "geneval":
        return [f"{name}/metadata.jsonl", *(f"{name}/samples/{k:04}.png" for k in range(count))]
    if layout == "dpg":
        return [f"images/{name}.png"]
    return [f"{name}.png"] if count == 1 else [f"{name}_{k}.png" for k in range(1, count + 1)]


def contents(
    layout: str, row: Row, images: Sequence[Image.Image], recipe: Mapping[str, Any] | None = None
) -> list[bytes]:
    """Return the contents of the files of `file_names`, in their order; each picture carries the recipe."""
    if layout == "dpg":
        return [png(sheet(images), recipe)]
    first = [json.dumps(row.data).encode() + b"\n"] if layout == "geneval" else []
    return [*first, *(png(image, recipe) for image in images)]


def png(image: Image.Image, recipe: Mapping[str, Any] | None = None) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=png_info(recipe))
    return buffer.getvalue()


def check_names(jobs: Sequence[Job]) -> None:
    """Raise BitDanceError if two prompts would write the same file, such as `a_1` and the first picture of `a`."""
    owners: dict[str, Row] = {}
    for job in jobs:
        for name in job.names:
            other = owners.setdefault(name.casefold(), job.row)
            if other is not job.row:
                raise job.row.refuse(f"{name} would also be written by {other.where}; choose other ids")
