"""Define a benchmark's case, and measure time and memory of its runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.meters import Moment, PeakMemory, mark, seconds_between, wait
from benchmarks.random_models import Model, fill_randomly, tokenizer_of
from bitdance_core.errors import Cancelled
from bitdance_core.model.class_config import ImageNetConfig
from bitdance_core.model.grid import Grid
from bitdance_core.model.text_config import Size
from bitdance_core.model.tokenizer_network import BinaryAutoencoder
from bitdance_core.sampling.plan import Request
from bitdance_core.sampling.settings import Sampling

PROMPT_TOKENS, TEMPLATE_TOKENS = 40, 4  # a prompt of about 30 words in its template, and the empty template


@dataclass(frozen=True)
class Case:
    """The work to measure: the first `patches` patches of `batch` pictures drawn at once."""

    model: Model
    grid: Grid
    sampling: Sampling
    batch: int
    patches: int
    device: torch.device
    dtype: torch.dtype
    in_cpu_time: bool = False

    def mark(self) -> Moment:
        """Record a moment: of the clock, or of the processor's time that this process took in all its threads."""
        return time.process_time() if self.in_cpu_time else mark(self.device)

    @property
    def size(self) -> Size:
        return self.model.config.defaults.default_size

    @property
    def is_whole(self) -> bool:
        return self.patches == self.grid.num_patches

    @property
    def evaluations(self) -> int:
        """Evaluations of the head per patch."""
        return self.sampling.schedule_of(0, self.grid.num_patches).evaluations

    @property
    def branches(self) -> list[list[int]]:
        """The branches for `generate`: classes, or token ids, of which only the number matters."""
        config = self.model.config
        if isinstance(config, ImageNetConfig):
            return [[207] * self.batch, [config.null_class] * self.batch][: self.sampling.branches]
        opening = 2 + config.tokens_per_patch  # vision_start, two sides, and the queries
        return [[0] * (n + opening) for n in (PROMPT_TOKENS, TEMPLATE_TOKENS)][: self.sampling.branches]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each branch before the first patch."""
        config = self.model.config
        if isinstance(config, ImageNetConfig):
            return [config.class_tokens + config.tokens_per_patch - 1] * self.sampling.branches
        return [len(branch) for branch in self.branches]

    @property
    def request(self) -> Request:
        return Request(self.branches, self.grid, self.sampling, self.batch)

    def settings(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "batch": self.batch,
            "sampler": self.sampling.sampler,
            "steps": self.sampling.steps,
            "evaluations": self.evaluations,
            "guidance": self.sampling.guidance,
            "schedule": self.sampling.schedule,
            "lengths": self.lengths,
            "patches": self.grid.num_patches,
            "drawn": self.patches,
        }


@dataclass(frozen=True)
class Run:
    """Seconds until the first evaluation of the head; of the backbone for each patch but the first; of the head for
    each patch; and of the whole call if it drew all patches. The parts cover the call without gaps.
    """

    prefill: float
    backbone: list[float]
    head: list[float]
    whole: float | None
    memory_before: int | None  # bytes
    memory_peak: int | None


def take_turns(case: Case, contenders: dict[str, Callable], count: int) -> dict[str, list[Run]]:
    """Run the contenders `count` times in turns, after a warm-up, so that load on the machine affects all of them."""
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for _ in range(count + 1):
        for name, contender in contenders.items():
            # the core draws noise on the CPU (same picture on every device), the official pipeline on the device
            generator = torch.Generator(case.device if name == "baseline" else "cpu")
            runs[name].append(time_run(case, contender, generator.manual_seed(0)))
    return {name: those[1:] for name, those in runs.items()}


def time_run(case: Case, contender: Callable, generator: torch.Generator) -> Run:
    """Time a `generate` with its hooks: `cancel`, called before each network call, and `callback`, after each patch.

    The time between two calls of the hooks counts for the first.
    """
    marks: list[list] = [[]]  # per patch: one moment per network call, and one when the patch is done
    device = case.device

    def cancel() -> bool:
        marks[-1].append(case.mark())
        return len(marks) > case.patches and not case.is_whole

    def drawn(*_) -> None:
        marks[-1].append(case.mark())
        marks.append([])

    wait(device)
    memory = PeakMemory(device)
    begin = case.mark()
    try:
        contender(case.request, generator, device, case.dtype, callback=drawn, cancel=cancel)
    except Cancelled:
        pass
    end = case.mark()
    wait(device)
    patches = marks[: case.patches]
    begins = [begin, *(times[-1] for times in patches)]  # where the backbone begins, for each patch
    prefill, *backbone = [seconds_between(start, times[1]) for start, times in zip(begins, patches)]
    head = [seconds_between(times[1], times[-1]) for times in patches]
    whole = seconds_between(begin, end) if case.is_whole else None
    return Run(prefill, backbone, head, whole, memory.before, memory.read())


@dataclass(frozen=True)
class Decode:
    seconds: float
    memory_before: int | None  # bytes
    memory_peak: int | None


def time_decoding(case: Case, size: Size, count: int) -> list[Decode]:
    """Time the decoding of one picture of `size` (height, width) pixels, `count` times after a warm-up."""
    config, device = tokenizer_of(case.model.config), case.device
    autoencoder = BinaryAutoencoder(config, device="meta").eval()
    fill_randomly(autoencoder.decoder, device, case.dtype)
    tokens = [side // config.downscale for side in size]
    bits = torch.randint(2, (1, config.bits, *tokens), device=device).to(case.dtype) * 2 - 1
    decodes = []
    for _ in range(count + 1):
        wait(device)
        memory, begin = PeakMemory(device), case.mark()
        autoencoder.decode(bits)
        end = case.mark()
        wait(device)
        decodes.append(Decode(seconds_between(begin, end), memory.before, memory.read()))
    return decodes[1:]
