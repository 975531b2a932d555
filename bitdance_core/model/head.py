"""The binary diffusion head: a small diffusion transformer over the P tokens of one patch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionFn, attention
from .text_config import HeadConfig

FREQUENCIES = 128  # of the time embedding
# the adaLN weights, a fifth of the head's, are read once per this many bytes of modulations: enough rows to keep a
# GPU's matrix units busy, and little beside the head itself
MODULATION_BYTES = 2**27


class TimeEmbedding(nn.Module):
    def __init__(self, width: int, operations, device, dtype) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.mlp = nn.Sequential(
            operations.Linear(2 * FREQUENCIES, width, **options), nn.SiLU(), operations.Linear(width, width, **options)
        )

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed times t [S] in [0, 1] as [S, W] in `dtype`; the angles are float32."""
        steps = torch.arange(FREQUENCIES, device=t.device, dtype=torch.float32)
        angles = 1000 * t.float()[:, None] * torch.exp(-math.log(10000) / FREQUENCIES * steps)
        return self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype))


class PatchAttention(nn.Module):
    """Attend among the tokens of one patch, without positions and without a mask."""

    def __init__(self, width: int, head_dim: int, attend: AttentionFn, operations, device, dtype) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.attend = attend
        self.wqkv = operations.Linear(width, 3 * width, device=device, dtype=dtype)
        self.wo = operations.Linear(width, width, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.wqkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)  # 3 x [B, H, P, D]
        return self.wo(self.attend(q, k, v, None).transpose(1, 2).flatten(2))


class HeadBlock(nn.Module):
    """Attention (where the head has it) and an MLP, each with a norm, a modulation and a gate."""

    def __init__(self, config: HeadConfig, attend: AttentionFn, operations, device, dtype) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        width, hidden = config.width, int(1.5 * config.width)
        self.attends = config.attends
        if config.attends:
            self.norm1 = operations.LayerNorm(width, eps=1e-6, **options)
            self.norm2 = operations.LayerNorm(width, eps=1e-6, **options)
            self.attn = PatchAttention(width, config.head_dim, attend, operations, device, dtype)
        else:
            self.norm = operations.LayerNorm(width, eps=1e-6, **options)
        self.swiglu = config.swiglu
        if config.swiglu:
            self.w1 = operations.Linear(width, 2 * hidden, **options)
            self.w2 = operations.Linear(hidden, width, **options)
        else:
            self.mlp = nn.Sequential(
                operations.Linear(width, hidden, **options), nn.SiLU(), operations.Linear(hidden, width, **options)
            )

    def forward(self, x: Tensor, modulation: Sequence[Tensor]) -> Tensor:
        """Map x [B, P, W] to [B, P, W] with a modulation's 6 or 3 tensors [B, P, W]."""
        *first, scale, shift, gate = modulation
        if self.attends:
            scale1, shift1, gate1 = first
            x = torch.addcmul(x, gate1, self.attn(torch.addcmul(shift1, self.norm1(x), scale1)))
        h = torch.addcmul(shift, (self.norm2 if self.attends else self.norm)(x), scale)
        if self.swiglu:
            a, b = self.w1(h).chunk(2, dim=-1)
            return torch.addcmul(x, gate, self.w2(F.silu(a) * b))
        return torch.addcmul(x, gate, self.mlp(h))


class FinalLayer(nn.Module):
    def __init__(self, config: HeadConfig, operations, device, dtype) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.ada_ln_modulation = operations.Linear(config.width, 2 * config.width, **options)
        self.linear = operations.Linear(config.width, config.bits, **options)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.linear(torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), scale))


def steps_at_once(config: HeadConfig, rows: int, tokens: int, itemsize: int) -> int:
    """Count the steps whose modulations are computed in one pass: as many as fit MODULATION_BYTES."""
    width = (config.num_modulations * config.modulations + 2) * config.width
    return max(1, MODULATION_BYTES // (rows * tokens * width * itemsize))


class DiffusionHead(nn.Module):
    """Predict a patch's clean bits from its noised ones. Terms that do not depend on them have methods of their own:

    time = head.time_embed(times, dtype)                       # once per image
    cond = head.cond_embed(hidden)                             # once per patch
    modulations = head.modulations(time[:, None, None], cond)  # for many steps in one pass
    x_pred = head.predict(x_t, [m[i] for m in modulations])    # every step
    """

    def __init__(
        self,
        config: HeadConfig,
        operations: ModuleType | type = nn,
        attend: AttentionFn = attention,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.config = config
        self.time_embed = TimeEmbedding(config.width, operations, device, dtype)
        self.cond_embed = operations.Linear(config.cond_width, config.width, **options)
        self.input_proj = operations.Linear(config.bits, config.width, **options)
        self.res_blocks = nn.ModuleList(
            HeadBlock(config, attend, operations, device, dtype) for _ in range(config.depth)
        )
        self.ada_ln_blocks = nn.ModuleList(
            operations.Linear(config.width, config.modulations * config.width, **options)
            for _ in range(config.num_modulations)
        )
        self.final_layer = FinalLayer(config, operations, device, dtype)

    def forward(self, x_t: Tensor, time: Tensor, cond: Tensor) -> Tensor:
        """Predict bits [B, P, C] from x_t [B, P, C], time broadcastable to [B, P, W] and cond [B, P, W]."""
        return self.predict(x_t, self.modulations(time, cond))

    def modulations(self, time: Tensor, cond: Tensor) -> list[Tensor]:
        """Compute each adaLN layer's scales (1 added), shifts and gates [..., B, P, k, W], the final layer's last.

        time is broadcastable to [..., B, P, W], cond is [B, P, W].
        """
        y = F.silu(time + cond)
        layers = (*self.ada_ln_blocks, self.final_layer.ada_ln_modulation)
        modulations = [layer(y).unflatten(-1, (-1, self.config.width)) for layer in layers]
        for modulation in modulations:
            modulation[..., ::3, :] += 1  # every third is a scale
        return modulations

    def predict(self, x_t: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        """Predict bits [B, P, C] from x_t [B, P, C] and one step's modulations [B, P, k, W]."""
        x = self.input_proj(x_t)
        blocks_each = self.config.depth // self.config.num_modulations
        parts = [modulation.unbind(-2) for modulation in modulations]
        for index, block in enumerate(self.res_blocks):
            x = block(x, parts[index // blocks_each])
        x = self.final_layer(x, *parts[-1])
        return 2 * torch.sigmoid(x) - 1 if self.config.squashes else x
