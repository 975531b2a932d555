"""BitDance in plain PyTorch: an autoregressive image model over binary tokens (arXiv 2602.14041)."""

from .errors import BitDanceError, Cancelled, MissingFileError
from .imagenet_pipeline import ImageNetPipeline
from .pipeline import BitDancePipeline, GenerateOutput
from .tokenizer import BinaryTokenizer

__version__ = "0.1.0"  # as in pyproject.toml

__all__ = [
    "BinaryTokenizer",
    "BitDanceError",
    "BitDancePipeline",
    "Cancelled",
    "GenerateOutput",
    "ImageNetPipeline",
    "MissingFileError",
]
