"""Compute roofline bounds: the longer of required bytes / measured bandwidth and required FLOPs / measured FLOP rate.

The model of Williams, Waterman and Patterson, "Roofline" (CACM 2009), applied to each call of a network. A matrix takes
2 operations per weight and token; attention takes 4 per feature of a query and each key that it attends to (q k and
p v). A call reads every weight and the cached keys and values once, and writes the new ones. Norms, activations and
traffic between layers count as zero: so it is a lower bound, not a forecast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.meters import mark, seconds_between, wait
from bitdance_core.model.class_model import ImageNetModel
from bitdance_core.model.operations import operations_for
from bitdance_core.model.text_model import BitDance
from bitdance_core.model.tokenizer_config import AutoencoderConfig
from bitdance_core.model.tokenizer_network import BinaryAutoencoder

BUFFER = {"cuda": 2 << 30, "cpu": 1 << 30}  # bytes, larger than any cache
SIDE = {"cuda": 8192, "cpu": 2048}  # of the matrices to multiply
REPEATS = 7
# parts of the head that depend only on times and condition, not on the noised bits: the first can be computed once per
# picture, the others once per patch, in one call for all its evaluations
TIME, CONDITION, MODULATION = "time_embed.", "cond_embed.", ("ada_ln_blocks.", "final_layer.ada_ln_modulation.")


@dataclass(frozen=True)
class Peaks:
    """Measured rates: bytes per second read from memory, operations per second of a matrix product, and bytes per
    second from pinned memory to the GPU (None: no GPU).
    """

    bandwidth: float
    matmul: float
    to_device: float | None


@dataclass(frozen=True)
class Work:
    """The required work of one call: bytes to read or write, operations to compute."""

    bytes: int
    flops: int

    def seconds(self, peaks: Peaks) -> float:
        return max(self.bytes / peaks.bandwidth, self.flops / peaks.matmul)


def measure_peaks(
    device: torch.device, dtype: torch.dtype, buffer: int | None = None, side: int | None = None
) -> Peaks:
    to_device = measure_to_device(device) if device.type == "cuda" else None
    return Peaks(measure_bandwidth(device, dtype, buffer), measure_matmul(device, dtype, side), to_device)


def measure_bandwidth(device: torch.device, dtype: torch.dtype, buffer: int | None = None) -> float:
    width = 1 << 14
    count = (buffer or BUFFER.get(device.type, 1 << 30)) // (width * dtype.itemsize)
    matrix = torch.ones(count, width, device=device, dtype=dtype)
    vector = torch.ones(width, device=device, dtype=dtype)
    # the faster of two: either may be limited by something other than memory
    return matrix.nbytes / min(time_of(lambda: matrix @ vector, device), time_of(lambda: matrix.sum(), device))


@torch.no_grad()
def measure_matmul(device: torch.device, dtype: torch.dtype, side: int | None = None) -> float:
    side = side or SIDE.get(device.type, 2048)
    bound = side**-0.5  # random, because GPUs clock higher on equal numbers
    matrix = torch.empty(side, side, device=device, dtype=dtype).uniform_(-bound, bound)
    layer = operations_for(device).Linear(side, side, bias=False, device=device, dtype=dtype)
    layer.weight.copy_(matrix)
    return 2 * side**3 / time_of(lambda: layer(matrix), device)


def measure_to_device(device: torch.device) -> float:
    source = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device, pin_memory=False)
    return source.nbytes / time_of(lambda: target.copy_(source, non_blocking=True), device)


def time_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of `work`, after one warm-up run."""
    spans = []
    for _ in range(REPEATS + 1):
        start = mark(device)
        work()
        spans.append((start, mark(device)))
    wait(device)
    return median(seconds_between(*span) for span in spans[1:])


