"""The plainest way to draw: no cache, no batching of branches, the whole sequence read again for every patch.

It runs in the model's dtype. Tests use float64, in which no rounding is large enough to turn a bit.
"""

import torch
from torch import Tensor

from bitdance_core.bits import binarize
from bitdance_core.editing import Edit
from bitdance_core.flow import Sampling, sample_patch
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
    model: BitDance,
    branches: list[list[int]],
    grid: Grid,
    sampling: Sampling,
    noise: list[Tensor],
    edit: Edit | None = None,
) -> Tensor:
    """Bits [1, C, h, w] of one image from the noise of each patch [draws, 1, P, C]."""
    P, C = grid.tokens_per_patch, model.config.head.bits
    positions, dtype = positions_of(model, grid), dtype_of(model)
    drawn = torch.zeros(0, P, C, dtype=dtype)
    for i in range(grid.num_patches):
        known, start = None, 0.0
        if edit is not None:
            known = edit.to_patches(grid, "cpu")[i]
            start = float(known.until.min())
            if start >= 1:
                drawn = torch.cat((drawn, known.bits.to(dtype)))
                continue
        schedule, guidance = sampling.schedule_of(i, grid.num_patches, start), sampling.guidance_of(i, grid.num_patches)
        conds = [hidden_states(model, ids, drawn, grid) + positions[i] for ids in branches]

        def predict(x: Tensor, step: int, conds: list[Tensor] = conds, schedule=schedule, guidance=guidance) -> Tensor:
            time = model.head.time_embed(torch.tensor([schedule.head_times[step]]), dtype)
            asked = conds if guidance > 1 and schedule.is_guided(step) else conds[:1]
            return torch.cat([model.head(x.to(dtype), time, model.head.cond_embed(cond[None])) for cond in asked])

        drawn = torch.cat((drawn, binarize(sample_patch(predict, noise[i], schedule, guidance, known)).to(dtype)))
    return grid.unpatchify(drawn[None])
