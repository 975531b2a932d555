"""Models from the Hugging Face hub, fetched only when a user names one."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from .errors import MissingFileError

HUB_ID = r"[\w.-]+/[\w.-]+"
# what a model needs of its repository; demo pictures and the like stay there
NEEDED_FILES = ("*config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "bitdance.json")


def download(repo_id: str, local_files_only: bool = False) -> Path:
    """The local folder of a hub repository. Shows progress; a broken-off download continues at the next call."""
    try:
        return Path(snapshot_download(repo_id, allow_patterns=NEEDED_FILES, local_files_only=local_files_only))
    except (RepositoryNotFoundError, HFValidationError) as error:
        reason = "the hub has no such public repository"
        raise MissingFileError(f"'{repo_id}' is no folder here, and {reason}") from error
    except LocalEntryNotFoundError as error:
        reason = "it is not in the hub cache" if local_files_only else "the hub cannot be reached"
        raise MissingFileError(f"'{repo_id}' is no folder here, and {reason}") from error
    except (HfHubHTTPError, OSError) as error:
        raise MissingFileError(f"downloading '{repo_id}' from the hub failed: {error}") from error
