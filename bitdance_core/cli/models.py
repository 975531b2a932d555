"""`convert`, `download` and `info`: commands about a model's files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from ..cards import card_rows
from ..checkpoints.convert import OUTPUT_LAYOUTS, PRECISIONS, convert
from ..checkpoints.fetch import check_space, fetch
from ..checkpoints.hub import DOWNLOADS
from ..checkpoints.info import describe
from ..checkpoints.locate import locate
from ..checkpoints.sources import HUGGINGFACE, SOURCES, address, remote_files
from ..errors import format_bytes


def add_convert(commands: argparse._SubParsersAction) -> None:
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


def add_download(commands: argparse._SubParsersAction) -> None:
    width = max(map(len, DOWNLOADS))
    names = "\n".join(
        f"  {name:<{width}}  {about.gigabytes:>4g} GB, cards from {about.card} GB" for name, about in DOWNLOADS.items()
    )
    downloading = commands.add_parser(
        "download",
        help="download a published model",
        epilog=f"names, with approximate sizes and the smallest graphics cards that hold half of the weights:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    downloading.add_argument("name", choices=DOWNLOADS, metavar="NAME", help="one of the names below")
    downloading.add_argument("--to", type=Path, metavar="DIR", help="default: a new folder in the working folder")
    downloading.add_argument(
        "--source", choices=SOURCES, default=HUGGINGFACE, help="the hub to download from (default: %(default)s)"
    )
    downloading.set_defaults(run=download_model)


def add_info(commands: argparse._SubParsersAction) -> None:
    describing = commands.add_parser("info", help="describe a model file or folder")
    describing.add_argument("path", nargs="+", help="a path, the files of a set, or a built-in or published name")
    describing.set_defaults(run=info)


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
    files = remote_files(published.repository, published.files, args.source)
    for file in files:
        print(f"{format_bytes(file.size):>14}  {file.name}")
    total = format_bytes(sum(file.size for file in files))
    print(f"{total:>14}  from {published.repository} at {address(args.source)} to {folder}", flush=True)
    check_space(files, folder)
    try:
        print(fetch(published.repository, files, folder) / (published.loads or ""))
    except KeyboardInterrupt:
        print(f"bitdance: what has arrived is kept in {folder}; the same command goes on", file=sys.stderr)
        raise


def info(args: argparse.Namespace) -> None:
    source = args.path[0] if len(args.path) == 1 else args.path
    if len(args.path) == 1 and source in DOWNLOADS and not Path(source).exists():
        return print(_published(source))
    print(describe(locate(source, local_files_only=True), card_rows))


def _published(name: str) -> str:
    """Return what is known of a published model that is not here."""
    about = DOWNLOADS[name]
    return (
        f"{name} is not here: {about.gigabytes:g} GB from {about.repository}, cards from {about.card} GB; "
        f"`python -m bitdance_core download {name}` fetches it"
    )


COMMANDS = (add_convert, add_download, add_info)
