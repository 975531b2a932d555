"""`batch` on several GPUs or hosts, as a Ray job: each worker loads the model once and draws one prompt at a time.

A worker writes pictures, into a folder that all hosts share; only the driver, the process that was started by hand,
writes the manifest. The one module that needs Ray (`pip install "bitdance[distributed]"`).
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

# before Ray is imported, which reads them: it reports on its use unless told not to, and warns of a change to come
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray  # noqa: E402
from ray.exceptions import RayActorError, RayError, RayTaskError  # noqa: E402

from ..errors import BitDanceError  # noqa: E402
from .jobs import Job  # noqa: E402
from .run import Outcome, Studio, draw, load  # noqa: E402

TRIES = 3  # workers that may die over one prompt, or in a row while they load the model
STORE_BYTES = 100 * 2**20  # jobs and records are small; pictures go to files


@dataclass(frozen=True)
class Cluster:
    """Where workers run: `threads` of PyTorch each, None for what the environment says."""

    workers: int
    device: str
    dtype: torch.dtype
    threads: int | None

    def draw(self, jobs: Sequence[Job], studio: Studio) -> Iterator[tuple[Job, Outcome]]:
        """Each job's outcome, as they come. A job whose worker dies goes to the end of the queue, and a new worker
        takes the dead one's place.
        """
        queue, deaths, failed_starts = deque(jobs), Counter(), 0
        running = {}  # what Ray promised -> the worker it comes from, and its job, None while it loads

        def start() -> None:
            worker = Painter.options(num_gpus=1 if self.device == "cuda" else 0).remote(studio, self.threads)
            running[worker.load.remote()] = worker, None

        for _ in range(min(self.workers, len(jobs))):
            start()
        while queue or any(job for _, job in running.values()):
            (ready,), _ = ray.wait(list(running), num_returns=1)
            worker, job = running.pop(ready)
            try:
                outcome = ray.get(ready)
            except RayTaskError as error:
                raise (error.cause or error) from error  # what ends a run without Ray, too
            except RayActorError as error:
                ray.kill(worker)  # it may only be out of reach
                if job is None:
                    failed_starts += 1
                    if failed_starts == TRIES:
                        raise BitDanceError(f"workers die while they load the model ({first_line(error)})") from error
                else:
                    deaths[job.row.id] += 1
                    if deaths[job.row.id] < TRIES:
                        queue.append(job)
                    else:
                        yield job, f"{TRIES} workers died drawing it ({first_line(error)})"
                if len(running) < min(self.workers, len(queue)):
                    start()
                continue
            except RayError as error:  # the code could not be brought there, say
                raise BitDanceError(f"a Ray worker cannot run ({first_line(error)})") from error
            if job is None:
                failed_starts = 0
            else:
                yield job, outcome
            if queue:
                job = queue.popleft()
                promise = worker.draw.options(name=f"draw {job.row.id}").remote(job)  # the process's title, too
                running[promise] = worker, job
            else:
                ray.kill(worker)


@ray.remote(num_cpus=1, max_restarts=0, scheduling_strategy="SPREAD")
class Painter:
    """A worker. It loads in a call of its own, so that a model's errors come back as they are."""

    def __init__(self, studio: Studio, threads: int | None) -> None:
        self.studio = studio
        if threads is not None:
            torch.set_num_threads(min(threads, os.cpu_count() or 1))

    def load(self) -> None:
        self.pipe = load(self.studio)

    def draw(self, job: Job) -> Outcome:
        return draw(self.pipe, job, self.studio)


@contextmanager
def connect(address: str, workers: int | None, device: str | None) -> Iterator[Cluster]:
    """A running cluster by its address, "" for the one that RAY_ADDRESS names, or else a new one on this machine.

    Without a count of workers: one for each GPU, or one. Raises BitDanceError where there is no such cluster, or it is
    too small.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    check_reachable(address)
    settings = {}
    if address == "local":
        cpus = max(os.cpu_count() or 1, workers or 1)
        settings = {"include_dashboard": False, "object_store_memory": STORE_BYTES, "num_cpus": cpus}
    try:
        joined = ray.init(
            address,
            # every worker runs the driver's code, wherever that lies
            runtime_env={"py_modules": [str(Path(__file__).parents[1])]},
            log_to_driver=False,
            logging_level=logging.ERROR,
            **settings,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BitDanceError(f"no Ray cluster at '{address}' ({first_line(error)})") from error
    try:
        has = ray.cluster_resources()
        gpus, cpus = int(has.get("GPU", 0)), int(has.get("CPU", 0))
        on_gpu = gpus > 0 if device is None else device.startswith("cuda")
        slots, kind = (gpus, "GPUs") if on_gpu else (cpus, "CPUs")
        workers = workers or (gpus if on_gpu else 1)
        if not 1 <= workers <= slots:
            raise BitDanceError(f"--workers {max(workers, 1)} needs as many {kind}, and the cluster has {slots}")
        threads = None if "OMP_NUM_THREADS" in os.environ else max(1, cpus // workers)
        device = "cuda" if on_gpu else device or "cpu"  # Ray shows a worker its own GPU alone
        yield Cluster(workers, device, torch.float32 if device == "cpu" else torch.bfloat16, threads)
    finally:
        ray.shutdown()
        if address == "local":  # 11 MB of logs and code, which Ray leaves behind
            shutil.rmtree(joined.address_info["session_dir"], ignore_errors=True)


def check_reachable(address: str) -> None:
    """Raise BitDanceError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:  # a port above 65535
            raise BitDanceError(f"no Ray cluster at '{address}' ({error})") from error


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
