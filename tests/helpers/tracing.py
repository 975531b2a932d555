"""A stand-in for a CUDA graph that runs anywhere: PyTorch's tracer."""

from __future__ import annotations

from torch.fx.experimental.proxy_tensor import make_fx


class Traced:
    """Records as a CUDA graph is recorded, on tensors without values, and replays with others."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, function, inputs):
        self.count += 1
        return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
