"""The training loss of both kinds of model: whole pictures through the code that draws, in one pass.

The facts are those of docs/facts.md#training. Everything random is drawn beforehand, on the CPU, so that a step can be
repeated, and split into parts that see the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.class_model import ClassReader, ImageNetModel
from ..model.grid import Grid
from ..model.reader import Reader
from ..model.text_model import BitDance, TextReader
from ..sampling.flow import velocity_from_x

# what a picture is drawn from: a prompt's token ids, image opening included, or the number of a class
Condition = Sequence[int] | int


@dataclass(frozen=True)
class Corruption:
    """How training disturbs pictures and conditions; the defaults are the published models'."""

    drop: float = 0.1  # share of pictures whose condition is replaced by the unconditional one
    flips: float = 0.1  # a bit of the context is flipped where r1 < flips * r2: half of it, on average
    keep: float = 0.0  # share of pictures that teach what is to stay as it is; see `Kept`
    times: int = 1  # how often a patch is used in a step, each at a time and with noise of its own
    time_mean: float = -0.8  # mean of logit(t)
    time_std: float = 0.8


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step over B pictures of N patches, P tokens of C bits each."""

    dropped: Tensor  # bool [B]
    kept: Tensor  # bool [B]
    flipped: Tensor  # bool [B, N, P, C]
    t: Tensor  # [times, B, N] in (0, 1)
    noise: Tensor  # [times, B, N, P, C]

    @classmethod
    def make(cls, shape: Sequence[int], corruption: Corruption, time_shift: float, generator: torch.Generator) -> Draws:
        """Draw for tokens of `shape` [B, N, P, C], on the generator's device."""
        options = {"generator": generator, "device": generator.device}
        dropped = torch.rand(shape[0], **options) < corruption.drop
        kept = torch.rand(shape[0], **options) < corruption.keep
        most = corruption.flips * torch.rand(shape, **options)
        flipped = torch.rand(shape, **options) < most
        t = torch.sigmoid(
            corruption.time_mean + corruption.time_std * torch.randn(corruption.times, *shape[:2], **options)
        )
        t = (1 / time_shift) / (1 / time_shift + (1 / t - 1))
        return cls(dropped, kept, flipped, t, torch.randn(corruption.times, *shape, **options))

    def rows(self, rows: slice | Tensor) -> Draws:
        """Return the numbers of some of the pictures."""
        return Draws(self.dropped[rows], self.kept[rows], self.flipped[rows], self.t[:, rows], self.noise[:, rows])

    def to(self, device: torch.device | str) -> Draws:
        return Draws(*(tensor.to(device) for tensor in vars(self).values()))


@dataclass(frozen=True)
class Kept:
    """Where `draws.kept` is set, a picture comes with another condition, and the target is not its bits but what the
    untouched model predicts: so what the pictures do not show stays as it was.
    """

    conditions: Sequence[Condition]  # one per picture
    untouched: Callable[[], AbstractContextManager]  # in it, the model is as it was before training
    in_step: bool = False  # predict even if no picture is kept, as other processes may have to


