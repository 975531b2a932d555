"""The eager baseline: draw as the official pipeline does, with the weights of our own model.

Each guidance branch has its own calls of transformers' Qwen3, with masks and a cache that grows by concatenation. The
head evaluates both branches in one call, and embeds time and condition again at every evaluation. Noise is drawn at
every step on the generator's device, the last patch is read although nothing follows, and nothing is compiled or
captured. From the core it uses only weights, tables of positions, and the head's layers, made of PyTorch's own.

ImageNet models are drawn in the same way, with layers of this file instead of transformers'. Their official code may
read both branches in one call; it is then faster than this baseline in the backbone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.random_models import build
from bitdance_core.errors import BitDanceError, Cancel, check_cancelled
from bitdance_core.model.binarize import binarize
from bitdance_core.model.blocks import rope_tables, rotate_pairs
from bitdance_core.model.class_model import ImageNetModel
from bitdance_core.model.grid import Grid
from bitdance_core.model.head import DiffusionHead
from bitdance_core.model.text_model import BitDance
from bitdance_core.sampling.plan import Request
from bitdance_core.sampling.settings import Sampling

if TYPE_CHECKING:
    from transformers import Qwen3Model

SAMPLER = "euler_maruyama"  # the only one of the official pipeline


class Baseline:
    """Draws with `generate`, which has the arguments of the core's, except edits."""

    def __init__(self, model: BitDance | ImageNetModel, device: torch.device) -> None:
        self.model = build(model.config).eval()
        # by rows, as checkpoints are read
        weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
        self.model.load_state_dict(weights, assign=True)
        model = self.model
        if isinstance(model, BitDance):
            self.branch = partial(TextBranch, share_with_qwen3(model, device), model)
        else:
            self.branch = partial(ClassBranch, model)

    def generate(
        self,
        request: Request,
        generator: torch.Generator,
        device: torch.device | str,
        dtype: torch.dtype,
        callback: Callable[[int, int], None] | None = None,
        cancel: Cancel | None = None,
    ) -> Tensor:
        grid, sampling, num_images = request.grid, request.sampling, request.num_images
        assert sampling.sampler == SAMPLER
        head, patches = self.model.head, grid.num_patches

        def noise(rows: int) -> Tensor:
            shape = rows, grid.tokens_per_patch, head.config.bits
            return torch.randn(shape, generator=generator, device=generator.device).to(device)

        readers = [self.branch(row, grid, num_images, device, dtype) for row in request.branches]
        check_cancelled(cancel)
        hidden = [reader.prefill() for reader in readers]
        drawn = []
        for i in range(patches):
            guidance = sampling.guidance_of(i, patches)
            separate = sampling.is_separate(i, patches)  # each branch has its own noise and result
            cond = torch.cat([h + reader.positions[i] for h, reader in zip(hidden, readers)])
            cond = cond if separate or guidance > 1 else cond[:num_images]

            def predict(x: Tensor, t: Tensor, cond: Tensor = cond) -> Tensor:
                check_cancelled(cancel)
                halves = len(cond) // len(x)
                return evaluate(head, x.to(dtype).repeat(halves, 1, 1), t.expand(len(cond)), cond).float()

            rows = len(cond) if separate else num_images
            sample = sample_patch(predict, partial(noise, rows), sampling, guidance)
            tokens = binarize(sample)
            drawn.append(tokens[:num_images])
            if callback is not None:
                callback(i + 1, patches)
            check_cancelled(cancel)
            per_branch = tokens.chunk(len(readers)) if separate else [tokens] * len(readers)
            hidden = [reader.read(tokens.to(dtype), i) for reader, tokens in zip(readers, per_branch)]
        return grid.unpatchify(torch.stack(drawn, dim=1))


def sample_patch(
    predict: Callable[[Tensor, Tensor], Tensor], noise: Callable[[], Tensor], sampling: Sampling, guidance: float
) -> Tensor:
    """Draw a patch with Euler-Maruyama, a step at a time; with guidance > 1 `predict` returns both branches."""
    x = noise()
    shift = 1 / sampling.time_shift
    times = torch.linspace(0, 0.95, sampling.steps + 1, device=x.device)
    times = shift / (shift + (1 / times - 1))

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        halves = [(half - x) / (1 - t).clamp_min(0.05) for half in predict(x, t).split(len(x))]
        return halves[0] if guidance <= 1 else halves[1] + guidance * (halves[0] - halves[1])

    t = torch.zeros((), device=x.device)
    for dt in times.diff():
        v = velocity(x, t)
        score = (t * v - x) / ((1 - t) ** 2 + t * (1 - t))
        x = x + (v + (1 - t) * score) * dt + (2 * (1 - t) * dt).sqrt() * noise()
        t = t + dt
    return x + 0.05 * velocity(x, torch.full_like(t, 0.95))


