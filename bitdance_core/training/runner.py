"""A run of `finetune`: encode the pictures, load the model, train, save on the way, write the result."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available
from tqdm import tqdm

from ..checkpoints.checkpoint import ClassCheckpoint, TextCheckpoint
from ..checkpoints.load import load_weights
from ..checkpoints.locks import locked
from ..errors import BitDanceError, format_bytes
from ..pipeline import PIPELINES, Pipeline
from ..tokenizer import BinaryTokenizer
from ..version import __version__
from . import layers, lora, whole
from .data import DataSet, Example, Subjects
from .encoded import BitsFolder, encode_all
from .others import Others, common_words
from .run_folder import RunFolder
from .settings import WHOLE, Settings
from .trainer import Batch, Figures, Trainer

SMOOTHING = 0.95  # of the loss that the progress bar shows


class FolderSource:
    """The encoded pictures of a data set; with `flip` every second one is mirrored, at random."""

    def __init__(self, data: DataSet, subjects: Subjects, bits: BitsFolder, flip: bool) -> None:
        self.buckets: list[list[Example]] = list(data.buckets().values())
        self.counts = [len(examples) for examples in self.buckets]
        self.subjects, self.bits, self.flip = subjects, bits, flip
        self.others = Others(data, subjects)

    def batch(self, bucket: int, chosen: Sequence[int], rng: np.random.Generator) -> Batch:
        examples = [self.buckets[bucket][number] for number in chosen]
        size, mirrored = examples[0].size, rng.random(len(examples)) < 0.5
        bits = [self.bits.load(e.path, size, bool(m) and self.flip) for e, m in zip(examples, mirrored)]
        conditions = [example.condition for example in examples]
        others = self.others.conditions(examples, rng)
        return Batch(torch.stack(bits), conditions, self.subjects.unconditional(size), self.subjects.grid(size), others)


@dataclasses.dataclass
class Run:
    """Everything of a run that is known before weights are read."""

    args: argparse.Namespace
    checkpoint: TextCheckpoint | ClassCheckpoint
    settings: Settings
    data: DataSet
    subjects: Subjects
    bits: BitsFolder
    folder: RunFolder
    device: torch.device
    dtype: torch.dtype

    def start(self) -> None:
        """Train to the end, or until it is stopped. Raises BitDanceError, and KeyboardInterrupt after a stop."""
        if self.settings.adapter == WHOLE and not whole.is_trainable(self.checkpoint):
            raise BitDanceError(f"--full needs plain weights, and those of {self.args.model} are quantized")
        self.accelerator = self._accelerator()
        self.settings.split(self.accelerator.num_processes)
        with ExitStack() as stack:
            if self.accelerator.is_main_process:
                stack.enter_context(locked(self.folder.out))
            first, state = self.folder.begin(self.args.resume)
            self.accelerator.wait_for_everyone()
            tokenizer = self._tokenizer()
            self._encode(tokenizer)
            self._train(first, state, tokenizer if self.args.sample else None)

    def _accelerator(self) -> Accelerator:
        is_mixed = self.settings.adapter == WHOLE and self.dtype == torch.bfloat16
        if self.device.type == "cuda" and self.device.index:
            torch.cuda.set_device(self.device)
        if self.args.log_with and not is_tensorboard_available():  # accelerate would go on without it
            raise BitDanceError("--log-with tensorboard needs tensorboard, which is missing: pip install tensorboard")
        return Accelerator(
            cpu=self.device.type == "cpu",
            mixed_precision="bf16" if is_mixed else "no",
            gradient_accumulation_steps=self.settings.accumulate,
            log_with=self.args.log_with,
            project_dir=self.folder.folder,
        )

    def _tokenizer(self) -> BinaryTokenizer:
        autoencoder, device = self.checkpoint.tokenizer.build(), self.accelerator.device
        load_weights([(autoencoder, self.checkpoint.tokenizer.component)], device, self.dtype)
        return BinaryTokenizer(autoencoder, device, self.dtype)

    def _encode(self, tokenizer: BinaryTokenizer) -> None:
        """Encode new pictures, on one process, and name those that are left out."""
        for line in self.data.lines_of_left_out() if self.accelerator.is_main_process else ():
            print(line, file=sys.stderr)
        with self.accelerator.main_process_first():
            bar = None

            def show(done: int, total: int) -> None:
                nonlocal bar
                bar = bar or tqdm(total=total, unit="picture", desc="encoding")
                bar.update()

            encode_all(self.bits, self.data.examples, self.settings.flip, tokenizer, show)
            if bar is not None:
                bar.close()

    def _model(self) -> tuple[torch.nn.Module, dict[str, torch.nn.Parameter]]:
        """Load the model; return it with its trainable parameters by name."""
        settings, model = self.settings, self.checkpoint.build()
        if settings.quantize != "none":
            layers.quantize(model, settings.quantize)
        is_whole = settings.adapter == WHOLE
        dtype = torch.float32 if is_whole else self.dtype
        load_weights(self.checkpoint.modules(model), self.accelerator.device, dtype)
        if is_whole:
            parameters = dict(model.requires_grad_(True).named_parameters())
        else:
            parameters = lora.insert(model, self._adapter(), settings.seed)
        if settings.checkpoint_layers:
            layers.recompute_layers(model)
        return model, parameters

    def _adapter(self) -> lora.Adapter:
        settings = self.settings
        return lora.Adapter(settings.adapter, settings.rank, settings.alpha, settings.targets)

    def _train(self, first: int, state: dict[str, torch.Tensor], tokenizer: BinaryTokenizer | None) -> None:
        model, parameters = self._model()
        dtype = torch.float32 if self.settings.adapter == WHOLE else self.dtype
        source = FolderSource(self.data, self.subjects, self.bits, self.settings.flip)
        untouched = None if self.settings.adapter == WHOLE else partial(lora.disabled, model)
        trainer = Trainer(model, parameters, source, self.settings, dtype, self.accelerator, untouched)
        if state:
            trainer.load_state(state, first)
        pipe = None
        if tokenizer is not None:
            pipe = PIPELINES[type(self.checkpoint)](model, tokenizer, self.checkpoint.prompts)
        if self.args.log_with:
            self.accelerator.init_trackers("finetune", dataclasses.asdict(self.settings))
        done = first
        with stop_signals() as should_stop, self._bar(first) as bar:
            begun, loss = time.monotonic(), None
            if not first:
                self._sample(pipe, 0)
            for figures in trainer.run(first, should_stop):
                done = figures.step
                loss = figures.loss if loss is None else SMOOTHING * loss + (1 - SMOOTHING) * figures.loss
                speed = (done - first) * self.settings.batch / (time.monotonic() - begun)
                bar.set_postfix({"loss": f"{loss:.3f}", "pictures/s": f"{speed:.1f}"}, refresh=False)
                bar.update()
                self._note(figures, speed)
                if done % self.args.save_every == 0:
                    self._save(trainer, model, done)
                every = self.args.sample_every or max(1, self.settings.steps // 5)
                if done % every == 0 or done == self.settings.steps:
                    self._sample(pipe, done)
        if done < self.settings.steps:
            self._save(trainer, model, done)
            if self.accelerator.is_main_process:
                print(f"stopped after step {done}; go on with --resume", file=sys.stderr)
            raise KeyboardInterrupt
        self._finish(model)

    def _bar(self, first: int) -> tqdm:
        quiet = not self.accelerator.is_main_process
        return tqdm(total=self.settings.steps, initial=first, unit="step", desc="training", disable=quiet)

    def _note(self, figures: Figures, speed: float) -> None:
        line = {**dataclasses.asdict(figures), "pictures_per_second": round(speed, 3)}
        if self.args.log_with:
            self.accelerator.log({"loss": figures.loss, "wrong": figures.wrong, "lr": figures.rate}, figures.step)
        if self.accelerator.is_main_process:
            self.folder.log(line)

    def _save(self, trainer: Trainer, model: torch.nn.Module, step: int) -> None:
        if self.accelerator.is_main_process:
            self.folder.save(step, trainer.state())
            if self.settings.adapter != WHOLE:
                lora.write_lora(self.folder.latest, model, self._adapter(), self.dtype, self._about(step))

    def _sample(self, pipe: Pipeline | None, step: int) -> None:
        if pipe is not None and self.accelerator.is_main_process:
            for number, prompt in enumerate(self.args.sample, start=1):
                arguments = pipe.subject(prompt, num_images=1)
                self.folder.sample(pipe.generate(**arguments, seed=number).images[0], step, number)

    def _finish(self, model: torch.nn.Module) -> None:
        self.accelerator.wait_for_everyone()
        if self.args.log_with:
            self.accelerator.end_training()
        if not self.accelerator.is_main_process:
            return
        out = self.folder.out
        if self.settings.adapter == WHOLE:
            whole.write_whole_model(out, self.checkpoint, self.args.model, self.args.tokenizer, model)
            size = sum(file.stat().st_size for file in out.iterdir())
        else:
            lora.write_lora(out, model, self._adapter(), self.dtype, self._about(self.settings.steps))
            size = out.stat().st_size
        self.folder.finish()
        print(f"{self.args.out} ({format_bytes(size)})")

    def _about(self, step: int) -> dict[str, object]:
        return {
            "family": self.checkpoint.config.family,
            "words": " ".join(common_words(self.data)),
            "source": self.data.folder.name,
            "pictures": len(self.data.examples),
            "step": step,
            "settings": dataclasses.asdict(self.settings),
            "version": __version__,
        }


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
