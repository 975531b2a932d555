"""BitDance in plain PyTorch: an autoregressive image model over binary tokens (arXiv 2602.14041)."""

from .errors import BitDanceError, Cancelled, MissingFileError
from .pipeline import BitDancePipeline, GenerateOutput, ImageNetPipeline
from .tokenizer import BinaryTokenizer
from .version import __version__

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
