"""A run of `finetune`: encode the pictures, load the model, train it or an adapter, write the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..checkpoints.checkpoint import ClassCheckpoint, TextCheckpoint
from ..checkpoints.load import CPU, load_weights
from ..errors import BitDanceError
from ..pipeline import PIPELINES
from ..sampling.patch import head_velocity
from ..tokenizer import BinaryTokenizer
from ..version import __version__
from . import layers, lora, whole
from .data import DataSet, Example, Subjects
from .encoded import BitsFolder, encode_all
from .objective import Batch, Velocity
from .others import Others, common_words
from .runner import Run
from .settings import WHOLE
from .sharding import gathered_all, is_sharded
from .trainer import Trainer


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
class ModelRun(Run):
    """A run on a model that draws; its settings are `Settings`."""

    checkpoint: TextCheckpoint | ClassCheckpoint
    subjects: Subjects
    bits: BitsFolder

    @property
    def is_whole(self) -> bool:
        return self.settings.adapter == WHOLE

    def start(self) -> None:
        if self.is_whole and not whole.has_plain_weights(self.checkpoint.parts.values()):
            raise BitDanceError(f"--full needs plain weights, and those of {self.args.model} are quantized")
        super().start()

    def is_mixed(self) -> bool:
        return self.is_whole and self.dtype == torch.bfloat16

    def prepare(self) -> Trainer:
        tokenizer = self._tokenizer()
        self._encode(tokenizer)
        self.model, parameters = self._model()
        self.pipe = None
        in_step = is_sharded(self.accelerator)
        if self.args.sample:
            # a kernel would compute a block of the head without calling it, and split weights are not whole then
            velocity = partial(head_velocity, self.model.head) if in_step else None
            kind = PIPELINES[type(self.checkpoint)]
            self.pipe = kind(self.model, tokenizer, self.checkpoint.prompts, velocity=velocity)
        source = FolderSource(self.data, self.subjects, self.bits, self.settings.flip)
        untouched = None if self.is_whole else partial(lora.disabled, self.model)
        dtype = torch.float32 if self.is_whole else self.dtype
        objective = Velocity(self.model, self.settings, dtype, untouched, in_step)
        self.trainer = Trainer(objective, parameters, source, self.settings, self.accelerator)
        return self.trainer

    def _tokenizer(self) -> BinaryTokenizer:
        autoencoder, device = self.checkpoint.tokenizer.build(), self.accelerator.device
        load_weights([(autoencoder, self.checkpoint.tokenizer.component)], device, self.dtype)
        return BinaryTokenizer(autoencoder, device, self.dtype)

    def _encode(self, tokenizer: BinaryTokenizer) -> None:
        """Encode new pictures, on one process."""
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
        dtype = torch.float32 if self.is_whole else self.dtype
        # FSDP puts each layer's part on the device, where the whole may have no room
        device = CPU if is_sharded(self.accelerator) else self.accelerator.device
        load_weights(self.checkpoint.modules(model), device, dtype)
        if self.is_whole:
            parameters = dict(model.requires_grad_(True).named_parameters())
        else:
            parameters = lora.insert(model, self._adapter(), settings.seed)
        if settings.checkpoint_layers:
            layers.recompute_layers(model)
        return model, parameters

    def _adapter(self) -> lora.Adapter:
        settings = self.settings
        return lora.Adapter(settings.adapter, settings.rank, settings.alpha, settings.targets)

    def sample(self, step: int) -> None:
        if self.pipe is not None:
            for number, prompt in enumerate(self.args.sample, start=1):
                arguments = self.pipe.subject(prompt, num_images=1)
                drawn = self.trainer.call(partial(self.pipe.generate, **arguments, seed=number))
                if self.accelerator.is_main_process:
                    self.folder.sample(drawn.images[0], step, number)

    def save(self, step: int) -> None:
        if not self.is_whole:
            self._write_lora(self.folder.latest, step)

    def write(self) -> None:
        if not self.is_whole:
            self._write_lora(self.folder.out, self.settings.steps)
            return
        is_main, args = self.accelerator.is_main_process, self.args
        parameters = gathered_all(dict(self.model.named_parameters()), is_main)
        if is_main:
            captions = [example.words for example in self.data.examples]
            whole.write_whole_model(self.folder.out, self.checkpoint, args.model, args.tokenizer, parameters, captions)

    def size(self) -> int:
        return sum(file.stat().st_size for file in self.folder.out.iterdir()) if self.is_whole else super().size()

    def _write_lora(self, path: Path, step: int) -> None:
        is_main = self.accelerator.is_main_process
        lora.write_lora(path, self.model, self._adapter(), self.dtype, self._about(step), is_main)

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