def evaluate(head: DiffusionHead, x: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
    """Evaluate the whole head: x [B, P, C], t [B], hidden [B, P, D] -> predicted bits [B, P, C]."""
    config = head.config
    frequencies = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=t.device))
    angles = 1000 * t[:, None] * frequencies
    time = head.time_embed.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(x.dtype))
    y = F.silu(time[:, None] + head.cond_embed(hidden))

    x = head.input_proj(x)
    modulations = [layer(y) for layer in head.ada_ln_blocks]
    for index, block in enumerate(head.res_blocks):
        parts = modulations[index * len(modulations) // config.depth].chunk(6 if config.attends else 3, dim=-1)
        if config.attends:
            scale, shift, gate = parts[:3]
            h = block.norm1(x) * (1 + scale) + shift
            q, k, v = block.attn.wqkv(h).unflatten(-1, (3, -1, config.head_dim)).permute(2, 0, 3, 1, 4)
            h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + gate * block.attn.wo(h)
        scale, shift, gate = parts[-3:]
        h = (block.norm2 if config.attends else block.norm)(x) * (1 + scale) + shift
        if config.swiglu:
            a, b = block.w1(h).chunk(2, dim=-1)
            x = x + gate * block.w2(F.silu(a) * b)
        else:
            x = x + gate * block.mlp(h)
    scale, shift = head.final_layer.ada_ln_modulation(y).chunk(2, dim=-1)
    x = head.final_layer.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
    return 2 * torch.sigmoid(x) - 1 if config.squashes else x


def visible(past: int, count: int, causal: bool, device: torch.device | str) -> Tensor:
    """Return the mask [count, past + count], True = attend: tokens attend to the past, and to each other, or only to
    earlier ones (`causal`).
    """
    mask = torch.ones(count, past + count, dtype=torch.bool, device=device)
    return mask.tril(past) if causal else mask


class TextBranch:
    """One prompt, repeated for `num_images` images, with transformers' KV cache."""

    def __init__(
        self,
        network: Qwen3Model,
        model: BitDance,
        ids: Sequence[int],
        grid: Grid,
        num_images: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        from transformers import DynamicCache

        table = model.backbone.embed_tokens
        rows = torch.tensor([list(ids)] * num_images, device=table.weight.device)
        self.embeddings = table(rows).to(device, dtype)
        self.positions = grid.positions(model.config.backbone.hidden_size, device).to(dtype)
        self.block = grid.tokens_per_patch
        self.projector = model.projector
        self.network = network
        self.cache = DynamicCache(config=network.config)

    def prefill(self) -> Tensor:
        self._run(self.embeddings[:, : -self.block], causal=True)
        return self._run(self.embeddings[:, -self.block :])

    def read(self, tokens: Tensor, patch: int) -> Tensor:
        return self._run(self.projector(tokens) + self.positions[patch])

    def _run(self, x: Tensor, causal: bool = False) -> Tensor:
        past, count = self.cache.get_seq_length(), x.shape[1]
        return self.network(
            inputs_embeds=x,
            attention_mask=visible(past, count, causal, x.device).expand(len(x), 1, -1, -1),
            position_ids=torch.arange(past, past + count, device=x.device)[None],
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state


class ClassBranch:
    """One class per image, with a KV cache that grows by concatenation."""

    def __init__(
        self,
        model: ImageNetModel,
        labels: Sequence[int],
        grid: Grid,
        num_images: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        assert len(labels) == num_images
        config, self.block = model.config, grid.tokens_per_patch
        classes = model.cls_embedding(torch.tensor(labels, device=device)).to(dtype)
        self.embeddings = classes.unflatten(1, (config.class_tokens, config.width))
        if self.block > 1:
            queries = model.query_token.weight.to(dtype).expand(num_images, -1, -1)
            self.embeddings = torch.cat((self.embeddings, queries), dim=1)
        self.positions = model.pos_for_diff.weight.to(dtype).unflatten(0, (grid.num_patches, self.block))
        sides = [torch.arange(side, device=device) + 1.5 for side in (grid.height, grid.width)]
        places = torch.stack(torch.meshgrid(*sides, indexing="ij")).flip(0)  # x and y [2, h, w]
        self.places = grid.patchify(places[None])[0]  # [patches, P, 2]
        self.model = model
        self.cache: list[tuple[Tensor, Tensor]] = []  # keys and values of each layer

    def prefill(self) -> Tensor:
        nowhere = torch.zeros(self.embeddings.shape[1], 2, device=self.embeddings.device)
        if self.embeddings.shape[1] > self.block:
            self._run(self.embeddings[:, : -self.block], nowhere[: -self.block], causal=True)
        return self._run(self.embeddings[:, -self.block :], nowhere[-self.block :])

    def read(self, tokens: Tensor, patch: int) -> Tensor:
        return self._run(self.model.proj_in(tokens), self.places[patch])

    def _run(self, x: Tensor, places: Tensor, causal: bool = False) -> Tensor:
        past = self.cache[0][0].shape[2] if self.cache else 0
        mask = visible(past, x.shape[1], causal, x.device)
        rope = rope_tables(places, self.model.config.head_dim, x.dtype)
        x = self.model.emb_norm(x)
        for index, layer in enumerate(self.model.layers):
            qkv = layer.attention.wqkv(layer.attention_norm(x)).unflatten(-1, (3, self.model.config.num_heads, -1))
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            q, k = rotate_pairs(q, rope), rotate_pairs(k, rope)
            if past:
                k, v = [torch.cat(pair, dim=2) for pair in zip(self.cache[index], (k, v))]
            self.cache[index : index + 1] = [(k, v)]
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + layer.attention.wo(attended.transpose(1, 2).flatten(2))
            x = x + layer.feed_forward(layer.ffn_norm(x))
        return self.model.norm(x)


def share_with_qwen3(model: BitDance, device: torch.device) -> Qwen3Model:
    """Build transformers' model around our parameters, without a copy. Raises BitDanceError without transformers."""
    try:
        from transformers import Qwen3Config, Qwen3Model
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
    except ImportError as error:
        raise BitDanceError("the baseline needs the package transformers; install it, or pass --no-baseline") from error
    config = Qwen3Config(**model.config.backbone.to_dict(), attn_implementation="sdpa")
    with torch.device("meta"):
        network = Qwen3Model(config)
    network.load_state_dict(model.backbone.state_dict(), assign=True)
    network.rotary_emb = Qwen3RotaryEmbedding(config).to(device)  # no weights, but a table that must not stay on meta
    return network.eval()
