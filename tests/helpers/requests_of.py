"""Parts of a request, and the noise that `generate` draws for it."""

import torch

from bitdance_core.sampling.flow import plan_noise


def planned(grid, sampling, seed, images=1):
    """What `generate` draws, patch by patch."""
    generator, patches = torch.Generator().manual_seed(seed), grid.num_patches
    rows = [images * (2 if sampling.is_separate(i, patches) else 1) for i in range(patches)]
    draws = sampling.schedule_of(0, patches).noise_draws
    return [plan_noise((count, grid.tokens_per_patch, 16), draws, generator) for count in rows]


def branches_of(pipe, grid, prompt, guidance):
    opening = pipe.prompts.opening(grid.height, grid.width, grid.tokens_per_patch)
    texts = [pipe.prompts.conditional(prompt), pipe.prompts.unconditional()]
    return [ids + opening for ids in texts[: 2 if guidance > 1 else 1]]
