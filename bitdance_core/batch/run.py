"""`batch`: a file of prompts becomes a folder of pictures with a manifest, which the next run goes on from.

A prompt is done once its line stands in the manifest. One process writes that file, and only after the prompt's
pictures bear their names; a run that dies at any point loses what it was drawing and nothing else. What is drawn again
comes out the same, as each prompt has its own seed.
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
class Studio:
    """Where and with what to draw; the same on every machine. `stamp` says which model it is, in which precision."""

    source: str
    tokenizer: str | None
    device: str
    dtype: str
    out: Path
    stamp: dict[str, str]


if TYPE_CHECKING:  # it needs Ray
    from .ray_workers import Cluster

# a manifest's record, or why a prompt could not be drawn
Outcome = dict[str, Any] | str


@dataclass(frozen=True)
class Here:
    """This process alone."""

    device: torch.device
    dtype: torch.dtype

    def draw(self, jobs: Sequence[Job], studio: Studio) -> Iterator[tuple[Job, Outcome]]:
        pipe = load(studio)
        for job in jobs:
            yield job, draw(pipe, job, studio)


def run(args: argparse.Namespace) -> None:
    """The command. Raises BitDanceError before any work for what cannot be, and at the end for prompts that failed."""
    if args.workers is not None and args.ray is None:
        raise BitDanceError("--workers is for --ray: without it, one process draws")
    if args.workers is not None:
        whole_number("--workers", args.workers, least=1)
    rows = read_rows(args.prompts, args.layout)
    model, files = outline(args.model, args.tokenizer)
    jobs = [plan(row, args, model) for row in rows]
    check_names(jobs)
    out = args.out.absolute()
    with locked(out), ExitStack() as stack:
        if args.ray is None:
            site = Here(*devices.choose(args.device, None))
        else:
            site = stack.enter_context(distributed().connect(args.ray, args.workers, args.device))
        dtype = args.dtype or str(site.dtype).removeprefix("torch.")
        stamp = {"family": model.config.family, "fingerprint": fingerprint(files), "dtype": dtype}
        tokenizer = args.tokenizer and everywhere(args.tokenizer)
        studio = Studio(everywhere(args.model), tokenizer, str(site.device), dtype, out, stamp)
        done = resume(out, jobs, stamp)
        failed = draw_and_note([job for job in jobs if job.row.id not in done], studio, site, len(jobs))
    if failed:
        name, reason = next(iter(failed.items()))
        raise BitDanceError(
            f"{len(failed)} of {len(jobs)} prompts could not be drawn ({name}: {reason}); the same command tries again"
        )
    print(f"{out / MANIFEST} ({len(jobs)} prompts, {len(done)} of them drawn before)")


def distributed():
    """The module that needs Ray."""
    try:
        from . import ray_workers as distributed
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise BitDanceError('--ray needs Ray: pip install "bitdance[distributed]"') from error
    return distributed


def draw_and_note(pending: Sequence[Job], studio: Studio, site: Here | Cluster, total: int) -> dict[str, str]:
    """Draw jobs and append their records to the manifest; the ids that failed, and why."""
    failed = {}
    if not pending:
        return failed
    with tqdm(total=total, initial=total - len(pending), unit="prompt", desc="drawing") as bar:
        for job, outcome in site.draw(pending, studio):
            if isinstance(outcome, str):
                failed[job.row.id] = outcome
                bar.write(f"{job.row.id} could not be drawn: {outcome}", file=sys.stderr)
            else:
                append(studio.out / MANIFEST, outcome)
                bar.update()
    return failed


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """The folder, made and kept from other runs. The system lets go of the lock of a process that died."""
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
        shutil.rmtree(out / PARTIAL, ignore_errors=True)  # a killed run's
        try:
            yield
        finally:
            shutil.rmtree(out / PARTIAL, ignore_errors=True)


def resume(out: Path, jobs: Sequence[Job], stamp: dict[str, str]) -> set[str]:
    """The ids that are done: in the manifest, with all their files. Lines of files that are gone, and a last line that
    a crash cut short, are taken out of it.

    Raises BitDanceError where a prompt was drawn with other settings or another model.
    """
    path = out / MANIFEST
    try:
        text = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise BitDanceError(f"{path} cannot be read ({error.strerror})") from error
    whole, _, _ = text.rpartition(b"\n")  # what follows the last line's end was cut short
    lines: dict[str, bytes] = {}
    records: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            record = json.loads(line)
            name, is_there = record["id"], all(has_size(out / f["name"], f["size"]) for f in record["files"])
        except (ValueError, TypeError, KeyError) as error:
            raise BitDanceError(
                f"{path}, line {number} is no record of a prompt; mend it or delete the file"
            ) from error
        if is_there:
            lines[name], records[name] = line, record
    for job in jobs:
        if job.row.id in records and (difference := differs(records[job.row.id], {**job.plan, "model": stamp})):
            raise BitDanceError(
                f"{out} has '{job.row.id}' already, drawn with {difference}; give another folder, or delete its files"
            )
    kept = b"".join(line + b"\n" for line in lines.values())
    if kept != text:
        write(path, kept, out)
    return lines.keys() & {job.row.id for job in jobs}


def has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def differs(record: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first value of a record that is not the wanted one, in words; "" where all are."""
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
    """One more line, on the disk when this returns."""
    try:
        with path.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise BitDanceError(f"{path} cannot be written ({error})") from error


def write(path: Path, data: bytes, out: Path) -> None:
    """A whole file or none, on the disk when this returns: under another name first, one that no other process has."""
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


def everywhere(source: str) -> str:
    """A model's name or path that means the same in a process of another working folder."""
    return source if source in builtin_models() or not Path(source).exists() else str(Path(source).absolute())


def load(studio: Studio) -> Pipeline:
    path, dtype = locate(studio.source), devices.DTYPES[studio.dtype]
    if CLASS_MODEL in find_layout(path).parts:
        return ImageNetPipeline.from_pretrained(path, studio.tokenizer, studio.device, dtype)
    return BitDancePipeline.from_pretrained(path, studio.device, dtype)


def draw(pipe: Pipeline, job: Job, studio: Studio) -> Outcome:
    """Draw a prompt and write its files; its record, or why it cannot be drawn. Others may still be.

    Raises BitDanceError where files cannot be written, which ends the run.
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
        write(studio.out / name, data, studio.out)
        files.append({"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    return {
        **job.plan,
        "model": studio.stamp,
        "line": job.row.line,
        "files": files,
        "source": studio.source,
        "device": str(pipe.device),
        "version": __version__,
        "seconds": round(time.perf_counter() - start, 3),
    }
