"""A run of training: where it stands, its bar, log, samples and saves, and what stops it. What is trained, and what is
written, its subclasses say.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available, parse_flag_from_env
from tqdm import tqdm

from ..checkpoints.locks import locked
from ..errors import BitDanceError, format_bytes
from .data import DataSet
from .optimizer import check_optimizer
from .run_folder import RunFolder
from .settings import Schedule
from .sharding import check_sharded, is_sharded, plugin_for, report
from .trainer import Figures, Trainer

OTHER_KINDS = ("DEEPSPEED", "MEGATRON_LM")  # of distribution, by accelerate, which are not supported
SMOOTHING = 0.95  # of the loss that the progress bar shows


@dataclasses.dataclass
class Run:
    """What is known of every run before weights are read."""

    args: argparse.Namespace
    settings: Schedule
    data: DataSet
    folder: RunFolder
    device: torch.device
    dtype: torch.dtype

    can_be_split = True  # among processes, by FSDP

    def is_mixed(self) -> bool:
        """Whether float32 weights are trained by computations in bfloat16."""
        raise NotImplementedError

    def prepare(self) -> Trainer:
        """Encode and load what is trained. Called once, on each process."""
        raise NotImplementedError

    # These are called on the main process, which writes; on all, where each holds a part of the weights (`takes_part`).

    def sample(self, step: int) -> None:
        """Write what shows the state after a step."""

    def save(self, step: int) -> None:
        """Write the result as of a step beside the state, if that is worth it."""

    def write(self) -> None:
        """Write the result."""
        raise NotImplementedError

    def size(self) -> int:
        """Return the bytes of the result."""
        return self.folder.out.stat().st_size

    @property
    def takes_part(self) -> bool:
        """Whether this process has a part in samples and saves."""
        return self.accelerator.is_main_process or is_sharded(self.accelerator)

    def start(self) -> None:
        """Train to the end, or until it is stopped. Raises BitDanceError, and KeyboardInterrupt after a stop."""
        self.accelerator = self._accelerator()
        self.settings.split(self.accelerator.num_processes)
        check_optimizer(self.settings.optimizer, self.accelerator.device)
        with ExitStack() as stack:
            if self.accelerator.is_main_process:
                stack.enter_context(locked(self.folder.out))
            first, state = self.folder.begin(self.args.resume)
            self.accelerator.wait_for_everyone()
            for line in self.data.lines_of_left_out() if self.accelerator.is_main_process else ():
                print(line, file=sys.stderr)
            trainer = self.prepare()
            if is_sharded(self.accelerator) and self.accelerator.is_main_process:
                print(report(trainer.network, self.accelerator.num_processes), file=sys.stderr)
            if state:
                trainer.load_state(state, first)
            self._train(trainer, first)

    def _accelerator(self) -> Accelerator:
        if self.device.type == "cuda" and self.device.index:
            torch.cuda.set_device(self.device)
        for kind in OTHER_KINDS:  # accelerate would take processes of the CPU as if it were not set
            if parse_flag_from_env(f"ACCELERATE_USE_{kind}"):
                raise BitDanceError(f"accelerate is set to {kind}; choose multi-GPU or FSDP in `accelerate config`")
        plugin = plugin_for(self.settings.optimizer)
        if plugin is not None and not self.can_be_split:
            raise BitDanceError("accelerate is set to FSDP, and a tokenizer is not split; choose multi-GPU")
        if self.args.log_with and not is_tensorboard_available():  # accelerate would go on without it
            raise BitDanceError("--log-with tensorboard needs tensorboard, which is missing: pip install tensorboard")
        accelerator = Accelerator(
            cpu=self.device.type == "cpu",
            mixed_precision="bf16" if self.is_mixed() else "no",
            gradient_accumulation_steps=self.settings.accumulate,
            log_with=self.args.log_with,
            project_dir=self.folder.folder,
            fsdp_plugin=plugin,
        )
        if plugin is not None:
            check_sharded(accelerator)
        return accelerator

    def _train(self, trainer: Trainer, first: int) -> None:
        if self.args.log_with:
            self.accelerator.init_trackers("tensorboard", dataclasses.asdict(self.settings))
        done = first
        with stop_signals() as should_stop, self._bar(first) as bar:
            begun, loss = time.monotonic(), None
            if not first and self.takes_part:
                self.sample(0)
            for figures in trainer.run(first, should_stop):
                done = figures.step
                loss = figures.loss if loss is None else SMOOTHING * loss + (1 - SMOOTHING) * figures.loss
                speed = (done - first) * self.settings.batch / (time.monotonic() - begun)
                bar.set_postfix({"loss": f"{loss:.3f}", "pictures/s": f"{speed:.1f}"}, refresh=False)
                bar.update()
                self._note(figures, trainer.figure, speed)
                if done % self.args.save_every == 0:
                    self._save(trainer, done)
                every = self.args.sample_every or max(1, self.settings.steps // 5)
                if self.takes_part and (done % every == 0 or done == self.settings.steps):
                    self.sample(done)
        if done < self.settings.steps:
            self._save(trainer, done)
            if self.accelerator.is_main_process:
                print(f"stopped after step {done}; go on with --resume", file=sys.stderr)
            raise KeyboardInterrupt
        self._finish()

    def _bar(self, first: int) -> tqdm:
        quiet = not self.accelerator.is_main_process
        return tqdm(total=self.settings.steps, initial=first, unit="step", desc="training", disable=quiet)

    def _note(self, figures: Figures, name: str, speed: float) -> None:
        values = {"loss": figures.loss, name: figures.figure, "rate": figures.rate}
        if self.args.log_with:
            self.accelerator.log(values, figures.step)
        if self.accelerator.is_main_process:
            self.folder.log({"step": figures.step, **values, "pictures_per_second": round(speed, 3)})

    def _save(self, trainer: Trainer, step: int) -> None:
        if self.takes_part:
            state = trainer.state()
            if self.accelerator.is_main_process:
                self.folder.save(step, state)
            self.save(step)

    def _finish(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.args.log_with:
            self.accelerator.end_training()
        if self.takes_part:
            self.write()
        if self.accelerator.is_main_process:
            self.folder.finish()
            print(f"{self.args.out} ({format_bytes(self.size())})")


@contextmanager
def stop_signals() -> Iterator:
    """Yield a function that tells whether Ctrl-C or `kill` asked to stop; the step is finished first.

    A second Ctrl-C stops at once.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: object) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
