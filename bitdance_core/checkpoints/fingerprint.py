"""Identify a model by the content of its files, wherever they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from .tensor_names import Component

EDGE_BYTES = 2**20  # read from each end of a file for its fingerprint


def files_of(components: Iterable[Component]) -> list[Path]:
    """List the files of a model's parts, each once."""
    return list(dict.fromkeys(file for component in components for file in component.files))


def fingerprint(files: Iterable[Path]) -> str:
    """Hash the sizes and both ends of a model's files, which identify it without reading or naming them completely."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(size.to_bytes(8, "little") + file.read(EDGE_BYTES))
            file.seek(max(0, size - EDGE_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:16]
