"""A request, and its plan: one step per patch, decided before any network runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from torch import Tensor

from ..model.fields import Size
from ..model.grid import Grid
from .editing import Edit
from .flow import Schedule
from .settings import Sampling

# of all rows, read in one pass: more would keep no device busier, but take more memory than all else
READ_TOKENS = 1024


@dataclass(frozen=True)
class Step:
    """How one patch is drawn.

    `noise_draws` counts those of a fresh image: a kept patch draws its noise too, so that the noise of a patch does not
    depend on which others are kept. Where `is_separate`, each guidance branch draws the patch for itself.
    """

    patch: int
    schedule: Schedule
    noise_draws: int
    guidance: float
    is_kept: bool  # by every image of the batch
    is_separate: bool


@dataclass(frozen=True)
class Request:
    """What to draw: `num_images` images of one grid, all branches and images in every network call.

    `branches` are what the model's `reader` takes: conditional ones and, where the sampling is guided, an unconditional
    one, last. With several conditional branches, `regions` [patches, P] says which of them each token follows.
    `indices`, one for each image, make an image's noise independent of its batch (see `NoiseSource`).
    """

    branches: Sequence[Sequence[int]]
    grid: Grid
    sampling: Sampling
    num_images: int
    edit: Edit | None = None
    regions: Tensor | None = None
    indices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        assert self.indices is None or len(self.indices) == self.num_images
        assert self.conditional == 1 if self.regions is None else self.regions.max() < self.conditional

    @property
    def conditional(self) -> int:
        """Count the conditional branches."""
        return len(self.branches) - (self.sampling.branches - 1)

    @property
    def patches_at_once(self) -> int:
        """Count the patches that are read in one pass at most."""
        return max(1, READ_TOKENS // (len(self.branches) * self.num_images * self.grid.tokens_per_patch))

    def passes(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Divide patches first to last - 1 into passes, each from its first patch to before its last."""
        return pairwise([*range(first, last, self.patches_at_once), last])

    def size(self, downscale: int) -> Size:
        """Return (height, width) in pixels."""
        return self.grid.height * downscale, self.grid.width * downscale

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """Plan every patch up to the last one that is drawn; empty where all are kept."""
        grid, patches = self.grid, self.grid.num_patches
        starts = [0.0] * patches if self.edit is None else self.edit.starts(grid)
        drawn = [i for i, start in enumerate(starts) if start < 1]
        return tuple(self._step(i, starts[i]) for i in range(drawn[-1] + 1 if drawn else 0))

    def _step(self, patch: int, start: float) -> Step:
        sampling, patches = self.sampling, self.grid.num_patches
        fresh = sampling.schedule_of(patch, patches)
        return Step(
            patch=patch,
            schedule=sampling.schedule_of(patch, patches, start) if 0 < start < 1 else fresh,
            noise_draws=fresh.noise_draws,
            guidance=sampling.guidance_of(patch, patches),
            is_kept=start >= 1,
            is_separate=sampling.is_separate(patch, patches),
        )

    def evaluations(self) -> int:
        """Count the network evaluations, before each of which `generate` calls `cancel`.

        They are the head's, for each drawn patch, and the backbone's: the prompt, and what lies between drawn patches.
        """
        drawn = [step for step in self.steps if not step.is_kept]
        between = pairwise([0, *(step.patch for step in drawn)])
        reads = sum(1 for first, last in between for _ in self.passes(first, last))
        return sum(step.schedule.evaluations for step in drawn) + bool(drawn) + reads
