"""Run sections in a process of their own: one that hangs is ended, one that breaks its CUDA context harms no other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.gpu_sections.setting import NotPossible, Options, Row, Setting, free, one_line
from benchmarks.gpu_sections.written import describe
from bitdance_core.errors import BitDanceError

Function = Callable[[Setting], Iterator[Row]]
START = 120.0  # seconds for a process to import everything and find its device
END = 10.0  # seconds for one to end
DONE, CUT_OFF = "done", "cut off"


class Worker:
    """A process that runs one section after the other.

    `machine` describes where. Raises BitDanceError for a device that is not there.
    """

    def __init__(self, options: Options, seconds: float = START) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, options), daemon=False)
        self.process.start()
        theirs.close()
        self.busy = False
        kind, self.machine = self._receive(seconds)
        if kind != "ready":
            self.stop()
            raise BitDanceError(str(self.machine))

    def run(self, function: Function, seconds: float) -> tuple[str, list[Row]]:
        """Run a section for at most so many seconds; return how it ended, and its rows so far.

        The worker is of no more use unless it ended with "done" or "not possible".
        """
        rows: list[Row] = []
        end = time.monotonic() + seconds
        self.busy = True
        self.pipe.send((function, seconds))
        while True:
            kind, value = self._receive(end - time.monotonic())
            if kind != "row":
                self.busy = kind == CUT_OFF
                return f"{kind}: {value}" if value else kind, rows
            rows.append(value)

    def stop(self) -> None:
        """End the process and those that it started."""
        self.pipe.close()  # an idle one ends by itself
        self.process.join(0 if self.busy else END)
        if self.process.pid is not None and self.process.is_alive():
            if hasattr(os, "killpg") and os.getpgid(self.process.pid) == self.process.pid:
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
            self.process.join()

    def _receive(self, seconds: float) -> tuple[str, Any]:
        try:
            if self.pipe.poll(max(0.0, seconds)):
                return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            return "failed", f"its process ended with code {self.process.exitcode}"
        return CUT_OFF, "its time was over"


def serve(pipe: Connection, options: Options) -> None:
    """Run the sections that come through the pipe until it is closed."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # what a section starts, such as a compiler, ends with it
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        setting = Setting.choose(options)
    except BitDanceError as error:
        pipe.send(("refused", str(error)))
        return
    if setting.is_cuda:
        torch.cuda.set_device(setting.device)
    pipe.send(("ready", describe(setting)))
    with torch.inference_mode():
        while True:
            try:
                function, seconds = pipe.recv()
            except EOFError:
                return
            pipe.send(outcome(function, replace(setting, end=time.monotonic() + seconds), pipe))
            free(setting.device)


def end_with_parent() -> None:
    """End this process, and those that it started, when the one that started it is gone."""
    multiprocessing.parent_process().join()
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def outcome(function: Function, setting: Setting, pipe: Connection) -> tuple[str, str]:
    """Send a section's rows as they come; return how it ended."""
    try:
        for row in function(setting):
            pipe.send(("row", row))
    except NotPossible as reason:
        return "not possible", str(reason)
    except Exception as error:  # whatever it is: the report goes on
        return "failed", one_line(error)
    return DONE, ""
