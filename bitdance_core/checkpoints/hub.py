"""Download models from the Hugging Face hub, only when a user names one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers
from tqdm import tqdm

from ..errors import BitDanceError, MissingFileError, format_bytes
from .layouts import COMFY_FOLDERS, FOLDER_FILES
from .locks import locked

Checked = Callable[[str, int, int], None]
CHECKED_BYTES = 16 * 2**20  # read at once
CHECKING = "checking"  # begins a line of `main` about a checksum

HUB_ID = r"\w[\w.-]*/\w[\w.-]*"  # "../x" and "./x" are paths

# patterns of the files that a model needs; none begins with *, which would match other subfolders too
OFFICIAL_FILES = (
    *FOLDER_FILES, "model.safetensors", "model.safetensors.index.json", "model-*.safetensors", "bitdance.json",
)  # fmt: skip
DIFFUSERS_FILES = (
    "model_index.json", "tokenizer/tokenizer.json",
    *(f"{part}/{file}" for part in ("text_encoder", "projector", "diffusion_head", "autoencoder")
      for file in ("config.json", "*.safetensors", "*.safetensors.index.json")),
)  # fmt: skip
MODEL_FILES = (*OFFICIAL_FILES, *DIFFUSERS_FILES, *(f"{folder}/*.safetensors" for folder in COMFY_FOLDERS))


@dataclass(frozen=True)
class Published:
    """A published model: its repository, patterns of the files to download, and their approximate size in GB.

    `loads` is the file to load, or None to load the whole folder.
    """

    repository: str
    files: tuple[str, ...]
    gigabytes: float
    loads: str | None = None

    def folder(self, name: str) -> str:
        """Return the name of the folder for the files; single-file models of one repository share it."""
        return self.repository.partition("/")[2] if self.loads else name


def _imagenet(size: str, gigabytes: float) -> Published:
    files = (f"BitDance_{size}.pt", "ae_d16c32.pt")
    return Published("shallowdream204/BitDance-ImageNet", files, gigabytes, files[0])


def _tokenizer(name: str) -> Published:
    files = (f"{name}.safetensors", f"{name}_config.json")
    return Published("shallowdream204/BitDance-Tokenizer", files, 1.8, files[0])


# approximate sizes, from the numbers of parameters; `remote_files` returns exact ones
PUBLISHED_MODELS = {
    "BitDance-14B-64x": Published("shallowdream204/BitDance-14B-64x", OFFICIAL_FILES, 35),
    "BitDance-14B-16x": Published("shallowdream204/BitDance-14B-16x", OFFICIAL_FILES, 35),
    "BitDance-14B-64x-fp8": Published(
        "comfyuiblog/BitDance-14B-64x-fp8-comfyui", ("*.safetensors", "tokenizer.json"), 18
    ),
    "BitDance-14B-64x-diffusers": Published("BiliSakura/BitDance-14B-64x-diffusers", DIFFUSERS_FILES, 35),
    "BitDance-14B-16x-diffusers": Published("BiliSakura/BitDance-14B-16x-diffusers", DIFFUSERS_FILES, 35),
    "BitDance-B-1x": _imagenet("B_1x", 4),
    "BitDance-B-4x": _imagenet("B_4x", 4),
    "BitDance-B-16x": _imagenet("B_16x", 4),
    "BitDance-L-1x": _imagenet("L_1x", 6),
    "BitDance-H-1x": _imagenet("H_1x", 10),
}
PUBLISHED_TOKENIZERS = {name: _tokenizer(name) for name in ("ae_d16c32", "ae_d32c128", "ae_d32c256")}
DOWNLOADS = {**PUBLISHED_MODELS, **PUBLISHED_TOKENIZERS}


def download(repo_id: str, files: Sequence[str], local_files_only: bool = False) -> Path:
    """Download a repository's files that match the patterns in `files` to the hub's cache; return the folder there.

    Shows progress. After an interruption the next call downloads the incomplete files. Raises MissingFileError if
    the repository or the network cannot be reached.
    """
    with _named_errors(repo_id, local_files_only):
        return Path(snapshot_download(repo_id, allow_patterns=list(files), local_files_only=local_files_only))


def remote_files(repo_id: str, files: Sequence[str]) -> dict[str, int]:
    """List a repository's files that match the patterns in `files`: name -> size in bytes.

    Raises MissingFileError if none matches, or the hub cannot be reached.
    """
    with _named_errors(repo_id):
        tree = list(HfApi().list_repo_tree(repo_id, recursive=True))
    found = {
        entry.path: entry.size or 0
        for entry in tree
        if hasattr(entry, "size") and any(fnmatch(entry.path, pattern) for pattern in files)  # folders have none
    }
    if not found:
        raise MissingFileError(f"the hub's repository '{repo_id}' has no file that matches {', '.join(files)}")
    return found


def check_space(sizes: dict[str, int], folder: Path) -> None:
    """Raise BitDanceError unless the files still missing in `folder` (`sizes`: name -> bytes) fit on its disk."""
    # an interrupted download stays under .cache until it is complete
    begun = sum(path.stat().st_size for path in (folder / ".cache").rglob("*.incomplete"))
    here = {name for name, size in sizes.items() if (path := folder / name).is_file() and path.stat().st_size == size}
    needed = max(0, sum(size for name, size in sizes.items() if name not in here) - begun)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise BitDanceError(
            f"{format_bytes(needed)} are still to be downloaded, but the disk of {folder} has {format_bytes(free)} free"
        )


def fetch(repo_id: str, names: Iterable[str], folder: Path, checked: Checked | None = None) -> Path:
    """Download files of a repository to `folder` and return it; skip files already there with the hub's SHA-256.

    Unlike the hub's own library, which restarts an interrupted file, resume it, even one from an earlier process.
    Reading a file for its checksum may take minutes: `checked(name, bytes_done, bytes_total)` is called meanwhile
    (None: a progress bar). Raises MissingFileError if the download is interrupted, BitDanceError for a file with a
    wrong size or checksum, and for one that another program is downloading.
    """
    with _named_errors(repo_id):
        commit = HfApi().model_info(repo_id, revision="main").sha
        for name in names:
            target = folder / name
            if not target.resolve().is_relative_to(folder.resolve()):
                raise BitDanceError(f"'{name}' of '{repo_id}' is outside {folder}")
            with locked(_cache(folder) / name):
                _fetch_file(hf_hub_url(repo_id, name, revision=commit), name, folder, commit, checked)
    return folder


def changed_files(folder: Path) -> list[str]:
    """List the files that were downloaded into a folder and verified, and are gone or changed since. Reads none."""
    return [
        name
        for name, stamp in _verified(folder).items()
        if not (folder / name).is_file() or stamp != _stamp(folder / name, stamp[-1] if stamp else "")
    ]


def _fetch_file(url: str, name: str, folder: Path, commit: str, checked: Checked | None) -> None:
    remote = get_hf_file_metadata(url)
    target, etag = folder / name, remote.etag or ""  # a mirror may send none
    if target.is_file() and target.stat().st_size == remote.size and _is_right(target, etag, folder, name, checked):
        return
    version = re.sub(r"\W", "", etag) or hashlib.sha256(f"{commit} {name} {remote.size}".encode()).hexdigest()
    part = _cache(folder) / f"{version}.incomplete"  # resume only a part of this version of the file
    if part.is_file() and remote.size is not None and part.stat().st_size > remote.size:
        part.unlink()  # not a part of the file: begin anew
    if not part.is_file() or part.stat().st_size != remote.size:
        with part.open("ab") as file:
            options = {"headers": build_hf_headers(), "expected_size": remote.size, "displayed_filename": name}
            http_get(url, file, resume_size=file.tell(), **options)
    if remote.size is not None and part.stat().st_size != remote.size:
        found = part.stat().st_size
        part.unlink()
        raise BitDanceError(f"{name} arrived with {found} bytes instead of {remote.size} and was removed; try again")
    if not _has_checksum(part, etag, name, checked):
        part.unlink()
        raise BitDanceError(f"{name} arrived damaged and was removed, because its SHA-256 is not the hub's; try again")
    target.parent.mkdir(parents=True, exist_ok=True)
    part.replace(target)
    _remember(target, etag, folder, name)


def _cache(folder: Path) -> Path:
    return folder / ".cache" / "bitdance"


def _has_checksum(path: Path, etag: str, name: str, checked: Checked | None) -> bool:
    """Compare a file with its SHA-256, which is the etag of large files only; small ones count as right."""
    if not re.fullmatch(r"[0-9a-f]{64}", etag):
        return True
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    # shown after a second
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"checking {name}", delay=1, disable=checked is not None)
    with path.open("rb") as file, bar:
        while chunk := file.read(CHECKED_BYTES):
            digest.update(chunk)
            done += len(chunk)
            bar.update(len(chunk))
            if checked:
                checked(name, done, total)
    return digest.hexdigest() == etag


def _is_right(path: Path, etag: str, folder: Path, name: str, checked: Checked | None) -> bool:
    """Return whether an existing file has the checksum; a right one is remembered by size and time of change."""
    if _verified(folder).get(name) == _stamp(path, etag):
        return True
    right = _has_checksum(path, etag, name, checked)
    if right:
        _remember(path, etag, folder, name)
    return right


def _stamp(path: Path, etag: str) -> list:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, etag]


def _verified(folder: Path) -> dict[str, list]:
    try:
        found = json.loads((_cache(folder) / "verified.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    stamps = found.items() if isinstance(found, dict) else ()
    return {name: stamp for name, stamp in stamps if isinstance(stamp, list)}


def _remember(path: Path, etag: str, folder: Path, name: str) -> None:
    new = _cache(folder) / f"verified.json.{os.getpid()}"
    new.write_text(json.dumps(_verified(folder) | {name: _stamp(path, etag)}))
    new.replace(_cache(folder) / "verified.json")


def main() -> int:
    """Run `fetch` for the arguments `REPOSITORY FOLDER FILE …`; print an error as one line to stdout and return 1.

    Lines before it, `CHECKING DONE TOTAL NAME`, count the bytes of a file that is read for its checksum.
    Standard input must be a pipe from the parent: the process ends when the parent does, killed or not.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    repo_id, folder, *names = sys.argv[1:]

    def checked(name: str, done: int, total: int) -> None:
        print(CHECKING, done, total, name, flush=True)

    try:
        fetch(repo_id, names, Path(folder), checked)
    except BitDanceError as error:
        print(error)
        return 1
    return 0


