"""`convert`, `download` and `info`: commands about a model's files."""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from ..cards import card_rows
from ..checkpoints import hub
from ..checkpoints.convert import OUTPUT_LAYOUTS, PRECISIONS, convert
from ..checkpoints.hub import DOWNLOADS
from ..checkpoints.info import describe
from ..checkpoints.locate import locate
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
    names = "\n".join(f"  {name:<{width}}  {about.gigabytes:>4g} GB" for name, about in DOWNLOADS.items())
    downloading = commands.add_parser(
        "download",
        help="download a published model",
        epilog=f"names, with approximate sizes:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    downloading.add_argument("name", choices=DOWNLOADS, metavar="NAME", help="one of the names below")
    downloading.add_argument("--to", type=Path, metavar="DIR", help="default: a new folder in the working folder")
    downloading.set_defaults(run=download_model)


def add_info(commands: argparse._SubParsersAction) -> None:
    describing = commands.add_parser("info", help="describe a model file or folder")
    describing.add_argument("path", nargs="+", help="a path, the files of a set, or a built-in name")
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
    sizes = hub.remote_files(published.repository, published.files)
    for name, size in sizes.items():
        print(f"{format_bytes(size):>14}  {name}")
    print(f"{format_bytes(sum(sizes.values())):>14}  from {published.repository} to {folder}", flush=True)
    hub.check_space(sizes, folder)
    print(hub.fetch(published.repository, sizes, folder) / (published.loads or ""))


def info(args: argparse.Namespace) -> None:
    source = args.path[0] if len(args.path) == 1 else args.path
    print(describe(locate(source, local_files_only=True), card_rows))


COMMANDS = (add_convert, add_download, add_info)