def velocity_loss(
    model: BitDance | ImageNetModel,
    conditions: Sequence[Condition],
    unconditional: Condition,
    tokens: Tensor,
    grid: Grid,
    draws: Draws,
    keeping: Kept | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the mean squared error of the velocity, float32, and the share of bits that the head predicts wrong.

    `tokens` [B, N, P, C] are +-1 in the model's dtype, on its device, where the draws are too; `conditions` has one
    entry per picture. The context is disturbed, the targets are not.
    """
    rows = [unconditional if drop else own for own, drop in zip(conditions, draws.dropped.tolist())]
    t, bits = draws.t[..., None, None], tokens.float()
    x_t = (1 - t) * draws.noise + t * bits
    target = bits.expand_as(x_t)
    if keeping is not None and (keeping.in_step or draws.kept.any()):
        rows = [other if keep else own for own, other, keep in zip(rows, keeping.conditions, draws.kept.tolist())]
        kept = draws.kept.nonzero()[:, 0]
        some = kept if len(kept) else kept.new_zeros(1)
        with torch.no_grad(), keeping.untouched():
            before = predict(
                model, [rows[i] for i in some.tolist()], tokens[some], x_t[:, some], grid, draws.rows(some)
            )
        target = target.index_copy(1, kept, before[:, : len(kept)])
    x_pred = predict(model, rows, tokens, x_t, grid, draws)
    loss = F.mse_loss(velocity_from_x(x_pred, x_t, t), velocity_from_x(target, x_t, t))
    return loss, ((x_pred.detach() > 0) != (bits > 0)).float().mean()


def predict(
    model: BitDance | ImageNetModel, rows: Sequence[Condition], tokens: Tensor, x_t: Tensor, grid: Grid, draws: Draws
) -> Tensor:
    """Predict the bits of whole pictures from disturbed ones before them, and from x_t: float32 [times, B, N, P, C]."""
    hidden = hidden_states(model, rows, torch.where(draws.flipped, -tokens, tokens), grid)
    cond = model.head.cond_embed(hidden.flatten(0, 1)).repeat(len(draws.t), 1, 1)
    time = model.head.time_embed(draws.t.flatten(), tokens.dtype)[:, None]
    return model.head(x_t.flatten(0, 2).to(tokens.dtype), time, cond).float().reshape(x_t.shape)


def hidden_states(model: BitDance | ImageNetModel, rows: Sequence[Condition], tokens: Tensor, grid: Grid) -> Tensor:
    """Return what conditions each patch when it is drawn after those before it: tokens [B, N, P, C] -> [B, N, P, D].

    Conditions and all patches but the last pass through the backbone at once, without a cache.
    """
    reader = make_reader(model, rows, grid, tokens)
    prompt, block = reader.embeddings.shape[1], reader.block
    embeddings = torch.cat((reader.embeddings, reader.embed(tokens[:, :-1], 0)), dim=1)
    mask = block_causal_mask(embeddings.shape[1], prompt - block, block, reader.padding, tokens.device)
    positions = _positions(reader, prompt, embeddings.shape[1] - prompt)
    hidden = reader.network(embeddings, mask, None, *positions)
    return hidden[:, prompt - block :].unflatten(1, (-1, block)) + reader.positions


def make_reader(model: BitDance | ImageNetModel, rows: Sequence[Condition], grid: Grid, like: Tensor) -> Reader:
    """Make the reader of rows with conditions of their own, with a cache for no more than the first patch."""
    if isinstance(model, ImageNetModel):
        return ClassReader(model, rows, 1, like.device, like.dtype)
    return TextReader(model, rows, grid, 1, like.device, like.dtype)


def block_causal_mask(
    length: int, start: int, block: int, padding: Tensor | None, device: torch.device | str
) -> Tensor:
    """Return which of `length` tokens attends to which: bool [1 or B, 1, length, length].

    Tokens before `start` attend to those before them and to themselves; those after it also to their whole block.
    Nothing attends to the `padding` [B, 1] tokens in front of each row, apart from each to itself: attention without
    any key would be NaN.
    """
    steps = torch.arange(length, device=device)
    order = torch.where(steps < start, steps, start + (steps - start) // block)
    mask = (order[:, None] >= order)[None]
    if padding is not None:
        mask = mask & (steps >= padding)[:, None] | torch.eye(length, dtype=torch.bool, device=device)
    return mask[:, None]


def _positions(reader: Reader, prompt: int, rest: int) -> tuple[Tensor, ...]:
    """Return the positions of a whole sequence in the network's own form."""
    if isinstance(reader, TextReader):  # counts on through the picture
        return reader.rotations(prompt + rest, None)
    return tuple(map(torch.cat, zip(reader.rotations(prompt, None), reader.rotations(rest, 0))))
