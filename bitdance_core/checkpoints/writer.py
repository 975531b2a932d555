"""Writing a .safetensors file tensor by tensor: the library's own writer wants all of them in memory at once."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BitDanceError
from .files import DTYPES, open_safetensors

READ_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: what the header says of it, and its values, row after row, when their time comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_safetensors(
    path: Path, tensors: Sequence[Planned], metadata: dict[str, str], progress: Callable[[int], None]
) -> None:
    """Write `path` whole or not at all, and read it back; `progress` is told of bytes written.

    Tensors are made in their given order, one at a time. Raises BitDanceError for a file that cannot be written or
    does not read back as it was written.
    """
    header, offsets = _header(tensors, metadata)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(header)
            checksums = {}
            for tensor in tensors:
                file.seek(offsets[tensor.name])
                checksum = 0
                for chunk in tensor.chunks():
                    data = memoryview(chunk.contiguous().reshape(-1).view(torch.uint8).numpy())
                    file.write(data)
                    checksum = zlib.crc32(data, checksum)
                    progress(len(data))
                checksums[tensor.name] = checksum
            file.flush()
            os.fsync(file.fileno())
        _verify(partial, tensors, offsets, checksums)
        partial.replace(path)
    except OSError as error:
        raise BitDanceError(f"{path} cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)


def _header(tensors: Sequence[Planned], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes, and where each tensor begins. Wide types come first, so that all are aligned."""
    entries: dict[str, dict] = {"__metadata__": metadata}
    starts, end = {}, 0
    for tensor in sorted(tensors, key=lambda t: -DTYPES[t.dtype].itemsize):
        starts[tensor.name] = end
        end += tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [starts[tensor.name], end],
        }  # fmt: skip
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}


def _verify(path: Path, tensors: Sequence[Planned], offsets: dict[str, int], checksums: dict[str, int]) -> None:
    with open_safetensors(path) as file:
        readable = set(file.keys()) == {tensor.name for tensor in tensors}
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):  # so that the disk is read, not the memory that was just written from
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(READ_BYTES)
        for tensor in tensors:
            file.seek(offsets[tensor.name])
            left, checksum = tensor.nbytes, 0
            while left and (count := file.readinto(memoryview(buffer)[: min(left, READ_BYTES)])):
                checksum = zlib.crc32(memoryview(buffer)[:count], checksum)
                left -= count
            if not readable or left or checksum != checksums[tensor.name]:
                raise BitDanceError(f"{path}: {tensor.name} does not read back as it was written; is the disk sound?")
