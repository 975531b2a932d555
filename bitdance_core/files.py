"""Reading files that may be missing, truncated or broken: every failure names the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import BitDanceError, MissingFileError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} is missing") from error
    except OSError as error:
        raise BitDanceError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, numbers or nesting without end
        raise BitDanceError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise BitDanceError(f"{path} must hold a JSON object, found a {type(data).__name__}")
    return data


@contextmanager
def open_safetensors(path: Path, device: str = "cpu") -> Iterator[safe_open]:
    """An open safetensors file whose tensors are read one by one onto `device`."""
    if not path.is_file():
        raise MissingFileError(f"{path} is missing")
    try:
        path.open("rb").close()  # for the reason why not, which safetensors does not tell
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except OSError as error:
        raise BitDanceError(f"{path} cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise BitDanceError(f"{path} is truncated or not a safetensors file ({error}); download it again") from error
