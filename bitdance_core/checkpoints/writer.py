"""Write a .safetensors file one tensor at a time; the library's own writer needs all of them in memory."""

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
from .files import SAFETENSORS_DTYPES, open_safetensors

READ_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Planned:
    """A tensor to write: its entry in the header, and `chunks`, a function that yields the values in chunks of rows."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * SAFETENSORS_DTYPES[self.dtype].itemsize


def write_safetensors(
    path: Path, tensors: Sequence[Planned], metadata: dict[str, str], progress: Callable[[int], None]
) -> None:
    """Write `path` completely or not at all, and read it back; call `progress` with the bytes of each chunk written.

    Computes the tensors one at a time, in the given order. Raises BitDanceError if the file cannot be written, or
    reads back differently.
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
    """Return the header's bytes and each tensor's offset in the file; wide dtypes come first, which aligns them all."""
    entries: dict[str, dict] = {"__metadata__": metadata}
    starts, end = {}, 0
    for tensor in sorted(tensors, key=lambda t: -SAFETENSORS_DTYPES[t.dtype].itemsize):
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
        if hasattr(os, "posix_fadvise"):  # drops the cached pages, so that the disk is read
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(READ_BYTES)
        for tensor in tensors:
            file.seek(offsets[tensor.name])
            left, checksum = tensor.nbytes, 0
            while left and (count := file.readinto(memoryview(buffer)[: min(left, READ_BYTES)])):
                checksum = zlib.crc32(memoryview(buffer)[:count], checksum)
                left -= count
            if not readable or left or checksum != checksums[tensor.name]:
                raise BitDanceError(f"{path}: {tensor.name} differs when it is read back; check the disk")
