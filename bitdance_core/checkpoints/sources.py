"""The hubs that publish models: where they are, and which files a repository has."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from ..errors import BitDanceError, MissingFileError
from ..version import __version__

HUGGINGFACE, MODELSCOPE = "huggingface", "modelscope"
SOURCES = (HUGGINGFACE, MODELSCOPE)
TIMEOUT = 20  # seconds until ModelScope counts as out of reach
AGENT = {"User-Agent": f"bitdance/{__version__}"}
PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its name there, its bytes, its address, and what tells its content from another.

    `version` is the SHA-256 in the hub's list if it has one, else whatever changes with the content, or "".
    """

    name: str
    size: int
    url: str
    version: str = ""
    source: str = HUGGINGFACE


def address(source: str) -> str:
    """Return a hub's address: HF_ENDPOINT or MODELSCOPE_DOMAIN if they are set, else its own."""
    if source == HUGGINGFACE:
        return constants.ENDPOINT
    domain = os.environ.get("MODELSCOPE_DOMAIN", "").rstrip("/") or "www.modelscope.cn"
    return domain if "://" in domain else f"https://{domain}"


def host(source: str) -> str:
    """Return a hub's address for a reader."""
    return address(source).removeprefix("https://")


def remote_files(repo_id: str, patterns: Sequence[str], source: str = HUGGINGFACE) -> list[RemoteFile]:
    """List a repository's files that match the patterns.

    Raises MissingFileError if none matches, or the hub cannot be reached or has no such repository.
    """
    with named_errors(repo_id, source, listing=True):
        listed = _of_modelscope(repo_id) if source == MODELSCOPE else _of_huggingface(repo_id)
        found = [file for file in listed if any(fnmatch(file.name, pattern) for pattern in patterns)]
    if not found:
        raise MissingFileError(f"{address(source)} has no file of '{repo_id}' that matches {', '.join(patterns)}")
    return found


def _of_huggingface(repo_id: str) -> list[RemoteFile]:
    commit = HfApi().model_info(repo_id, revision="main").sha
    return [
        RemoteFile(
            entry.path,
            entry.size or 0,
            hf_hub_url(repo_id, entry.path, revision=commit),
            entry.lfs.sha256 if entry.lfs else entry.blob_id,
        )
        for entry in HfApi().list_repo_tree(repo_id, recursive=True, revision=commit)
        if hasattr(entry, "size")  # folders have none
    ]


def _of_modelscope(repo_id: str) -> list[RemoteFile]:
    place, query = f"{address(MODELSCOPE)}/api/v1/models/{quote(repo_id)}", {"Revision": "master", "Recursive": "True"}
    with urlopen(Request(f"{place}/repo/files?{urlencode(query)}", headers=AGENT), timeout=TIMEOUT) as answer:
        listed = json.loads(answer.read())
    if listed.get("Code") != 200:
        raise _unknown(repo_id, MODELSCOPE)

    def url(name: str) -> str:
        return f"{place}/repo?{urlencode({'Revision': 'master', 'FilePath': name})}"

    return [
        RemoteFile(
            entry["Path"],
            entry.get("Size") or 0,
            url(entry["Path"]),
            (entry.get("Sha256") or entry.get("Revision") or "").lower(),
            MODELSCOPE,
        )
        for entry in listed["Data"]["Files"]
        if entry.get("Type") != "tree"
    ]


@contextmanager
def named_errors(
    repo_id: str, source: str = HUGGINGFACE, listing: bool = False, cached_only: bool = False
) -> Iterator[None]:
    """Convert the errors of the hubs' libraries to MissingFileError with a remedy."""
    try:
        yield
    except BitDanceError:
        raise
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise _unknown(repo_id, source) from error
    except LocalEntryNotFoundError as error:
        if cached_only:
            raise MissingFileError(f"'{repo_id}' is not a local folder, and it is not in the hub cache") from error
        raise _out_of_reach(repo_id, source) from error
    except HTTPError as error:
        if error.code in (401, 403, 404):
            raise _unknown(repo_id, source) from error
        raise _broken_off(repo_id, f"HTTP status {error.code}") from error
    except Exception as error:  # the errors of the libraries' HTTP clients change from version to version
        kind = type(error).__name__
        if isinstance(error, OSError) and type(error).__module__ == "builtins" and error.filename is not None:
            raise BitDanceError(
                f"downloading '{repo_id}' failed at the local file {error.filename} ({error.strerror}); "
                "check the disk and who may write there, or delete the file"
            ) from error
        is_far = isinstance(error, URLError) or any(word in kind for word in ("Connect", "Offline", "Proxy"))
        if is_far or (listing and "Timeout" in kind):
            raise _out_of_reach(repo_id, source) from error
        first_line = str(error).partition("\n")[0]
        raise _broken_off(repo_id, f"{kind}: {first_line}") from error


def _broken_off(repo_id: str, reason: str) -> MissingFileError:
    return MissingFileError(f"downloading '{repo_id}' broke off ({reason}); the part is kept, try again to resume it")


def _unknown(repo_id: str, source: str) -> MissingFileError:
    other = "; choose the source huggingface" if source == MODELSCOPE else ""
    return MissingFileError(
        f"'{repo_id}' is not a local folder, and {address(source)} has no such public repository{other}"
    )


def _out_of_reach(repo_id: str, source: str) -> MissingFileError:
    """Name the hub, and what of the environment decides the way to it."""
    variable = "HF_ENDPOINT" if source == HUGGINGFACE else "MODELSCOPE_DOMAIN"
    proxies = [f"{name}={_without_password(os.environ[name])}" for name in PROXIES if os.environ.get(name)]
    settings = [
        f"proxy: {', '.join(proxies) or 'none set'}",
        f"{variable}: {os.environ.get(variable) or 'not set'}",
        *(["HF_HUB_OFFLINE is set"] if constants.HF_HUB_OFFLINE else []),
    ]
    mirror = "set HF_ENDPOINT to a mirror or choose the source modelscope"
    remedy = mirror if source == HUGGINGFACE else "choose the source huggingface"
    return MissingFileError(
        f"the hub {address(source)} cannot be reached for '{repo_id}' ({'; '.join(settings)}); check the network and "
        f"the proxy, or {remedy}"
    )


def _without_password(url: str) -> str:
    return re.sub(r"//[^@/]*@", "//***@", url)
