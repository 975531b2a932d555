"""Muon (Jordan et al. 2024): momentum whose update is made nearly orthogonal, for matrices and convolutions."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# a quintic that lifts every singular value in (0, 1] to about 1 in five rounds
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Nearly orthogonal matrices [..., m, n] of the same singular vectors (Newton-Schulz): singular values in about
    [0.7, 1.2]. Computed in `dtype`, bfloat16 as its authors do.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-12)).to(dtype)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if is_tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized. A convolution counts as a matrix [out, in * height * width].

    (`torch.optim.Muon` takes matrices alone.)
    """

    def __init__(
        self,
        parameters: Iterable,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.dtype = dtype
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault((weight.shape[0], weight[0].numel()), []).append(weight)
            for (rows, columns), weights in by_shape.items():
                updates = orthogonalize(
                    torch.stack([self._direction(w, group["momentum"]) for w in weights]), self.dtype
                )
                scale = group["lr"] * max(1, rows / columns) ** 0.5
                for weight, update in zip(weights, updates):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.view_as(weight), alpha=scale)

    def _direction(self, weight: nn.Parameter, momentum: float) -> Tensor:
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        moving = state["momentum"].mul_(momentum).add_(weight.grad)
        return (weight.grad + momentum * moving).flatten(1)
