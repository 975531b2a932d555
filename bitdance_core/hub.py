"""Models from the Hugging Face hub, fetched only when a user names one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from tqdm import tqdm

from .errors import MissingFileError

HUB_ID = r"\w[\w.-]*/\w[\w.-]*"  # "../x" and "./x" are paths
# the published text-to-image models that come in the official layout
PUBLISHED_REPOSITORIES = {
    "BitDance-14B-64x": "shallowdream204/BitDance-14B-64x",
    "BitDance-14B-16x": "shallowdream204/BitDance-14B-16x",
}

Progress = Callable[[int, int], None]  # (bytes here, bytes known so far to be needed); may raise to stop


def download(
    repo_id: str,
    files: Sequence[str],
    local_files_only: bool = False,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """The local folder of a hub repository, with those of its files that match the patterns in `files`.

    Into `folder`, or the hub's cache; a download that broke off continues at the next call. Shows a bar, or calls
    `progress` (from several threads).
    """
    options = {"allow_patterns": list(files), "local_files_only": local_files_only, "local_dir": folder}
    if progress is not None:
        options["tqdm_class"] = _reporting(progress)
    try:
        return Path(snapshot_download(repo_id, **options))
    except (RepositoryNotFoundError, HFValidationError) as error:
        reason = "the hub has no such public repository"
        raise MissingFileError(f"'{repo_id}' is no folder here, and {reason}") from error
    except LocalEntryNotFoundError as error:
        reason = "it is not in the hub cache" if local_files_only else "the hub cannot be reached"
        raise MissingFileError(f"'{repo_id}' is no folder here, and {reason}") from error
    except Exception as error:  # whatever the library's HTTP client raises: it has changed from version to version
        message = f"downloading '{repo_id}' broke off ({type(error).__name__}: {error}); the next try continues it"
        raise MissingFileError(message) from error


def _reporting(progress: Progress) -> type[tqdm]:
    class Reporting(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if self.unit == "B":  # the other bars count files
                progress(int(self.n), int(self.total or 0))
            return shown

    return Reporting
