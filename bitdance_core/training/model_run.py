"""A run of `finetune`: encode the pictures, load the model, train it or an adapter, write the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from ..checkpoints.checkpoint import ClassCheckpoint, TextCheckpoint
from ..checkpoints.load import load_weights
from ..errors import BitDanceError
from ..pipeline import PIPELINES
from ..tokenizer import BinaryTokenizer
from ..version import __version__
from . import layers, lora, whole
from .data import DataSet, Example, Subjects
from .encoded import BitsFolder, encode_all
from .objective import Batch, Velocity
from .others import Others, common_words
from .runner import Run
from .settings import WHOLE
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
        if self.args.sample:
            self.pipe = PIPELINES[type(self.checkpoint)](self.model, tokenizer, self.checkpoint.prompts)
        source = FolderSource(self.data, self.subjects, self.bits, self.settings.flip)
        untouched = None if self.is_whole else partial(lora.disabled, self.model)
        objective = Velocity(self.model, self.settings, torch.float32 if self.is_whole else self.dtype, untouched)
        return Trainer(objective, parameters, source, self.settings, self.accelerator)

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
        load_weights(self.checkpoint.modules(model), self.accelerator.device, dtype)
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
                self.folder.sample(self.pipe.generate(**arguments, seed=number).images[0], step, number)

    def save(self, step: int) -> None:
        if not self.is_whole:
            lora.write_lora(self.folder.latest, self.model, self._adapter(), self.dtype, self._about(step))

    def write(self) -> int:
        out = self.folder.out
        if self.is_whole:
            captions = [example.words for example in self.data.examples]
            whole.write_whole_model(out, self.checkpoint, self.args.model, self.args.tokenizer, self.model, captions)
            return sum(file.stat().st_size for file in out.iterdir())
        lora.write_lora(out, self.model, self._adapter(), self.dtype, self._about(self.settings.steps))
        return out.stat().st_size

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
