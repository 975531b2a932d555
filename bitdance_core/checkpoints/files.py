"""Read files that may be missing, truncated, damaged or hostile, and write whole ones; every error names the file."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import BitDanceError, MissingFileError
from .sniff import check_members, not_weights, trailing_bytes

# several times the largest size that a model needs; a larger file could fill the memory
MAX_JSON_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 16 * 2**20

# safetensors' name of a dtype -> the dtype
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
if hasattr(torch, "float8_e8m0fnu"):  # PyTorch 2.7 and newer
    SAFETENSORS_DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def read_text(path: Path) -> str:
    """Read a UTF-8 text file. Raises BitDanceError for one that is missing, unreadable or larger than 64 MiB."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise BitDanceError(f"{path} is too large for a text file (at most {MAX_JSON_BYTES >> 20} MiB)")
        return path.read_bytes().decode("utf-8-sig")  # editors on Windows write a byte order mark
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} is missing") from error
    except OSError as error:
        raise BitDanceError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise BitDanceError(f"{path} is not UTF-8 text ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that must contain an object. Raises BitDanceError for anything else."""
    text = read_text(path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, or numbers or nesting too long for Python
        raise BitDanceError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise BitDanceError(f"{path} must hold a JSON object, found a {type(data).__name__}")
    return data


def write_whole(path: Path, data: bytes | Callable[[BinaryIO], object], beside: Path | None = None) -> None:
    """Write a file completely or not at all: whatever happens, `path` has its old content or all of the new one.

    `data` is the content, or a function that writes it to a binary file. It goes to a hidden file of a unique name in
    the folder `beside` (default: that of `path`; on the same disk), is synced, and then renamed. A link keeps pointing
    to its file, and a file that is replaced keeps its permissions. Raises BitDanceError if the file cannot be written.
    """
    target = Path(os.path.realpath(path))
    if os.path.exists(target) and not os.path.isfile(target):  # False, not an error, for a name that is too long
        raise BitDanceError(f"{path} cannot be written (it is a folder or a device)")
    # of its own short name: that of the file may already be as long as names can be
    partial = (beside or target.parent) / f".{secrets.token_hex(8)}.partial"
    try:
        try:
            with partial.open("xb+") as file:
                file.write(data) if isinstance(data, bytes) else data(file)
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                partial.chmod(target.stat().st_mode & 0o777)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise BitDanceError(f"{path} cannot be written ({error.strerror or error})") from error


def check_exists(path: Path) -> None:
    """Raise MissingFileError for a path without a file or folder, BitDanceError for a device or an impossible path."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} is missing") from error
    except (OSError, ValueError) as error:  # a name too long, a loop of links, a null byte
        reason = getattr(error, "strerror", None) or error
        raise BitDanceError(f"{path!s:.200} cannot be read ({reason})") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise BitDanceError(f"{path} is a device or a pipe; expected a file or a folder")


class TensorFile(Protocol):
    """An open file whose tensors are read one at a time: safetensors' interface, for both kinds of files."""

    def keys(self) -> list[str]: ...
    def metadata(self) -> dict[str, str] | None: ...
    def get_slice(self, name: str): ...  # with get_shape() -> list[int] and get_dtype() -> str
    def get_tensor(self, name: str) -> Tensor: ...


@contextmanager
def open_tensors(path: Path, device: str = "cpu") -> Iterator[TensorFile]:
    """Open a .safetensors file (reads tensors to `device`) or a PyTorch file (memory-mapped, on the CPU).

    Raises BitDanceError for a file that is missing, damaged or contains code.
    """
    with open_torch(path) if is_torch_file(path) else open_safetensors(path, device) as file:
        yield file


def is_torch_file(path: Path) -> bool:
    """Recognise a PyTorch file by its content: a zip archive, or the magic number of PyTorch's older format."""
    try:
        with path.open("rb") as file:
            return file.read(4) in (b"PK\x03\x04", b"\x80\x02\x8a\x0a")
    except OSError:
        return False  # opening the file raises the error


@contextmanager
def open_safetensors(path: Path, device: str = "cpu") -> Iterator[safe_open]:
    """Open a safetensors file whose tensors are read one at a time to `device`."""
    check_exists(path)
    if words := not_weights(path):
        raise BitDanceError(f"{path} {words}")
    try:
        with path.open("rb") as raw:  # gives the reason of a failure, which safetensors' error lacks
            size = int.from_bytes(raw.read(8), "little")
        if MAX_HEADER_BYTES < size <= path.stat().st_size:
            raise BitDanceError(
                f"{path} has a header of {size >> 20} MiB, too large for a model (at most {MAX_HEADER_BYTES >> 20} MiB)"
            )
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except OSError as error:
        raise BitDanceError(f"{path} cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        if (extra := trailing_bytes(path)) > 0:
            raise BitDanceError(
                f"{path} has {extra} bytes behind its tensors; it was not written completely, or onto a longer file: "
                "download it again"
            ) from error
        raise BitDanceError(f"{path} is truncated or not a safetensors file ({error}); download it again") from error


@contextmanager
def open_torch(path: Path) -> Iterator[TensorFile]:
    """Open the tensors of a PyTorch file: those of its `ema`, `state_dict` or `model`, if present. Never runs code."""
    if words := check_members(path):
        raise BitDanceError(f"{path} {words}")
    try:
        # trainers store their arguments too; a Namespace is a plain record, and is not used
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                content = torch.load(path, map_location="cpu", weights_only=True)  # the older format
    except pickle.UnpicklingError as error:
        raise BitDanceError(
            f"{path} contains more than tensors and is not loaded, because it could run code; "
            "use a file with weights only, best a .safetensors"
        ) from error
    except OSError as error:
        raise BitDanceError(f"{path} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # unpickling a damaged file raises many types
        raise BitDanceError(
            f"{path} is truncated or not a PyTorch file ({type(error).__name__}); download it again"
        ) from error
    for name in ("ema", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict) and content[name]:
            content = content[name]
            break
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    strange = next((name for name, tensor in tensors.items() if not _is_plain(tensor)), None)
    if strange is not None:
        raise BitDanceError(f"{path}: '{strange}' is not a plain tensor; expected a state dict")
    if not tensors:
        raise BitDanceError(f"{path} has no tensors; expected a state dict")
    yield _TorchFile(tensors)


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is dense, of a known dtype, and no larger than its storage, as a forged view may be."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in SAFETENSORS_NAMES:
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


@dataclass(frozen=True)
class _TorchFile:
    tensors: dict[str, Tensor]

    def keys(self) -> list[str]:
        return list(self.tensors)

    def metadata(self) -> None:
        return None

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self.tensors[name])

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name].detach()


@dataclass(frozen=True)
class _Slice:
    tensor: Tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return SAFETENSORS_NAMES[self.tensor.dtype]

    def __getitem__(self, rows: slice) -> Tensor:
        return self.tensor.detach()[rows]
