"""A progress bar over the patches, for `generate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from ..sampling.generate import Callback


def in_notebook() -> bool:
    """Return whether this process is a notebook's kernel."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and "IPKernelApp" in shell.config


@contextmanager
def reporting(callback: Callback | None, progress: bool | None) -> Iterator[Callback | None]:
    """Yield a callback that moves a bar and calls the user's; without a bar, yield the user's own.

    `progress` None shows the bar in notebooks only.
    """
    if not (in_notebook() if progress is None else progress):
        yield callback
        return
    from tqdm.auto import tqdm  # not before it is shown: in a notebook without ipywidgets, importing it warns

    bar = None

    def report(done: int, total: int, bits: Tensor) -> None:
        nonlocal bar
        if bar is None:  # not before the first patch: an error about settings must be the only output
            bar = tqdm(total=total, unit="patch", desc="drawing")
        bar.update(done - bar.n)
        if callback is not None:
            callback(done, total, bits)

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()
