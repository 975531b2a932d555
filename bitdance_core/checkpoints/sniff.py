"""Recognise by their first bytes files that are no weights, though their names say so, and say what would help."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

_KINDS = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file itself; run `git lfs pull` in its repository"),
    (b"GGUF", "is a GGUF file, a format that is not read; use the model's .safetensors"),
    (b"\x00\x05\x16\x07", "is a sidecar of macOS without weights; use the file of the same name without '._'"),
    (b"\x1f\x8b", "is a compressed archive; unpack it first"),
    (b"7z\xbc\xaf", "is a compressed archive; unpack it first"),
    (b"Rar!", "is a compressed archive; unpack it first"),
    (b"\x89HDF", "is an HDF5 file of another library; use the model's .safetensors"),
)


def not_weights(path: Path) -> str | None:
    """Return what a file is and what would help (the rest of a sentence), or None for one that may be weights."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError:
        return None  # opening the file raises the error
    if not start:
        return "is truncated to nothing; download it again"
    for mark, words in _KINDS:
        if start.startswith(mark):
            return words
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:9].lower() == b"<!doctype" or text[:5].lower() in (b"<html", b"<?xml"):
        return "is a web page, not the file; download it from the page's download link, logged in if it needs that"
    if len(start) > 8 and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        return f"is a text, not tensors; it begins with {start[:40].decode('ascii').split(chr(10))[0]!r}"
    return None


def trailing_bytes(path: Path) -> int:
    """Return how many bytes a safetensors file has behind its tensors; less than 0 for a truncated file."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            left = path.stat().st_size - 8 - size
            if left < 0:
                return left
            header = json.loads(file.read(size))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return left - max(ends, default=0)
    except (OSError, ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError):
        return -1


def is_whole(path: Path) -> bool:
    """Return whether a file has the size that its own header gives. Reads no weights, so it misses flipped bits."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if start == b"PK\x03\x04":
            return zipfile.is_zipfile(path)  # the list of its members is at the end
        return start == b"\x80\x02\x8a\x0a" or trailing_bytes(path) == 0
    except OSError:
        return False


def check_members(path: Path) -> str | None:
    """Return the rest of a sentence if a zip archive would unpack to more than its size, which PyTorch never writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception:  # damaged in any way; torch.load raises the error
        return None
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        return "has compressed members, which could fill the memory; save it again with torch.save"
    if sum(member.file_size for member in members) > path.stat().st_size:
        return "has members that overlap, which could fill the memory; save it again with torch.save"
    return None
