"""The plainest way to draw: no cache, no batching of branches, the whole sequence read again for every patch.

It runs in the model's dtype. Tests use float64, in which no rounding is large enough to turn a bit.
"""

import torch
from torch import Tensor

from bitdance_core.bits import binarize
from bitdance_core.flow import Schedule, sample_patch
from bitdance_core.model import BitDance
from bitdance_core.patches import Grid


def dtype_of(model: BitDance) -> torch.dtype:
    return model.projector.fc1.weight.dtype


def positions_of(model: BitDance, grid: Grid) -> Tensor:
    return grid.positions(model.config.backbone.hidden_size).to(dtype_of(model))


def hidden_states(model: BitDance, ids: list[int], tokens: Tensor, grid: Grid) -> Tensor:
    """One row: ids [L] and the patches drawn so far [k, P, C] -> hidden states of the last block [P, D]."""
    P = grid.tokens_per_patch
    positions = positions_of(model, grid)[: len(tokens)]
    x = torch.cat((model.backbone.embed_tokens(torch.tensor(ids)), (model.projector(tokens) + positions).flatten(0, 1)))
    steps = torch.arange(len(x))
    start = len(ids) - P
    order = torch.where(steps < start, steps, start + (steps - start) // P)
    hidden = model.backbone(x[None], steps[None], order[:, None] >= order)
    return hidden[0, -P:]


def generate(
    model: BitDance, branches: list[list[int]], grid: Grid, schedule: Schedule, guidance: float, noise: list[Tensor]
) -> Tensor:
    """Bits [1, C, h, w] of one image from the noise of each patch [draws, 1, P, C]."""
    P, C = grid.tokens_per_patch, model.config.head.bits
    positions, dtype = positions_of(model, grid), dtype_of(model)
    drawn = torch.zeros(0, P, C, dtype=dtype)
    for i in range(grid.num_patches):
        conds = [hidden_states(model, ids, drawn, grid) + positions[i] for ids in branches]

        def predict(x: Tensor, step: int, conds: list[Tensor] = conds) -> Tensor:
            time = model.head.time_embed(torch.tensor([schedule.times[step]]), dtype)
            return torch.cat([model.head(x.to(dtype), time, model.head.cond_embed(cond[None])) for cond in conds])

        drawn = torch.cat((drawn, binarize(sample_patch(predict, noise[i], schedule, guidance)).to(dtype)))
    return grid.unpatchify(drawn[None])
