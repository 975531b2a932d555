"""What two computations of one picture must have in common where they may round differently: another batch size, thread
count, processor or kernel (docs/reproducibility.md). The same inputs in the same shapes must agree exactly instead.

A sample is what a patch's flow arrives at, before the sign makes bits of it. How far rounding moves it follows from
guidance and steps (formulas of docs/reproducibility.md; t a step's time, dt its length, g the guidance):

- A prediction is off by e, some 1e-6 in float32. Guidance makes g e_c - (g - 1) e_u of both branches' errors, so up to
  (2g - 1) e: 14 e at g = 7.5.
- The velocity divides it by max(1 - t, 0.05), and a step multiplies it by (1 + t) dt: each adds up to
  (2g - 1) e (1 + t) dt / (1 - t) to the error d of the sample so far, of which 1 - 2 dt / (1 - t) remains.
- The next prediction reads the moved sample: it is off by e + J d (J its slope), and guided again. So errors grow with
  the square of 2g - 1 and more, and the last step, where dt = 1 - t, returns the guided prediction itself.

J is the model's own, so `tolerance` sends errors of a known size through the model, its guidance and its steps, and
takes what arrives. Of the golden models' first patches that is so many times e: 15 at g = 1 (6 steps), 70 at g = 2 (5),
210 at g = 3 (8), 5000 at g = 7.5 (10).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from bitdance_core.model.head import DiffusionHead

# the largest error of a golden head's float32 prediction, against float64, was 1e-6 to 7e-6 at 41 times of the flow
PREDICTION_ERROR = 2**-18
TRIALS = 4  # signs of the errors; the largest result counts
SAFETY = 2  # for signs that are worse, and for what rounds outside the head: the condition and the noise


@contextmanager
def predictions_off(head: DiffusionHead, seed: int) -> Iterator[None]:
    """Add an error to every prediction of the head: +-PREDICTION_ERROR of its largest value (at least 1), at random."""
    predict, generator = head.predict, torch.Generator().manual_seed(seed)

    def off(*arguments) -> Tensor:
        predicted = predict(*arguments)
        signs = torch.full(predicted.shape, 0.5).bernoulli_(generator=generator) * 2 - 1
        return predicted + PREDICTION_ERROR * predicted.abs().amax().clamp_min(1) * signs.to(predicted)

    head.predict = off
    try:
        yield
    finally:
        del head.predict


def tolerance(head: DiffusionHead, samples: Callable[[], Sequence[Tensor]]) -> float:
    """How far rounding may move any of `samples()`, flows through the head of one patch or of several: see above."""
    plain, largest = samples(), 0.0
    for seed in range(TRIALS):
        with predictions_off(head, seed):
            moved = samples()
        largest = max(largest, *(float((a - b).abs().max()) for a, b in with_one_past(moved, plain)))
    return SAFETY * largest


def with_one_past(first: Sequence[Tensor], second: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of samples, in drawing order, up to the first with a bit that differs: what follows has another past."""
    assert len(first) == len(second) > 0
    for a, b in zip(first, second):
        yield a, b
        if not torch.equal(a > 0, b > 0):
            return


def check_sample(head: DiffusionHead, sample: Callable[[], Tensor], expected: Tensor) -> None:
    """Compare `sample()`, a patch's flow through the head, with a stored one."""
    atol = tolerance(head, lambda: [sample()])
    assert 0 < atol < 0.05 * expected.std(), atol  # far below what another guidance or count of steps changes
    torch.testing.assert_close(sample(), expected, atol=atol, rtol=0)


def samples_of(module: ModuleType, draw: Callable[[], object]) -> list[Tensor]:
    """The sample of each patch that `draw()` draws by the `binarize` of `module`."""
    samples, binarize = [], module.binarize

    def keep(sample: Tensor) -> Tensor:
        samples.append(sample.clone())
        return binarize(sample)

    module.binarize = keep
    try:
        draw()
    finally:
        module.binarize = binarize
    return samples


def check_close(found: Sequence[Tensor], expected: Sequence[Tensor], atol: float) -> None:
    """Compare pictures by the samples of their patches, as far as they have one past.

    Samples agree within `atol`; so bits do where a sample's distance from 0 is larger.
    """
    for ours, theirs in with_one_past(found, expected):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)
