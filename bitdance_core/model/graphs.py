"""CUDA graphs of what runs again and again: a patch's fifty evaluations of the head, or its reading by the backbone,
launched as one instead of thousands of small kernels.

What makes it possible: a patch's noise is drawn before its flow begins, and nothing on the way depends on a value.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

log = logging.getLogger(__name__)

ROOM = 2**29  # bytes that are free when a recording begins

Function = Callable[..., Tensor]
# records a function of tensors, given examples of them; the recording takes tensors of the same shapes
Record = Callable[[Function, tuple[Tensor, ...]], Function]


@dataclass
class Recordings:
    """The graphs of one part, by the kind of call (None: called once, not recorded yet); `reason` says why no more."""

    kinds: dict[Hashable, Function | None] = field(default_factory=dict)
    reason: str | None = None


class Graphs:
    """One picture's graphs: of each kind of call, from its second on. Parts of a model go by their names in parts.py.

    Only for weights that stay where they are and are used as they are: a graph knows addresses, not modules. Of what
    cannot be recorded, no more is tried; `reasons` says why, by the part.
    """

    def __init__(
        self, record: Record | None = None, kept: Mapping[str, Recordings] | None = None, quiet: bool = False
    ) -> None:
        """`record` is `record_cuda`, unless a test brings its own.

        `kept` has the parts whose graphs outlive the picture; all others are dropped with it. With `quiet`, reasons are
        logged as information, not as warnings.
        """
        self._kept = dict(kept or {})
        self.reasons = {part: recordings.reason for part, recordings in self._kept.items() if recordings.reason}
        self._record, self._quiet = record or record_cuda, quiet
        self._used: set[Hashable] = set()

    def run(self, part: str, function: Function, inputs: tuple[Tensor, ...], kind: Hashable = None) -> Tensor:
        """function(*inputs), good until the next call of its kind. Of one part and kind and for the same shapes,
        functions do the same.
        """
        kinds = self._kept.setdefault(part, Recordings()).kinds
        kind = part, kind, *((tensor.shape, tensor.dtype) for tensor in inputs)
        self._used.add(kind)
        if part in self.reasons or kind not in kinds:
            kinds[kind] = None  # the first of a kind finds kernels and workspaces, which a recording must not
            return function(*inputs)
        if kinds[kind] is None:
            try:
                kinds[kind] = self._record(function, inputs)
            except RuntimeError as error:  # kernels that cannot be recorded, or too little memory
                self._kept[part].reason = str(error).partition("\n")[0]
                self.refuse(part, self._kept[part].reason)
                return function(*inputs)
        return kinds[kind](*inputs)

    def refuse(self, part: str, reason: str) -> None:
        """No graphs of a part from now on."""
        self.reasons[part] = reason
        log.log(logging.INFO if self._quiet else logging.WARNING, "the %s runs without a CUDA graph: %s", part, reason)

    def drop_unused(self) -> None:
        """Drop the graphs that this picture had no use for: each holds memory of its own."""
        for recordings in self._kept.values():
            for kind in recordings.kinds.keys() - self._used:
                del recordings.kinds[kind]


def record_cuda(function: Function, inputs: tuple[Tensor, ...]) -> Function:
    """A CUDA graph with inputs and a result of its own. Raises RuntimeError if there is none, and leaves no trace."""
    own = tuple(tensor.clone() for tensor in inputs)
    graph, device = torch.cuda.CUDAGraph(), own[0].device
    # whoever must give up memory for it does so now: what moves memory during a recording spoils it
    torch.empty(ROOM, dtype=torch.uint8, device=device)
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        try:
            # what other threads ask of the GPU meanwhile is theirs, and spoils nothing here
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = function(*own)
        finally:
            torch.cuda.set_stream(stream)  # PyTorch stays on the stream of a recording that was spoilt

    def replay(*given: Tensor) -> Tensor:
        for mine, theirs in zip(own, given, strict=True):
            mine.copy_(theirs)
        graph.replay()
        return result

    return replay
