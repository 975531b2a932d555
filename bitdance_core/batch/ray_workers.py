"""Run `batch` on several GPUs or hosts with Ray: each worker loads the model once and draws one prompt at a time.

Workers write the pictures, to a folder that all hosts share; only the driver, the process that the user started, writes
the manifest. This is the only module that needs Ray (`pip install "bitdance[distributed]"`).
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

from .run import RunSettings, draw_job

# before importing Ray, which reads them: no usage reports, and no warning about a future change of defaults
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray  # noqa: E402
from ray.exceptions import RayActorError, RayError, RayTaskError  # noqa: E402

from ..errors import BitDanceError  # noqa: E402
from .jobs import Job  # noqa: E402
from .run import Outcome, load  # noqa: E402

TRIES = 3  # deaths of workers allowed for one prompt, or in a row while loading the model
STORE_BYTES = 100 * 2**20  # jobs and records are small; pictures go to files


@dataclass(frozen=True)
class Cluster:
    """Draw on the workers of a Ray cluster, with `threads` of PyTorch each (None: the environment decides)."""

    workers: int
    device: str
    dtype: torch.dtype
    threads: int | None

    def draw_jobs(self, jobs: Sequence[Job], settings: RunSettings) -> Iterator[tuple[Job, Outcome]]:
        """Yield each job with its outcome, in order of completion.

        If a worker dies, its job goes to the end of the queue and a new worker starts. Raises BitDanceError if workers
        die while loading the model.
        """
        queue, deaths, failed_starts = deque(jobs), Counter(), 0
        running = {}  # Ray's reference to a result -> (its worker, its job; None while loading)

        def start() -> None:
            worker = Painter.options(num_gpus=1 if self.device == "cuda" else 0).remote(settings, self.threads)
            running[worker.load.remote()] = worker, None

        for _ in range(min(self.workers, len(jobs))):
            start()
        while queue or any(job for _, job in running.values()):
            (ready,), _ = ray.wait(list(running), num_returns=1)
            worker, job = running.pop(ready)
            try:
                outcome = ray.get(ready)
            except RayTaskError as error:
                raise (error.cause or error) from error  # the same error as without Ray
            except RayActorError as error:
                ray.kill(worker)  # it may be alive but unreachable
                if job is None:
                    failed_starts += 1
                    if failed_starts == TRIES:
                        raise BitDanceError(
                            f"{TRIES} workers died while loading the model ({first_line(error)})"
                        ) from error
                else:
                    deaths[job.row.id] += 1
                    if deaths[job.row.id] < TRIES:
                        queue.append(job)
                    else:
                        yield job, f"{TRIES} workers died drawing it ({first_line(error)})"
                if len(running) < min(self.workers, len(queue)):
                    start()
                continue
            except RayError as error:  # for example, the code could not be copied to the host
                raise BitDanceError(f"a Ray worker cannot start ({first_line(error)})") from error
            if job is None:
                failed_starts = 0
            else:
                yield job, outcome
            if queue:
                job = queue.popleft()
                result = worker.draw.options(name=f"draw {job.row.id}").remote(job)  # also the process's title
                running[result] = worker, job
            else:
                ray.kill(worker)


@ray.remote(num_cpus=1, max_restarts=0, scheduling_strategy="SPREAD")
class Painter:
    """A worker. Loading is a separate call, so that its errors reach the driver unchanged."""

    def __init__(self, settings: RunSettings, threads: int | None) -> None:
        self.settings = settings
        if threads is not None:
            torch.set_num_threads(min(threads, os.cpu_count() or 1))

    def load(self) -> None:
        self.pipe = load(self.settings)

    def draw(self, job: Job) -> Outcome:
        return draw_job(self.pipe, job, self.settings)


@contextmanager
def connect(address: str, workers: int | None, device: str | None) -> Iterator[Cluster]:
    """Connect to the cluster at `address`; "" means RAY_ADDRESS, or else a new cluster on this machine.

    `workers` None means one per GPU, or one without GPUs. Raises BitDanceError if the cluster cannot be reached or is
    too small.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    check_reachable(address)
    options = {}
    if address == "local":
        cpus = max(os.cpu_count() or 1, workers or 1)
        options = {"include_dashboard": False, "object_store_memory": STORE_BYTES, "num_cpus": cpus}
    try:
        joined = ray.init(
            address,
            # copies the driver's code to every worker
            runtime_env={"py_modules": [str(Path(__file__).parents[1])]},
            log_to_driver=False,
            logging_level=logging.ERROR,
            **options,
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
            raise BitDanceError(f"--workers {max(workers, 1)} needs as many {kind}; the cluster has {slots}")
        threads = None if "OMP_NUM_THREADS" in os.environ else max(1, cpus // workers)
        device = "cuda" if on_gpu else device or "cpu"  # each worker sees only its own GPU
        yield Cluster(workers, device, torch.float32 if device == "cpu" else torch.bfloat16, threads)
    finally:
        ray.shutdown()
        if address == "local":  # Ray leaves 11 MB of logs and code
            shutil.rmtree(joined.address_info["session_dir"], ignore_errors=True)


def check_reachable(address: str) -> None:
    """Raise BitDanceError if the address refuses connections: Ray itself would retry for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:  # a port above 65535
            raise BitDanceError(f"no Ray cluster at '{address}' ({error})") from error


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
