"""Run `batch`: draw a file of prompts into a folder with a manifest, from which the next run resumes.

A prompt is finished when its line is in the manifest; the line is written after its image files are renamed into place,
by one process only. So a run that dies at any point loses only the pictures that it was drawing. Drawing them again
gives the same pictures, as each prompt has its own seed.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from ..checkpoints.checkpoint import read_checkpoint
from ..checkpoints.fingerprint import files_of, fingerprint
from ..checkpoints.locate import builtin_models, locate
from ..checkpoints.lora_merge import Lora, check_loras
from ..errors import BitDanceError, whole_number
from ..pipeline import BitDancePipeline, Pipeline, outline
from ..pipeline.loading import choose
from ..pipeline.text import UnseenWords
from ..recipe import model_stamp
from .draw import LocalProcess, Outcome, RunSettings
from .jobs import Job, check_names, plan, read_rows
from .manifest import MANIFEST, append, locked, resume


def run(args: argparse.Namespace) -> None:
    """Run the command. Raises BitDanceError for invalid settings before any work, and at the end for failed prompts."""
    if args.workers is not None and args.ray is None:
        raise BitDanceError("--workers needs --ray; without --ray, one process draws")
    if args.workers is not None:
        whole_number("--workers", args.workers, least=1)
    rows = read_rows(args.prompts, args.layout)
    checkpoint = read_checkpoint(locate(args.model), args.tokenizer and Path(args.tokenizer))
    model, files = outline(checkpoint, args.quantize), files_of(checkpoint.components)
    jobs = [plan(row, args, model) for row in rows]
    check_names(jobs)
    loras = tuple(Lora.parse(text).absolute() for text in args.lora or ())
    check_loras(model.model, loras)
    model.taught += [lora.words() for lora in loras]
    say_unseen(model, jobs)
    out = args.out.absolute()
    with locked(out), ExitStack() as stack:
        if args.ray is None:
            executor = LocalProcess(*choose(args.device, None, False, args.quantize, args.offload))
        else:
            executor = stack.enter_context(import_distributed().connect(args.ray, args.workers, args.device))
        dtype = args.dtype or str(executor.dtype).removeprefix("torch.")
        stamp = model_stamp(model.config.family, fingerprint(files), dtype, args.quantize, loras)
        tokenizer = args.tokenizer and absolute_source(args.tokenizer)
        settings = RunSettings(absolute_source(args.model), tokenizer, str(executor.device), dtype, out, stamp,
                               not args.no_metadata, args.offload, loras)  # fmt: skip
        done = resume(out, jobs, stamp)
        pending = [job for job in jobs if job.row.id not in done]
        failed = draw_and_record(pending, settings, executor, len(jobs))
    if failed:
        name, reason = next(iter(failed.items()))
        raise BitDanceError(
            f"{len(failed)} of {len(jobs)} prompts could not be drawn ({name}: {reason}); run it again to retry"
        )
    print(f"{out / MANIFEST} ({len(jobs)} prompts, {len(done)} of them drawn earlier)")


def say_unseen(model: Pipeline, jobs: Sequence[Job]) -> None:
    """Warn, once for all prompts, of words on which a model of few words was not trained."""
    if isinstance(model, BitDancePipeline):
        texts = [text for job in jobs for name in ("prompt", "negative_prompt") if (text := job.arguments.get(name))]
        if note := model.unseen_note(texts):
            warnings.warn(note, UnseenWords, stacklevel=2)


def import_distributed():
    """Import the module that needs Ray. Raises BitDanceError if Ray is not installed."""
    try:
        from . import ray_workers as distributed
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise BitDanceError('--ray needs Ray: pip install "bitdance[distributed]"') from error
    return distributed


class Executor(Protocol):
    """Where jobs are drawn: `LocalProcess`, or `Cluster` in ray_workers.py."""

    def draw_jobs(self, jobs: Sequence[Job], settings: RunSettings) -> Iterator[tuple[Job, Outcome]]: ...


def draw_and_record(pending: Sequence[Job], settings: RunSettings, executor: Executor, total: int) -> dict[str, str]:
    """Draw jobs and append their records to the manifest; return the failed ids with the reason."""
    failed = {}
    if not pending:
        return failed
    with tqdm(total=total, initial=total - len(pending), unit="prompt", desc="drawing") as bar:
        for job, outcome in executor.draw_jobs(pending, settings):
            if isinstance(outcome, str):
                failed[job.row.id] = outcome
                bar.write(f"{job.row.id} could not be drawn: {outcome}", file=sys.stderr)
            else:
                append(settings.out / MANIFEST, outcome)
                bar.update()
    return failed


def absolute_source(source: str) -> str:
    """Make a path absolute, for processes with another working folder; return names and hub ids unchanged."""
    return source if source in builtin_models() or not Path(source).exists() else str(Path(source).absolute())
