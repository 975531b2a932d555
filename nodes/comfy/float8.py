"""Give each input of a float8 layer a scale of its own.

On cards with fp8 matrix units ComfyUI's layers quantize their inputs too. Where the file has no `input_scale` they take
1, which clips inputs at 448; the language models of this family feed `down_proj` with tens of thousands.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALED = "float8_e4m3fn"
LEAST = 1e-12  # of an input's largest number: an input of zeros is divided by its scale too


def with_input_scales(operations: type) -> type:
    """Return ComfyUI's mixed-precision layers with a Linear that scales the inputs of its float8 products.

    The scale is an attribute during the call alone: saved files, copies and other threads never see it. It is computed
    on the input's device without waiting for it, so a CUDA graph can record it.
    """

    class Operations(operations):
        class Linear(operations.Linear):
            def forward(self, input, *args, **kwargs):
                if not scales_inputs(self):
                    return super().forward(input, *args, **kwargs)
                self.input_scale = input_scale(input)
                try:
                    return super().forward(input, *args, **kwargs)
                finally:
                    del self.input_scale

    return Operations


def scales_inputs(layer) -> bool:
    """Return whether ComfyUI would quantize the inputs of a layer whose file gives them no scale."""
    return (
        getattr(layer, "quant_format", None) == SCALED
        and not layer._full_precision_mm
        and "input_scale" not in layer._parameters
    )


def input_scale(input: Tensor) -> Tensor:
    """Compute the scale, a float32 number, that maps an input's largest number to float8's largest."""
    largest = torch.linalg.vector_norm(input, float("inf"), dtype=torch.float32)
    return largest.clamp_min(LEAST) / torch.finfo(torch.float8_e4m3fn).max
