"""Run `batch`: draw a file of prompts into a folder with a manifest, from which the next run resumes.

A prompt is finished when its line is in the manifest; the line is written after its image files are renamed into place,
by one process only. So a run that dies at any point loses only the pictures that it was drawing. Drawing them again
gives the same pictures, as each prompt has its own seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from .. import devices
from ..checkpoints.checkpoint import builtin_models, locate
from ..checkpoints.layouts import find_layout
from ..checkpoints.tensor_names import CLASS_MODEL
from ..errors import BitDanceError, whole_number
from ..pipeline import BitDancePipeline, ImageNetPipeline
from ..version import __version__
from .jobs import Job, Pipeline, check_names, contents, fingerprint, outline, plan, read_rows

MANIFEST, LOCK, PARTIAL = "manifest.jsonl", ".lock", ".partial"


@dataclass(frozen=True)
class RunSettings:
    """The model, device and folder of a run, the same on every machine. `stamp` identifies the model and its dtype."""

    source: str
    tokenizer: str | None
    device: str
    dtype: str
    out: Path
    stamp: dict[str, str]


if TYPE_CHECKING:  # the module imports Ray
    from .ray_workers import Cluster

# a record of the manifest, or the reason why a prompt could not be drawn
Outcome = dict[str, Any] | str


@dataclass(frozen=True)
class LocalProcess:
    """Draw in this process. The counterpart of `Cluster`."""

    device: torch.device
    dtype: torch.dtype

    def draw_jobs(self, jobs: Sequence[Job], settings: RunSettings) -> Iterator[tuple[Job, Outcome]]:
        pipe = load(settings)
        for job in jobs:
            yield job, draw_job(pipe, job, settings)


def run(args: argparse.Namespace) -> None:
    """Run the command. Raises BitDanceError for invalid settings before any work, and at the end for failed prompts."""
    if args.workers is not None and args.ray is None:
        raise BitDanceError("--workers needs --ray; without --ray, one process draws")
    if args.workers is not None:
        whole_number("--workers", args.workers, least=1)
    rows = read_rows(args.prompts, args.layout)
    model, files = outline(args.model, args.tokenizer)
    jobs = [plan(row, args, model) for row in rows]
    check_names(jobs)
    out = args.out.absolute()
    with locked(out), ExitStack() as stack:
        if args.ray is None:
            executor = LocalProcess(*devices.choose(args.device, None))
        else:
            executor = stack.enter_context(import_distributed().connect(args.ray, args.workers, args.device))
        dtype = args.dtype or str(executor.dtype).removeprefix("torch.")
        stamp = {"family": model.config.family, "fingerprint": fingerprint(files), "dtype": dtype}
        tokenizer = args.tokenizer and absolute_source(args.tokenizer)
        settings = RunSettings(absolute_source(args.model), tokenizer, str(executor.device), dtype, out, stamp)
        done = resume(out, jobs, stamp)
        pending = [job for job in jobs if job.row.id not in done]
        failed = draw_and_record(pending, settings, executor, len(jobs))
    if failed:
        name, reason = next(iter(failed.items()))
        raise BitDanceError(
            f"{len(failed)} of {len(jobs)} prompts could not be drawn ({name}: {reason}); run it again to retry"
        )
    print(f"{out / MANIFEST} ({len(jobs)} prompts, {len(done)} of them drawn earlier)")


def import_distributed():
    """Import the module that needs Ray. Raises BitDanceError if Ray is not installed."""
    try:
        from . import ray_workers as distributed
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise BitDanceError('--ray needs Ray: pip install "bitdance[distributed]"') from error
    return distributed


def draw_and_record(
    pending: Sequence[Job], settings: RunSettings, executor: LocalProcess | Cluster, total: int
) -> dict[str, str]:
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


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Create the output folder and lock it against other runs. The system releases the lock of a dead process."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / LOCK, "ab")
    except OSError as error:
        raise BitDanceError(f"{out} cannot be written ({error})") from error
    with file:
        try:
            if os.name == "nt":
                import msvcrt

                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise BitDanceError(f"another run is writing into {out}; wait for it, or give another folder") from error
        except OSError as error:
            raise BitDanceError(f"{out} cannot be locked against other runs ({error})") from error
        shutil.rmtree(out / PARTIAL, ignore_errors=True)  # left by a killed run
        try:
            yield
        finally:
            shutil.rmtree(out / PARTIAL, ignore_errors=True)


def resume(out: Path, jobs: Sequence[Job], stamp: dict[str, str]) -> set[str]:
    """Return the finished ids: those in the manifest whose files all exist.

    Removes from the manifest the lines of missing files, and a last line cut short by a crash. Raises BitDanceError if
    a prompt was drawn with other settings or another model.
    """
    path = out / MANIFEST
    try:
        text = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise BitDanceError(f"{path} cannot be read ({error.strerror})") from error
    whole, _, _ = text.rpartition(b"\n")  # anything after the last newline was cut short
    lines: dict[str, bytes] = {}
    records: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            record = json.loads(line)
            name, is_there = record["id"], all(has_size(out / f["name"], f["size"]) for f in record["files"])
        except (ValueError, TypeError, KeyError) as error:
            raise BitDanceError(
                f"{path}, line {number} is not a record of a prompt; correct it or delete the file"
            ) from error
        if is_there:
            lines[name], records[name] = line, record
    for job in jobs:
        if job.row.id in records and (difference := differs(records[job.row.id], {**job.plan, "model": stamp})):
            raise BitDanceError(
                f"{out} already has '{job.row.id}', drawn with {difference}; choose another folder, or delete its files"
            )
    kept = b"".join(line + b"\n" for line in lines.values())
    if kept != text:
        write(path, kept, out)
    return lines.keys() & {job.row.id for job in jobs}


def has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def differs(record: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Describe the first value of a record that differs from the wanted one; "" if none does."""
    for name, value in wanted.items():
        found = record.get(name)
        if isinstance(value, dict) and isinstance(found, dict):
            for key in {**value, **found}:
                if found.get(key) != value.get(key):
                    return f"{'' if name == 'settings' else name + ' '}{key} {found.get(key)!r}, not {value.get(key)!r}"
        elif found != value:
            return f"{name} {found!r}, not {value!r}"
    return ""


