"""Compute the memory that fine-tuning takes: a whole step on tensors without data, whose sizes are counted.

python -m benchmarks.finetuning_memory                   # BitDance-14B-64x, LoRAs of rank 16
python -m benchmarks.finetuning_memory --batch 2

Weights, adapter, gradients and AdamW's two moments are counted from the configuration. Activations are the most that
forward and backward pass of one picture hold at once, by running both on PyTorch's meta device, with attention that
keeps what a fused kernel does. Nothing is measured on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.peak_memory import PeakMemory
from bitdance_core.cards import PROMPT
from bitdance_core.checkpoints.load import LAYERS
from bitdance_core.model.grid import Grid
from bitdance_core.model.text_config import PUBLISHED_CONFIGS, BitDanceConfig
from bitdance_core.model.text_model import BitDance
from bitdance_core.training import layers, lora
from bitdance_core.training.loss import Corruption, Draws, velocity_loss

GB = 1e9
CARDS = (16, 24, 48, 80)  # GiB, sold as GB
RESERVE = 1.5e9  # for CUDA's context and what its allocator cannot fill
SETTINGS = [  # bits of a layer's weights, what learns, whether layers are computed again
    (16, "both", False), (16, "both", True), (16, "head", True), (8, "both", True), (8, "head", True),
]  # fmt: skip


class FusedAttention(torch.autograd.Function):
    """The shapes of attention, and what a fused kernel keeps of it: inputs, result, and a number for each query."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, result, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return FusedAttention.apply(q, k, v)


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes of one run: frozen weights; the adapter with its gradients and moments; activations."""

    weights: int
    adapter: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.activations


def needs(
    config: BitDanceConfig, bits: int, targets: str, recompute: bool, batch: int = 1, rank: int = 16,
    dtype: torch.dtype = torch.bfloat16, device: str = "meta", attend=fused,
) -> Needs:  # fmt: skip
    """Count what a step takes on pictures of the model's default size, each in a pass of its own `batch`."""
    model = BitDance(config, nn, attend, device, dtype)
    weights = sum(weight_bytes(name, p, bits) for name, p in model.named_parameters())
    parameters = lora.insert(model, lora.Adapter(rank=rank, alpha=rank, targets=targets), 0)
    if recompute:
        layers.recompute_layers(model)
    adapter = sum(4 * 4 * p.numel() for p in parameters.values())  # float32: itself, its gradient, two moments
    height, width = (side // config.autoencoder.downscale for side in config.defaults.default_size)
    grid = Grid(height, width, config.patch_size)
    shape = batch, grid.num_patches, grid.tokens_per_patch, config.head.bits
    tokens = torch.empty(shape, device=device, dtype=dtype).fill_(1)
    draws = Draws.make((batch, 1, 1, 1), Corruption(), 1.0, torch.Generator().manual_seed(0))
    draws = Draws(
        draws.dropped, draws.kept, torch.empty(shape, device=device, dtype=torch.bool).fill_(False),
        torch.empty(1, *shape[:2], device=device).fill_(0.5), torch.empty(1, *shape, device=device).fill_(0),
    )  # fmt: skip
    ids = [0] * (PROMPT + grid.tokens_per_patch + 2)
    with PeakMemory() as memory:
        memory.seen |= {p.untyped_storage()._cdata for p in model.parameters()}  # counted above
        loss, _ = velocity_loss(model, [ids] * batch, ids, tokens, grid, draws)
        loss.backward()
        gradients = sum(p.grad.nbytes for p in parameters.values() if p.grad is not None)
    return Needs(weights, adapter, memory.peak - gradients)


def weight_bytes(name: str, parameter: nn.Parameter, bits: int) -> int:
    """Count a weight's bytes; the layers' matrices have `bits` each, and in 8 bits a scale for each row."""
    if bits == 8 and parameter.ndim == 2 and LAYERS.fullmatch(name):
        return parameter.numel() + 2 * parameter.shape[0]
    return 2 * parameter.numel()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = {config.family: config for config in PUBLISHED_CONFIGS}
    parser.add_argument("--model", choices=models, default=next(iter(models)), help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=1, help="pictures of one pass (default: %(default)s)")
    args = parser.parse_args(argv)
    config = models[args.model]
    height, width = config.defaults.default_size
    print(f"{config.family}, {width}x{height}, {args.batch} a pass, LoRA of rank 16, in GB (1e9 bytes)\n")
    print("| settings | weights | adapter | activations | in all | fits |")
    print("|---|---|---|---|---|---|")
    for bits, targets, recompute in SETTINGS:
        need = needs(config, bits, targets, recompute, args.batch)
        cards = [card for card in CARDS if need.total + RESERVE <= card * 2**30]
        options = (
            [f"`--targets {targets}`"] + ["`--quantize fp8`"] * (bits == 8) + ["`--checkpoint-layers`"] * recompute
        )
        sizes = need.weights, need.adapter, need.activations, need.total
        numbers = " | ".join(f"{size / GB:.1f}" for size in sizes)
        print(f"| {' '.join(options)} | {numbers} | {f'{cards[0]} GB' if cards else 'no card'} |", flush=True)


if __name__ == "__main__":
    main()
