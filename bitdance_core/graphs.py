"""CUDA graphs of the head's loop: fifty evaluations of a hundred small kernels each, launched as one.

What makes it possible: a patch's noise is drawn before its flow begins, and nothing on the way depends on a value.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from .flow import Schedule
from .head import DiffusionHead
from .patch_flow import flow_of

log = logging.getLogger(__name__)

# records a function of tensors, given examples of them; the recording takes tensors of the same shapes
Record = Callable[[Callable[..., Tensor], tuple[Tensor, ...]], Callable[..., Tensor]]


class HeadGraphs:
    """The flows of one picture's patches, from the second of a kind on as graphs. Dropped with the picture.

    Only for weights that stay where they are and are used as they are: a graph knows addresses, not modules. What
    cannot be recorded runs without a graph from then on; `reason` then says why.
    """

    def __init__(self, record: Record | None = None) -> None:
        """`record` is `record_cuda`, unless a test brings its own."""
        self.reason: str | None = None
        self._record = record or record_cuda
        self._kinds: dict[Hashable, Callable[..., Tensor] | None] = {}

    def draw(
        self, head: DiffusionHead, schedule: Schedule, guidance: float, dtype: torch.dtype, *inputs: Tensor
    ) -> Tensor:
        """What `flow_of(head, schedule, guidance, dtype)` makes of the inputs; good until the next call."""
        guided = guidance > 1
        kind = head, schedule, guided, dtype, *((tensor.shape, tensor.dtype) for tensor in inputs)
        if self.reason is not None or kind not in self._kinds:
            self._kinds[kind] = None  # the first of a kind finds kernels and workspaces, which a recording must not
            return flow_of(head, schedule, guidance, dtype)(*inputs)
        # as a tensor, since a schedule of guidance changes it from patch to patch
        scale = torch.full((), guidance, device=inputs[0].device)
        if self._kinds[kind] is None:
            try:
                self._kinds[kind] = self._record(_with_scale(head, schedule, guided, dtype), (scale, *inputs))
            except RuntimeError as error:  # kernels that cannot be recorded, or too little memory
                self.reason = str(error).partition("\n")[0]
                log.warning("the head runs without a CUDA graph: %s", self.reason)
                return flow_of(head, schedule, guidance, dtype)(*inputs)
        return self._kinds[kind](scale, *inputs)


def _with_scale(head: DiffusionHead, schedule: Schedule, guided: bool, dtype: torch.dtype) -> Callable[..., Tensor]:
    def flow(scale: Tensor, *inputs: Tensor) -> Tensor:
        return flow_of(head, schedule, scale if guided else 1.0, dtype)(*inputs)

    return flow


def record_cuda(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """A CUDA graph with inputs and a result of its own."""
    own = tuple(tensor.clone() for tensor in inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(own[0].device), torch.cuda.graph(graph):
        result = function(*own)

    def replay(*given: Tensor) -> Tensor:
        for mine, theirs in zip(own, given, strict=True):
            mine.copy_(theirs)
        graph.replay()
        return result

    return replay
