"""BitDance in plain PyTorch: an autoregressive image model over binary tokens (arXiv 2602.14041)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import BitDanceError, Cancelled, MissingFileError
from .version import __version__

if TYPE_CHECKING:
    from .pipeline import BitDancePipeline, GenerateOutput, ImageNetPipeline
    from .tokenizer import BinaryTokenizer

__all__ = [
    "BinaryTokenizer",
    "BitDanceError",
    "BitDancePipeline",
    "Cancelled",
    "GenerateOutput",
    "ImageNetPipeline",
    "MissingFileError",
    "__version__",
]

# imported at their first use: a download, which is a process of its own, must not wait for PyTorch
_MODULES = {"BinaryTokenizer": ".tokenizer"} | dict.fromkeys(
    ("BitDancePipeline", "GenerateOutput", "ImageNetPipeline"), ".pipeline"
)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