def prefill_work(model: BitDance | ImageNetModel, lengths: Sequence[int], block: int) -> Work:
    """Count the prefill of rows of `lengths` tokens: the last `block` of each attend to all, the others causally."""
    pairs = sum((n - block) * (n - block + 1) // 2 + block * n for n in lengths)
    layers = layers_of(model)
    work = weights_work(layers, sum(lengths))
    config = shape_of(model)
    return add_attention(work, config, pairs, sum(lengths), itemsize(layers))


def read_work(model: BitDance | ImageNetModel, pasts: Sequence[int], images: int, block: int) -> Work:
    """Count the reading of a patch of `block` tokens: embedded once per image, then read by every row, after `pasts`
    tokens each.
    """
    projector, layers = projector_of(model), layers_of(model)
    embedding, stack = weights_work(projector, images * block), weights_work(layers, len(pasts) * block)
    work = Work(embedding.bytes + stack.bytes, embedding.flops + stack.flops)
    pairs = sum(block * (past + block) for past in pasts)
    return add_attention(work, shape_of(model), pairs, sum(past + block for past in pasts), itemsize(layers))


def head_work(model: BitDance | ImageNetModel, rows: int) -> Work:
    """Count one evaluation of the head for `rows` patches, without the parts that `condition_work` counts."""
    config, block = model.head.config, model.config.tokens_per_patch
    beforehand = (TIME, CONDITION, *MODULATION)
    work = weights_work([p for n, p in model.head.named_parameters() if not n.startswith(beforehand)], rows * block)
    attention = 4 * config.depth * config.width * rows * block**2 if config.attends else 0
    return Work(work.bytes, work.flops + attention)


def condition_work(model: BitDance | ImageNetModel, rows: int, evaluations: int) -> Work:
    """Count the preparation of all `evaluations` of a patch: condition, and modulations for each time."""
    tokens, named = rows * model.config.tokens_per_patch, list(model.head.named_parameters())
    condition = weights_work([p for n, p in named if n.startswith(CONDITION)], tokens)
    modulation = weights_work([p for n, p in named if n.startswith(MODULATION)], tokens * evaluations)
    return Work(condition.bytes + modulation.bytes, condition.flops + modulation.flops)


def decode_work(config: AutoencoderConfig, height: int, width: int, dtype: torch.dtype) -> Work:
    """Count the decoding of height x width tokens to pixels; torch counts the operations, on the meta device."""
    autoencoder = BinaryAutoencoder(config, device="meta", dtype=dtype)
    bits = torch.empty(1, config.bits, height, width, device="meta", dtype=dtype)
    with FlopCounterMode(display=False) as counter:
        autoencoder.decoder(bits, bits if config.gan_decoder else None)
    parameters = autoencoder.decoder.parameters()
    return Work(sum(p.nbytes for p in parameters), counter.get_total_flops())


def weights_work(parameters: Iterable[nn.Parameter], tokens: int) -> Work:
    """Count every weight read once, and every matrix multiplied by `tokens` tokens."""
    parameters = list(parameters)
    return Work(sum(p.nbytes for p in parameters), 2 * tokens * sum(p.numel() for p in parameters if p.ndim > 1))


def add_attention(work: Work, config, pairs: int, tokens: int, size: int) -> Work:
    """Add attention of `pairs` of query and key, and memory traffic of the keys and values of `tokens`."""
    memory = 2 * config.num_layers * config.num_kv_heads * config.head_dim * size * tokens
    return Work(work.bytes + memory, work.flops + 4 * config.num_layers * config.num_heads * config.head_dim * pairs)


def shape_of(model: BitDance | ImageNetModel):
    """Return the configuration of the transformer."""
    return model.config if isinstance(model, ImageNetModel) else model.config.backbone


def layers_of(model: BitDance | ImageNetModel) -> list[nn.Parameter]:
    """List the parameters that every pass of the transformer reads: layers and norms, no embedding tables."""
    parts = [model.layers, model.norm, model.emb_norm] if isinstance(model, ImageNetModel) else None
    parts = parts or [model.backbone.layers, model.backbone.norm]
    return list(chain.from_iterable(part.parameters() for part in parts))


def projector_of(model: BitDance | ImageNetModel) -> list[nn.Parameter]:
    return list((model.proj_in if isinstance(model, ImageNetModel) else model.projector).parameters())


def itemsize(tensors: Sequence[Tensor]) -> int:
    return tensors[0].element_size()
