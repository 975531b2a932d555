"""Reading files that may be missing, truncated, broken or hostile: every failure names the file."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import BitDanceError, MissingFileError

# several times what any model needs: reading more could fill the memory
MAX_JSON_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 16 * 2**20

# safetensors' names of dtypes
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
if hasattr(torch, "float8_e8m0fnu"):  # PyTorch 2.7 and newer
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_text(path: Path) -> str:
    """The text of a file, in UTF-8."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise BitDanceError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB, which is not read as text")
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} is missing") from error
    except OSError as error:
        raise BitDanceError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise BitDanceError(f"{path} is not text in UTF-8 ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    text = read_text(path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, numbers or nesting without end
        raise BitDanceError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise BitDanceError(f"{path} must hold a JSON object, found a {type(data).__name__}")
    return data


class TensorFile(Protocol):
    """An open file whose tensors are read one by one: what safetensors offers, of both kinds of files."""

    def keys(self) -> list[str]: ...
    def metadata(self) -> dict[str, str] | None: ...
    def get_slice(self, name: str): ...  # with get_shape() -> list[int] and get_dtype() -> str
    def get_tensor(self, name: str) -> Tensor: ...


@contextmanager
def open_tensors(path: Path, device: str = "cpu") -> Iterator[TensorFile]:
    """An open .safetensors file (its tensors are read onto `device`) or a PyTorch file (mapped, on the CPU)."""
    with open_torch(path) if is_torch_file(path) else open_safetensors(path, device) as file:
        yield file


def is_torch_file(path: Path) -> bool:
    """By its content: a zip archive, or the magic number of PyTorch's older format."""
    try:
        with path.open("rb") as file:
            return file.read(4) in (b"PK\x03\x04", b"\x80\x02\x8a\x0a")
    except OSError:
        return False  # said by whoever opens it


@contextmanager
def open_safetensors(path: Path, device: str = "cpu") -> Iterator[safe_open]:
    """An open safetensors file whose tensors are read one by one onto `device`."""
    if not path.is_file():
        raise MissingFileError(f"{path} is missing")
    try:
        with path.open("rb") as raw:  # also for the reason why not, which safetensors does not tell
            size = int.from_bytes(raw.read(8), "little")
        if MAX_HEADER_BYTES < size <= path.stat().st_size:
            raise BitDanceError(
                f"{path} has a header of {size >> 20} MiB, which no model's is (at most {MAX_HEADER_BYTES >> 20} MiB)"
            )
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except OSError as error:
        raise BitDanceError(f"{path} cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise BitDanceError(f"{path} is truncated or not a safetensors file ({error}); download it again") from error


@contextmanager
def open_torch(path: Path) -> Iterator[TensorFile]:
    """An open PyTorch file (.pt): of its `ema`, `state_dict` or `model` the tensors. Code in it is never run."""
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)  # the older format
    except pickle.UnpicklingError as error:
        raise BitDanceError(
            f"{path} holds more than tensors, which is not loaded, as it could run code; "
            "use a file with weights alone, best a .safetensors"
        ) from error
    except OSError as error:
        raise BitDanceError(f"{path} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # whatever unpickling raises for a damaged file
        raise BitDanceError(
            f"{path} is truncated or not a PyTorch file ({type(error).__name__}); download it again"
        ) from error
    for name in ("ema", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict) and content[name]:
            content = content[name]
            break
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    strange = [name for name, tensor in tensors.items() if not _is_plain(tensor)]
    if not tensors or strange:
        what = f"'{strange[0]}' in it is none" if strange else "has none"
        raise BitDanceError(f"{path} should hold named tensors of weights, but {what}")
    yield _TorchFile(tensors)


def _is_plain(tensor: Tensor) -> bool:
    """Numbers that lie in the file one by one: a view may claim more of them than there are."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPE_NAMES:
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
        return DTYPE_NAMES[self.tensor.dtype]

    def __getitem__(self, rows: slice) -> Tensor:
        return self.tensor.detach()[rows]
