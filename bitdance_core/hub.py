"""Models from the Hugging Face hub, fetched only when a user names one."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from .errors import MissingFileError

HUB_ID = r"\w[\w.-]*/\w[\w.-]*"  # "../x" and "./x" are paths
# the published text-to-image models that come in the official layout
PUBLISHED_REPOSITORIES = {
    "BitDance-14B-64x": "shallowdream204/BitDance-14B-64x",
    "BitDance-14B-16x": "shallowdream204/BitDance-14B-16x",
}


def download(repo_id: str, files: Sequence[str], local_files_only: bool = False, folder: Path | None = None) -> Path:
    """The local folder of a hub repository, with those of its files that match the patterns in `files`.

    Into `folder`, or the hub's cache. Shows progress; a download that broke off continues at the next call.
    """
    options = {"allow_patterns": list(files), "local_files_only": local_files_only, "local_dir": folder}
    with _named_errors(repo_id, local_files_only):
        return Path(snapshot_download(repo_id, **options))


def download_size(repo_id: str, files: Sequence[str]) -> int:
    """Bytes of a hub repository's files that match the patterns in `files`."""
    with _named_errors(repo_id):
        tree = list(HfApi().list_repo_tree(repo_id, recursive=True))
    wanted = [entry for entry in tree if any(fnmatch(entry.path, pattern) for pattern in files)]
    return sum(getattr(entry, "size", None) or 0 for entry in wanted)  # folders have none


def main() -> int:
    """`REPOSITORY FOLDER PATTERN …`: download; what went wrong goes to stdout, in a line."""
    repo_id, folder, *files = sys.argv[1:]
    try:
        download(repo_id, files, folder=Path(folder))
    except MissingFileError as error:
        print(error)
        return 1
    return 0


@contextmanager
def _named_errors(repo_id: str, local_files_only: bool = False) -> Iterator[None]:
    """Whatever the hub's library raises, as MissingFileError that says what to do."""
    try:
        yield
    except (RepositoryNotFoundError, HFValidationError) as error:
        reason = "the hub has no such public repository"
        raise MissingFileError(f"'{repo_id}' is no folder here, and {reason}") from error
    except LocalEntryNotFoundError as error:
        reason = "it is not in the hub cache" if local_files_only else "the hub cannot be reached"
        raise MissingFileError(f"'{repo_id}' is no folder here, and {reason}") from error
    except Exception as error:  # whatever the library's HTTP client raises: it has changed from version to version
        kind = type(error).__name__
        if "Connect" in kind or "Offline" in kind:
            raise MissingFileError(f"'{repo_id}' is no folder here, and the hub cannot be reached") from error
        message = f"downloading '{repo_id}' broke off ({kind}: {error}); the next try continues it"
        raise MissingFileError(message) from error
