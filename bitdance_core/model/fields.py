"""Values of configurations as they stand in JSON and in the shapes of tensors, each checked as it is read."""

from __future__ import annotations

from typing import Any

from ..errors import BitDanceError

Size = tuple[int, int]  # (height, width) in pixels
Shapes = dict[str, tuple[int, ...]]  # of tensors, by their names in a file

# what no model comes near: a damaged file must not make us build networks without end
MAX_WIDTH, MAX_LAYERS = 2**20, 512


def read_field(config: dict[str, Any], name: str, kind: type, source: str, most: int = MAX_WIDTH) -> Any:
    """A required value of a JSON object, checked to be a `kind` (numbers: above 0, whole ones at most `most`)."""
    if name not in config:
        raise BitDanceError(f"{source}: '{name}' is missing")
    value = config[name]
    if kind is int and type(value) is int and 1 <= value <= most:
        return value
    if kind is float and type(value) in (int, float) and 0 < value < 1e30:
        return float(value)
    if kind not in (int, float) and type(value) is kind:
        return value
    wanted = {int: f"a whole number from 1 to {most}", float: "a number above 0", dict: "an object", list: "a list"}
    raise BitDanceError(f"{source}: '{name}' must be {wanted.get(kind, 'true or false')}, found {str(value)[:40]}")


def read_dimensions(shapes: Shapes, name: str, count: int, source: str) -> tuple[int, ...]:
    """A tensor's shape, checked to have `count` dimensions that a model could have."""
    shape = shapes.get(name)
    if shape is None or len(shape) != count or not all(1 <= n <= MAX_WIDTH for n in shape):
        found = "is missing" if shape is None else f"is {list(shape)}"
        raise BitDanceError(f"{source}: {name} {found}; the model's configuration is read off its {count} dimensions")
    return tuple(shape)


def count_modules(shapes: Shapes, prefix: str) -> int:
    """How many numbered modules there are behind a prefix."""
    return len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})