def _end_with_parent() -> None:
    # reads the pipe itself: at its own end the interpreter would wait for the lock of a buffered reader, and abort
    while os.read(0, 1):  # returns nothing once the parent is gone
        pass
    os._exit(1)


@contextmanager
def _named_errors(repo_id: str, local_files_only: bool = False) -> Iterator[None]:
    """Convert the errors of the hub's library to MissingFileError with a remedy."""
    try:
        yield
    except BitDanceError:
        raise
    except (RepositoryNotFoundError, HFValidationError) as error:
        reason = "the hub has no such public repository"
        raise MissingFileError(f"'{repo_id}' is not a local folder, and {reason}") from error
    except LocalEntryNotFoundError as error:
        reason = "it is not in the hub cache" if local_files_only else "the hub cannot be reached"
        raise MissingFileError(f"'{repo_id}' is not a local folder, and {reason}") from error
    except Exception as error:  # the errors of the library's HTTP client change from version to version
        kind = type(error).__name__
        if isinstance(error, OSError) and type(error).__module__ == "builtins" and error.filename is not None:
            raise BitDanceError(
                f"downloading '{repo_id}' failed at the local file {error.filename} ({error.strerror}); "
                "check the disk and who may write there, or delete the file"
            ) from error
        if "Connect" in kind or "Offline" in kind:
            raise MissingFileError(f"'{repo_id}' is not a local folder, and the hub cannot be reached") from error
        reason = str(error).partition("\n")[0]
        message = f"downloading '{repo_id}' broke off ({kind}: {reason}); try again to resume it"
        raise MissingFileError(message) from error
