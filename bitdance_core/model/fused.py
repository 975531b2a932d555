"""The head's evaluation with Triton's kernels: those between matrix products and attention (kernels.py), and, where
they are asked for, products with what surrounds them inside (products.py).

Drawing uses the first on NVIDIA GPUs with Triton, after a trial on the device; training and every other machine use the
plain operations of head.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import is_out_of_memory
from .head import DiffusionHead

log = logging.getLogger(__name__)

DTYPES = torch.float32, torch.bfloat16, torch.float16

# a layer and its input -> a context, in which the layer's weight and bias are good, on the input's device and in its
# dtype; None: only the layer can tell
Numbers = tuple[Tensor, Tensor] | None
Weights = Callable[[nn.Module, Tensor], AbstractContextManager[Numbers]]

OWN_FORWARD = nn.LayerNorm.forward, nn.Linear.forward
PLAIN = {Tensor, nn.Parameter}  # types of tensors whose numbers are what their dtype says


def plain_weights(layer: nn.Module, x: Tensor) -> AbstractContextManager[Numbers]:
    """Lend the weight and bias of PyTorch's own LayerNorm or Linear. Of a quantized layer, and of a host's, which may
    cast them at each use or keep them elsewhere, nothing: it is called as a layer.
    """
    return nullcontext(as_they_are(layer, x) if type(layer).forward in OWN_FORWARD else None)


def as_they_are(layer: nn.Module, x: Tensor) -> Numbers:
    """Return a layer's weight and bias if they are plain tensors in the dtype, and on the device, of x."""
    weight, bias = layer.weight, layer.bias
    is_plain = {type(weight), type(bias)} <= PLAIN
    return (weight, bias) if is_plain and weight.dtype == x.dtype and weight.device == x.device else None


@cache
def find_kernels(device: torch.device, dtype: torch.dtype, width: int) -> ModuleType | None:
    """Return the module of Triton's kernels if they are installed and work here, else None."""
    return _find("kernels", largest_difference, device, dtype, width)


@cache
def find_products(device: torch.device, dtype: torch.dtype, width: int, bits: int) -> ModuleType | None:
    """Return the module of Triton's products if they are installed and work here, else None."""
    return _find("products", partial(products_difference, bits=bits), device, dtype, width)


def _find(name: str, difference: Callable, device: torch.device, dtype: torch.dtype, width: int) -> ModuleType | None:
    if device.type != "cuda" or torch.version.cuda is None or dtype not in DTYPES:
        return None
    try:
        module = import_module(f".{name}", __package__)
    except ImportError:  # no Triton
        return None
    trial = partial(difference, module, device, dtype, width)
    return module if passes_trial(trial, f"Triton's {name}", device) else None


def passes_trial(difference: Callable[[], float], name: str, device: torch.device) -> bool:
    """Return whether kernels can be compiled and compute what PyTorch does; the log says why not."""
    try:
        found = difference()
    except Exception as error:  # of Triton's compiler, of a C compiler that it needs, of the driver
        if is_out_of_memory(error):
            raise
        log.warning("%s fail, so the head runs without them: %s", name, str(error).partition("\n")[0])
        return False
    if found > 1:
        log.warning("%s compute other numbers than PyTorch on %s, so the head runs without them", name, device)
    return found <= 1


def largest_difference(kernels: ModuleType, device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Return how far the kernels are from PyTorch's operations at most, in what rounding explains: 1 is all right."""
    numbers = partial(_numbers, torch.Generator().manual_seed(0), device, dtype)
    x, (y, gate, scale, shift), affine = numbers(1, 16, width), numbers(4, 2, 16, width), numbers(2, width)
    wide, bits, x_t = numbers(2, 16, 2 * width), numbers(2, 16, 32), numbers(1, 16, 32).float()
    new = torch.addcmul(x, gate, y)
    h = torch.addcmul(shift, F.layer_norm(new, (width,), *affine, eps=1e-6), scale)
    return _worst(
        torch.finfo(dtype).eps,
        *zip(kernels.gated_norm(x, y, gate, tuple(affine), 1e-6, scale, shift), (new, h)),
        (kernels.swiglu(wide), _swiglu(wide)),
        (kernels.guided_velocity(bits, x_t, 0.5, 3.0, True), _guided(bits, x_t)),
    )


def products_difference(products: ModuleType, device: torch.device, dtype: torch.dtype, width: int, bits: int) -> float:
    """Return the same of the products, at a head's width and its number of bits."""
    numbers = partial(_numbers, torch.Generator().manual_seed(0), device, dtype)
    hidden = int(1.5 * width)
    x, (y, gate, scale, shift), x_t = numbers(1, 16, width), numbers(4, 2, 16, width), numbers(1, 16, bits).float()
    first, middle, last = (
        (numbers(outputs, inputs) * inputs**-0.5, numbers(outputs))
        for outputs, inputs in ((width, bits), (2 * hidden, width), (bits, width))
    )
    h = torch.addcmul(shift, F.layer_norm(torch.addcmul(x, gate, y), (width,), eps=1e-6), scale)
    closed = products.closing(x, y, gate, 1e-6, scale, shift, *last, x_t, 0.5, 3.0, True)
    # sums of float32 in another order differ by about the root of their length
    return _worst(
        max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * width**0.5),
        (products.linear(x_t, *first), F.linear(x_t.to(dtype), *first)),
        (products.swiglu_linear(y, *middle), _swiglu(F.linear(y, *middle))),
        (closed, _guided(F.linear(h, *last), x_t)),
    )


