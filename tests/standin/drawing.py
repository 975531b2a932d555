"""Load and draw as the nodes do, one node after the other."""

from __future__ import annotations

from importlib import import_module

from device import end_node
from graphs import PROMPT


def encode(clip, text=PROMPT):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def draw(pack, model, positive, side=64, steps=2, batch=1, options=None, seed=0):
    """A NodeOutput of the Next-Patch Sampler; `side` 0 is the model's own size."""
    sampling, grid = import_module("pack.nodes.sampling"), import_module("pack.bitdance_core.bits.grid")
    try:
        return sampling.BitDanceNextPatchSampler.execute(
            model, positive, grid.BitGrid(batch, side, side), seed, steps, 3.0, "euler_maruyama", 1.0,
            options=options, allow_untrained_size=True,
        )  # fmt: skip
    finally:
        end_node()


def bits_of(output):
    return output.args[0].bits()
