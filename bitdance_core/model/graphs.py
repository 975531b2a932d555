"""CUDA graphs of what runs again and again: a patch's fifty evaluations of the head, or its reading by the backbone,
launched as one instead of thousands of small kernels.

What makes it possible: a patch's noise is drawn before its flow begins, and nothing on the way depends on a value.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Function = Callable[..., Tensor]
# records a function of tensors, given examples of them; the recording takes tensors of the same shapes
Record = Callable[[Function, tuple[Tensor, ...]], Function]


class Graphs:
    """One picture's graphs: of each kind of call, from its second on. Dropped with the picture. Parts of a model go by
    their names in components.py.

    Only for weights that stay where they are and are used as they are: a graph knows addresses, not modules. Of what
    cannot be recorded, no more is tried; `reasons` says why, by the part.
    """

    def __init__(self, record: Record | None = None) -> None:
        """`record` is `record_cuda`, unless a test brings its own."""
        self.reasons: dict[str, str] = {}
        self._record = record or record_cuda
        self._kinds: dict[Hashable, Function | None] = {}

    def run(self, part: str, function: Function, inputs: tuple[Tensor, ...], kind: Hashable = None) -> Tensor:
        """function(*inputs), good until the next call of its kind. Of one part and kind and for the same shapes,
        functions do the same.
        """
        kind = part, kind, *((tensor.shape, tensor.dtype) for tensor in inputs)
        if part in self.reasons or kind not in self._kinds:
            self._kinds[kind] = None  # the first of a kind finds kernels and workspaces, which a recording must not
            return function(*inputs)
        if self._kinds[kind] is None:
            try:
                self._kinds[kind] = self._record(function, inputs)
            except RuntimeError as error:  # kernels that cannot be recorded, or too little memory
                self.refuse(part, str(error).partition("\n")[0])
                return function(*inputs)
        return self._kinds[kind](*inputs)

    def refuse(self, part: str, reason: str) -> None:
        """No graphs of a part from now on."""
        self.reasons[part] = reason
        log.warning("the %s runs without a CUDA graph: %s", part, reason)


def record_cuda(function: Function, inputs: tuple[Tensor, ...]) -> Function:
    """A CUDA graph with inputs and a result of its own."""
    own = tuple(tensor.clone() for tensor in inputs)
    graph = torch.cuda.CUDAGraph()
    # what other threads ask of the GPU meanwhile is theirs, and spoils nothing here
    with torch.cuda.device(own[0].device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function(*own)

    def replay(*given: Tensor) -> Tensor:
        for mine, theirs in zip(own, given, strict=True):
            mine.copy_(theirs)
        graph.replay()
        return result

    return replay