def _numbers(generator: torch.Generator, device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator).to(device, dtype)


def _swiglu(wide: Tensor) -> Tensor:
    a, b = wide.chunk(2, dim=-1)
    return F.silu(a) * b


def _guided(bits: Tensor, x_t: Tensor) -> Tensor:
    cond, uncond = ((2 * torch.sigmoid(bits) - 1).float() - x_t).div(0.5).chunk(2)
    return uncond + 3.0 * (cond - uncond)


def _worst(eps: float, *pairs: tuple[Tensor, Tensor]) -> float:
    """Return the largest distance of (ours, PyTorch's) in roundings `eps`; infinite where one is no number."""

    def distance(ours: Tensor, theirs: Tensor) -> Tensor:
        ours, theirs = ours.float(), theirs.float()
        # a rounding of each number, made larger by a scale, a gate or guidance
        return ((ours - theirs).abs() / (32 * eps * (1 + theirs.abs()))).amax()

    worst = torch.stack([distance(*pair) for pair in pairs]).amax().item()
    return worst if worst == worst else float("inf")


@dataclass(frozen=True)
class FusedHead:
    """A head's guided evaluation, as `sampling.patch.head_velocity` computes it: x_t [n, P, C], the modulations
    [B, P, k, W] of n or 2n rows, the time to the end of the flow and guidance -> dx/dt [n, P, C], float32.

    Without `products` every product is its layer's own.
    """

    head: DiffusionHead
    kernels: ModuleType
    products: ModuleType | None = None
    weights: Weights = plain_weights

    def __call__(
        self, x_t: Tensor, modulations: Sequence[Tensor], remaining: float, guidance: float | Tensor
    ) -> Tensor:
        head, y, gate = self.head, None, None
        parts = [modulation.unbind(-2) for modulation in modulations]
        x = self._input(x_t, parts[0][0])
        blocks_each = head.config.depth // head.config.num_modulations
        for index, block in enumerate(head.res_blocks):
            *first, scale, shift, next_gate = parts[index // blocks_each]
            if block.attends:
                x, h = self._norm(block.norm1, x, y, gate, *first[:2])
                y, gate = block.attn(h), first[2]
            x, h = self._norm(block.norm2 if block.attends else block.norm, x, y, gate, scale, shift)
            y, gate = block.w2(self._swiglu(block.w1, h)) if block.swiglu else block.mlp(h), next_gate
        return self._output((x, y, gate), parts[-1], (x_t, remaining, guidance, head.config.squashes))

    def _matrix(self, layer: nn.Module, like: Tensor) -> AbstractContextManager[Numbers]:
        return nullcontext() if self.products is None else self.weights(layer, like)

    def _input(self, x_t: Tensor, like: Tensor) -> Tensor:
        with self._matrix(self.head.input_proj, like) as numbers:
            return self.head.input_proj(x_t.to(like.dtype)) if numbers is None else self.products.linear(x_t, *numbers)

    def _norm(
        self, layer: nn.Module, x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(x + gate * y, its norm modulated) [B, P, W]."""
        with self.weights(layer, x) as numbers:
            if numbers is not None:
                return self.kernels.gated_norm(x, y, gate, numbers, 1e-6, scale, shift)
        x = x if len(x) == len(scale) else x.repeat(len(scale) // len(x), 1, 1)
        x = x if y is None else torch.addcmul(x, gate, y)
        return x, torch.addcmul(shift, layer(x), scale)

    def _swiglu(self, layer: nn.Module, h: Tensor) -> Tensor:
        with self._matrix(layer, h) as numbers:
            return self.kernels.swiglu(layer(h)) if numbers is None else self.products.swiglu_linear(h, *numbers)

    def _output(self, stream: tuple, modulation: Sequence[Tensor], flow: tuple) -> Tensor:
        last = self.head.final_layer.linear
        with self._matrix(last, stream[0]) as numbers:
            if numbers is not None:
                return self.products.closing(*stream, 1e-6, *modulation, *numbers, *flow)
        h = self.kernels.gated_norm(*stream, None, 1e-6, *modulation)[1]
        return self.kernels.guided_velocity(last(h), *flow)
