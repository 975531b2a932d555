"""The plainest way to draw: no cache, no batching of branches, the whole sequence read again for every patch.

It runs in the model's dtype. Tests use float64: its shapes are not the engine's, so both round differently, but in
float64 by so little (some 1e-15 of each prediction) that no bit turns.
"""

import torch
from torch import Tensor

from bitdance_core.model.binarize import binarize
from bitdance_core.model.blocks import rope_tables
from bitdance_core.model.class_model import ImageNetModel
from bitdance_core.model.grid import Grid
from bitdance_core.model.text_model import BitDance
from bitdance_core.sampling.editing import Edit
from bitdance_core.sampling.flow import sample_patch
from bitdance_core.sampling.settings import Sampling


def dtype_of(model: BitDance | ImageNetModel) -> torch.dtype:
    return model.head.input_proj.weight.dtype


def positions_of(model: BitDance | ImageNetModel, grid: Grid) -> Tensor:
    if isinstance(model, ImageNetModel):
        return model.pos_for_diff.weight.unflatten(0, (grid.num_patches, -1))
    return grid.positions(model.config.backbone.hidden_size).to(dtype_of(model))


def block_mask(count: int, prefix: int, block: int) -> Tensor:
    """The first `prefix` of `count` tokens look back, those after it also into the rest of their own block."""
    steps = torch.arange(count)
    order = torch.where(steps < prefix, steps, prefix + (steps - prefix) // block)
    return order[:, None] >= order


def hidden_states(model: BitDance, ids: list[int], tokens: Tensor, grid: Grid) -> Tensor:
    """One row: ids [L] and the patches drawn so far [k, P, C] -> hidden states of the last block [P, D]."""
    P = grid.tokens_per_patch
    positions = positions_of(model, grid)[: len(tokens)]
    x = torch.cat((model.backbone.embed_tokens(torch.tensor(ids)), (model.projector(tokens) + positions).flatten(0, 1)))
    hidden = model.backbone(x[None], torch.arange(len(x))[None], block_mask(len(x), len(ids) - P, P))
    return hidden[0, -P:]


def hidden_states_of_class(model: ImageNetModel, label: int, tokens: Tensor, grid: Grid) -> Tensor:
    """One row: a class and the patches drawn so far [k, P, C] -> hidden states of the last block [P, D]."""
    config, P = model.config, grid.tokens_per_patch
    parts = [model.cls_embedding.weight[label].unflatten(0, (config.class_tokens, -1))]
    parts += [model.query_token.weight] if P > 1 else []
    opening = sum(map(len, parts))
    x = torch.cat((*parts, model.proj_in(tokens).flatten(0, 1)))
    sequence = [
        (patch % (grid.width // grid.patch_size) * grid.patch_size + i % grid.patch_size + 1.5,
         patch // (grid.width // grid.patch_size) * grid.patch_size + i // grid.patch_size + 1.5)
        for patch in range(len(tokens)) for i in range(P)
    ]  # fmt: skip
    rope = rope_tables(torch.tensor([(0.0, 0.0)] * opening + sequence), config.head_dim, x.dtype)
    return model(x[None], rope, block_mask(len(x), config.class_tokens - 1, P))[0, -P:]


def generate(
    model: BitDance | ImageNetModel,
    branches: list[list[int]],
    grid: Grid,
    sampling: Sampling,
    noise: list[Tensor],
    edit: Edit | None = None,
) -> Tensor:
    """Bits [1, C, h, w] of one image from the noise of each patch [draws, 1, P, C] ([draws, 2, P, C] where the two
    branches draw apart). Branches are token ids, or [class].
    """
    P, C = grid.tokens_per_patch, model.config.head.bits
    positions, dtype = positions_of(model, grid), dtype_of(model)
    drawn = [torch.zeros(0, P, C, dtype=dtype) for _ in branches]
    for i in range(grid.num_patches):
        known, start = None, 0.0
        if edit is not None:
            known = edit.to_patches(grid, "cpu")[i]
            start = float(known.until.min())
            if start >= 1:
                drawn = [torch.cat((own, known.bits.to(dtype))) for own in drawn]
                continue
        schedule, guidance = sampling.schedule_of(i, grid.num_patches, start), sampling.guidance_of(i, grid.num_patches)
        if isinstance(model, ImageNetModel):
            conds = [hidden_states_of_class(model, label, own, grid) for (label,), own in zip(branches, drawn)]
        else:
            conds = [hidden_states(model, ids, own, grid) for ids, own in zip(branches, drawn)]
        conds = [cond + positions[i] for cond in conds]

        def sample(conds: list[Tensor], noise: Tensor, guidance: float, schedule=schedule, known=known) -> Tensor:
            def predict(x: Tensor, step: int) -> Tensor:
                time = model.head.time_embed(torch.tensor([schedule.head_times[step]]), dtype)
                asked = conds if guidance > 1 and schedule.is_guided(step) else conds[:1]
                return torch.cat([model.head(x.to(dtype), time, model.head.cond_embed(cond[None])) for cond in asked])

            return binarize(sample_patch(predict, noise, schedule, guidance, known)).to(dtype)

        if sampling.is_separate(i, grid.num_patches):
            patches = [sample([cond], noise[i][:, half : half + 1], 1.0) for half, cond in enumerate(conds)]
        else:
            patches = [sample(conds, noise[i], guidance)] * len(branches)
        drawn = [torch.cat((own, patch)) for own, patch in zip(drawn, patches)]
    return grid.unpatchify(drawn[0][None])
