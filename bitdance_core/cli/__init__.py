"""The command line: `python -m bitdance_core COMMAND`. A module has the options and the body of its commands."""

from .entry import build_parser, main

__all__ = ["build_parser", "main"]
