"""Models from the Hugging Face hub, fetched only when a user names one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from .errors import MissingFileError

HUB_ID = r"\w[\w.-]*/\w[\w.-]*"  # "../x" and "./x" are paths


def download(repo_id: str, files: Sequence[str], local_files_only: bool = False) -> Path:
    """The local folder of a hub repository, with those of its files that match the patterns in `files`.

    Shows progress; a download that broke off continues at the next call.
    """
    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(files), local_files_only=local_files_only))
    except (RepositoryNotFoundError, HFValidationError) as error:
        reason = "the hub has no such public repository"
        raise MissingFileError(f"'{repo_id}' is no folder here, and {reason}") from error
    except LocalEntryNotFoundError as error:
        reason = "it is not in the hub cache" if local_files_only else "the hub cannot be reached"
        raise MissingFileError(f"'{repo_id}' is no folder here, and {reason}") from error
    except Exception as error:  # whatever the library's HTTP client raises: it has changed from version to version
        message = f"downloading '{repo_id}' broke off ({type(error).__name__}: {error}); the next try continues it"
        raise MissingFileError(message) from error