def append(path: Path, record: dict[str, Any]) -> None:
    """Append a line to the manifest; it is on the disk when this returns."""
    try:
        with path.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise BitDanceError(f"{path} cannot be written ({error})") from error


def write(path: Path, data: bytes, out: Path) -> None:
    """Write a file completely or not at all: to a name unique to this process, then rename. Syncs to the disk."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (out / PARTIAL).mkdir(exist_ok=True)
        partial = out / PARTIAL / f"{path.name}.{platform.node()}.{os.getpid()}"
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise BitDanceError(f"{path} cannot be written ({error})") from error


def absolute_source(source: str) -> str:
    """Make a path absolute, for processes with another working folder; return names and hub ids unchanged."""
    return source if source in builtin_models() or not Path(source).exists() else str(Path(source).absolute())


def load(settings: RunSettings) -> Pipeline:
    path, dtype = locate(settings.source), devices.COMPUTE_DTYPES[settings.dtype]
    if CLASS_MODEL in find_layout(path).parts:
        return ImageNetPipeline.from_pretrained(path, settings.tokenizer, settings.device, dtype)
    return BitDancePipeline.from_pretrained(path, settings.device, dtype)


def draw_job(pipe: Pipeline, job: Job, settings: RunSettings) -> Outcome:
    """Draw a prompt and write its files; return its record, or the reason why it cannot be drawn.

    Raises BitDanceError, which ends the run, if a file cannot be written.
    """
    start = time.perf_counter()
    try:
        images = pipe.generate(**job.arguments).images
    except BitDanceError as error:
        return str(error)
    except torch.OutOfMemoryError:
        return f"not enough memory on {pipe.device}"
    files = []
    for name, data in zip(job.names, contents(job.plan["layout"], job.row, images)):
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
