"""Draw the jobs of a batch in one process, each with the files it becomes."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import devices
from ..checkpoints.checkpoint import read_checkpoint
from ..checkpoints.locate import locate
from ..checkpoints.lora_merge import Lora
from ..errors import BitDanceError, is_out_of_memory
from ..pipeline import Pipeline, load_pipeline
from ..pipeline.text import UnseenWords
from ..recipe import lora_names, make
from ..version import __version__
from .jobs import Job, contents
from .manifest import write

# a record of the manifest, or the reason why a prompt could not be drawn
Outcome = dict[str, Any] | str


@dataclass(frozen=True)
class RunSettings:
    """The model, device and folder of a run, the same on every machine. `stamp` identifies the model, its dtype and its
    LoRAs.

    `metadata`: whether pictures carry their recipes.
    """

    source: str
    tokenizer: str | None
    device: str
    dtype: str
    out: Path
    stamp: dict[str, str]
    metadata: bool = True
    offload: bool = False
    loras: tuple[Lora, ...] = ()


@dataclass(frozen=True)
class LocalProcess:
    """Draw in this process. The counterpart of `Cluster`."""

    device: torch.device
    dtype: torch.dtype

    def draw_jobs(self, jobs: Sequence[Job], settings: RunSettings) -> Iterator[tuple[Job, Outcome]]:
        pipe = load(settings)
        for job in jobs:
            yield job, draw_job(pipe, job, settings)


def load(settings: RunSettings) -> Pipeline:
    """Load the model of a run."""
    tokenizer = None if settings.tokenizer is None else Path(settings.tokenizer)
    checkpoint = read_checkpoint(locate(settings.source), tokenizer)
    how = {"quantize": settings.stamp.get("quantize"), "offload": settings.offload, "loras": settings.loras}
    return load_pipeline(checkpoint, settings.device, devices.COMPUTE_DTYPES[settings.dtype], **how)


def draw_job(pipe: Pipeline, job: Job, settings: RunSettings) -> Outcome:
    """Draw a prompt and write its files; return its record, or the reason why it cannot be drawn.

    Raises BitDanceError, which ends the run, if a file cannot be written.
    """
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnseenWords)  # `run` has named them, once for all prompts
            images = pipe.generate(**job.arguments).images
    except BitDanceError as error:
        return str(error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return f"not enough memory on {pipe.device}"
    arguments = job.arguments | {"lora": lora_names(settings.loras)}
    made = make(arguments, settings.source, settings.tokenizer, settings.stamp, str(pipe.device))
    recipe = made if settings.metadata else None
    files = []
    for name, data in zip(job.names, contents(job.plan["layout"], job.row, images, recipe)):
        write(settings.out / name, data, settings.out)
        files.append({"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    return {
        **job.plan,
        "model": settings.stamp,
        "line": job.row.line,
        "files": files,
        "source": settings.source,
        "device": str(pipe.device),
        "version": __version__,
        "seconds": round(time.perf_counter() - start, 3),
    }
