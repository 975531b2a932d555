"""Check the inputs of every node by its schema: a graph over the API can connect null, numbers, lists and objects."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..bitdance_core.bits.grid import BitGrid
from ..bitdance_core.errors import BitDanceError, is_out_of_memory
from .comfy.run import Options
from .sockets import Bits, SamplingOptions


def _is_conditioning(value: Any) -> bool:
    def is_entry(entry: Any) -> bool:
        is_pair = isinstance(entry, list | tuple) and len(entry) == 2
        return is_pair and isinstance(entry[0], Tensor) and isinstance(entry[1], dict)

    return isinstance(value, list | tuple) and len(value) > 0 and all(map(is_entry, value))


# a socket's type -> whether a value is of it; models, CLIPs and VAEs are checked where they are used
CHECKS: dict[str, Callable[[Any], bool]] = {
    Bits.io_type: lambda value: isinstance(value, BitGrid),
    SamplingOptions.io_type: lambda value: isinstance(value, Options),
    io.Image.io_type: lambda value: isinstance(value, Tensor) and value.ndim == 4,
    io.Mask.io_type: lambda value: isinstance(value, Tensor) and 2 <= value.ndim <= 4,
    io.Latent.io_type: lambda value: isinstance(value, dict) and isinstance(value.get("samples"), Tensor),
    io.Conditioning.io_type: _is_conditioning,
}


def guard(node: type[io.ComfyNode]) -> None:
    """Let a node refuse inputs of another type, and end in a sentence where the CPU has too little memory."""
    execute = node.execute.__func__

    @functools.cache  # making a schema may list folders, and the sockets stay the same
    def sockets() -> list[io.Input]:
        return [socket for socket in node.GET_SCHEMA().inputs if socket.get_io_type() in CHECKS]

    @functools.cache
    def takes_lists() -> bool:
        return getattr(node.GET_SCHEMA(), "is_input_list", False)

    @functools.wraps(execute)
    def checked(cls, *args, **inputs) -> io.NodeOutput:
        if takes_lists():
            for name, values in inputs.items():
                for value in values if isinstance(values, list) and values else [values]:
                    check_inputs(sockets(), {name: value})
        else:
            check_inputs(sockets(), inputs)
        try:
            return execute(cls, *args, **inputs)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or "OutOfMemoryError" in type(error).__name__:
                raise  # ComfyUI explains a GPU's, and frees its memory
            raise BitDanceError(f"not enough memory ({error}); lower batch_size or the size of the pictures") from error

    node.execute = classmethod(checked)


def check_inputs(sockets: list[io.Input], inputs: dict[str, Any]) -> None:
    """Raise BitDanceError, in the input's name, for a value that is not of its socket's type."""
    for socket in sockets:
        value = inputs.get(socket.id)
        is_absent = socket.id not in inputs or (value is None and socket.optional)
        if is_absent or CHECKS[socket.get_io_type()](value):
            continue
        found = "nothing" if value is None else f"a value of type {type(value).__name__}"
        raise BitDanceError(f"'{socket.id}' must be connected to a {socket.get_io_type()}, found {found}")
