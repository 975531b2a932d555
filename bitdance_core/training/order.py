"""Which pictures each step takes: all of one size, every picture as often as any other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def order(counts: Sequence[int], batch: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    """Yield, without end, a bucket and `batch` of its pictures by number; `counts` are the sizes of the buckets.

    A bucket is chosen in proportion to its pictures, which come shuffled, again and again. The order follows from the
    seed alone: a resumed run counts its steps off and is where it was.
    """
    rng = np.random.default_rng((seed, 0))
    share = np.array(counts) / sum(counts)
    waiting: list[list[int]] = [[] for _ in counts]
    while True:
        bucket = int(rng.choice(len(counts), p=share))
        while len(waiting[bucket]) < batch:
            waiting[bucket] += rng.permutation(counts[bucket]).tolist()
        chosen, waiting[bucket] = waiting[bucket][:batch], waiting[bucket][batch:]
        yield bucket, chosen
