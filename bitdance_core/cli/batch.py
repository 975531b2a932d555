"""`batch`: the options of bitdance_core/batch/run.py, which draws a file of prompts into a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..batch.jobs import PICTURE_LAYOUTS
from ..batch.run import run
from .options import DEFAULT_MODEL, add_drawing_options


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
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
    batching.set_defaults(run=run, model=DEFAULT_MODEL)
