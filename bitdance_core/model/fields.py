"""Read and check values of configurations, from JSON objects and from the shapes of tensors."""

from __future__ import annotations

from typing import Any

from ..errors import BitDanceError

Size = tuple[int, int]  # (height, width) in pixels
Shapes = dict[str, tuple[int, ...]]  # name of a tensor -> its shape

# far above every model: a damaged file must not make us build a huge network
MAX_WIDTH, MAX_LAYERS = 2**20, 512


def read_field(config: dict[str, Any], name: str, kind: type, source: str, most: int = MAX_WIDTH) -> Any:
    """Return a required value of a JSON object. Raises BitDanceError unless it is of type `kind`, and numbers above 0.

    Whole numbers may be at most `most`.
    """
    if name not in config:
        raise BitDanceError(f"{source}: '{name}' is missing")
    value = config[name]
    if kind is int and type(value) is int and 1 <= value <= most:
        return value
    if kind is float and type(value) in (int, float) and 0 < value < 1e30:
        return float(value)
    if kind not in (int, float) and type(value) is kind:
        return value
    wanted = {int: f"a whole number from 1 to {most}", float: "a number above 0", dict: "an object", list: "a list",
              str: "text"}  # fmt: skip
    raise BitDanceError(f"{source}: '{name}' must be {wanted.get(kind, 'true or false')}, found {str(value)[:40]}")


def read_dimensions(shapes: Shapes, name: str, count: int, source: str) -> tuple[int, ...]:
    """Return the shape of a tensor. Raises BitDanceError unless it has `count` dimensions of plausible size."""
    shape = shapes.get(name)
    if shape is None or len(shape) != count or not all(1 <= n <= MAX_WIDTH for n in shape):
        found = "is missing" if shape is None else f"is {list(shape)}"
        raise BitDanceError(
            f"{source}: {name} {found}; expected {count} dimensions, which give the model's configuration"
        )
    return tuple(shape)


def count_modules(shapes: Shapes, prefix: str) -> int:
    """Count the numbered modules after a prefix."""
    return len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})
