"""The shortest time that a machine allows: what must be read over its bandwidth, what must be computed over its rate.

The model of Williams, Waterman and Patterson, "Roofline" (CACM 2009), for each call of a network: the longer of both.
A matrix multiplies every token once, 2 operations a weight; attention takes 4 operations for each feature of a query
and each key that it sees (q k and p v). Every weight is read once a call, with the past's keys and values, and the new
ones are written. Norms, activations and what passes between layers count as nothing: so it is a bound, not a forecast.
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
from bitdance_core.model.text_model import BitDance
from bitdance_core.model.tokenizer_config import AutoencoderConfig
from bitdance_core.model.tokenizer_network import BinaryAutoencoder

BUFFER = {"cuda": 2 << 30, "cpu": 1 << 30}  # bytes, more than any cache holds
SIDE = {"cuda": 8192, "cpu": 2048}  # of the matrices that are multiplied
REPEATS = 7
# parts of the head that know neither the noised bits nor each other's results, only the times and the condition: so the
# first can be computed once a picture, and the others once a patch, for all its evaluations in one call
TIME, CONDITION, MODULATION = "time_embed.", "cond_embed.", ("ada_ln_blocks.", "final_layer.ada_ln_modulation.")


@dataclass(frozen=True)
class Peaks:
    """Measured on this machine: bytes a second read from memory, and operations a second of a matrix product; bytes a
    second from pinned system memory to the GPU where there is one.
    """

    bandwidth: float
    matmul: float
    to_device: float | None


@dataclass(frozen=True)
class Work:
    """What one call must do: bytes to read or write, operations to compute."""

    bytes: int
    flops: int

    def seconds(self, peaks: Peaks) -> float:
        return max(self.bytes / peaks.bandwidth, self.flops / peaks.matmul)


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    to_device = measure_to_device(device) if device.type == "cuda" else None
    return Peaks(measure_bandwidth(device, dtype), measure_matmul(device, dtype), to_device)


def measure_bandwidth(device: torch.device, dtype: torch.dtype) -> float:
    width = 1 << 14
    count = BUFFER.get(device.type, 1 << 30) // (width * dtype.itemsize)
    matrix = torch.ones(count, width, device=device, dtype=dtype)
    vector = torch.ones(width, device=device, dtype=dtype)
    # whichever reads faster: either may be held up by something other than memory
    return matrix.nbytes / min(time_of(lambda: matrix @ vector, device), time_of(lambda: matrix.sum(), device))


def measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    side = SIDE.get(device.type, 2048)
    bound = side**-0.5  # random: a GPU is faster, and so another, on numbers that are all alike
    matrix = torch.empty(side, side, device=device, dtype=dtype).uniform_(-bound, bound)
    return 2 * side**3 / time_of(lambda: matrix @ matrix, device)


def measure_to_device(device: torch.device) -> float:
    source = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device, pin_memory=False)
    return source.nbytes / time_of(lambda: target.copy_(source, non_blocking=True), device)


def time_of(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds, after one run that is not counted."""
    spans = []
    for _ in range(REPEATS + 1):
        start = mark(device)
        work()
        spans.append((start, mark(device)))
    wait(device)
    return median(seconds_between(*span) for span in spans[1:])


def prefill_work(model: BitDance | ImageNetModel, lengths: Sequence[int], block: int) -> Work:
    """Rows of `lengths` tokens in one call, the last `block` of each seeing all, those before only back."""
    pairs = sum((n - block) * (n - block + 1) // 2 + block * n for n in lengths)
    layers = layers_of(model)
    work = weights_work(layers, sum(lengths))
    config = shape_of(model)
    return add_attention(work, config, pairs, sum(lengths), itemsize(layers))


def read_work(model: BitDance | ImageNetModel, pasts: Sequence[int], images: int, block: int) -> Work:
    """A patch's `block` tokens, of `images` and the same in all branches, read by rows with `pasts` tokens behind them:
    embedded once an image, then read by every row.
    """
    projector, layers = projector_of(model), layers_of(model)
    embedding, stack = weights_work(projector, images * block), weights_work(layers, len(pasts) * block)
    work = Work(embedding.bytes + stack.bytes, embedding.flops + stack.flops)
    pairs = sum(block * (past + block) for past in pasts)
    return add_attention(work, shape_of(model), pairs, sum(past + block for past in pasts), itemsize(layers))


def head_work(model: BitDance | ImageNetModel, rows: int) -> Work:
    """One evaluation for `rows` of a patch each, without what the times and the condition alone decide."""
    config, block = model.head.config, model.config.tokens_per_patch
    beforehand = (TIME, CONDITION, *MODULATION)
    work = weights_work([p for n, p in model.head.named_parameters() if not n.startswith(beforehand)], rows * block)
    attention = 4 * config.depth * config.width * rows * block**2 if config.attends else 0
    return Work(work.bytes, work.flops + attention)


def condition_work(model: BitDance | ImageNetModel, rows: int, evaluations: int) -> Work:
    """What prepares all `evaluations` of one patch: the condition, and from it and each time the modulations."""
    tokens, named = rows * model.config.tokens_per_patch, list(model.head.named_parameters())
    condition = weights_work([p for n, p in named if n.startswith(CONDITION)], tokens)
    modulation = weights_work([p for n, p in named if n.startswith(MODULATION)], tokens * evaluations)
    return Work(condition.bytes + modulation.bytes, condition.flops + modulation.flops)


def decode_work(config: AutoencoderConfig, height: int, width: int, dtype: torch.dtype) -> Work:
    """Tokens [height, width] to pixels; the convolutions' operations are counted by torch, on shapes without data."""
    autoencoder = BinaryAutoencoder(config, device="meta", dtype=dtype)
    bits = torch.empty(1, config.bits, height, width, device="meta", dtype=dtype)
    with FlopCounterMode(display=False) as counter:
        autoencoder.decoder(bits, bits if config.gan_decoder else None)
    parameters = autoencoder.decoder.parameters()
    return Work(sum(p.nbytes for p in parameters), counter.get_total_flops())


def weights_work(parameters: Iterable[nn.Parameter], tokens: int) -> Work:
    """Every weight read once; `tokens` multiplied by every matrix."""
    parameters = list(parameters)
    return Work(sum(p.nbytes for p in parameters), 2 * tokens * sum(p.numel() for p in parameters if p.ndim > 1))


def add_attention(work: Work, config, pairs: int, tokens: int, size: int) -> Work:
    """`pairs` of a query and a key that it sees; keys and values of `tokens` pass through memory."""
    memory = 2 * config.num_layers * config.num_kv_heads * config.head_dim * size * tokens
    return Work(work.bytes + memory, work.flops + 4 * config.num_layers * config.num_heads * config.head_dim * pairs)


def shape_of(model: BitDance | ImageNetModel):
    """The configuration of the transformer."""
    return model.config if isinstance(model, ImageNetModel) else model.config.backbone


def layers_of(model: BitDance | ImageNetModel) -> list[nn.Parameter]:
    """What every pass of the transformer reads: its layers and norms, no tables."""
    parts = [model.layers, model.norm, model.emb_norm] if isinstance(model, ImageNetModel) else None
    parts = parts or [model.backbone.layers, model.backbone.norm]
    return list(chain.from_iterable(part.parameters() for part in parts))


def projector_of(model: BitDance | ImageNetModel) -> list[nn.Parameter]:
    return list((model.proj_in if isinstance(model, ImageNetModel) else model.projector).parameters())


def itemsize(tensors: Sequence[Tensor]) -> int:
    return tensors[0].element_size()
