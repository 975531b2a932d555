"""All nodes of ComfyUI itself, in this process, and their inputs with defaults."""

import asyncio
import inspect
import sys
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location


@contextmanager
def stock_nodes(comfyui, extra=True):
    """ComfyUI's `nodes`, which its other files import; in this process ours would come first. Yields id -> class.

    `extra` nodes are those of comfy_extras.
    """
    spec = spec_from_file_location("nodes", comfyui / "nodes.py")
    nodes, ours = module_from_spec(spec), sys.modules.get("nodes")
    sys.modules["nodes"] = nodes
    try:
        spec.loader.exec_module(nodes)
        if extra:
            asyncio.run(nodes.init_builtin_extra_nodes())
        yield nodes.NODE_CLASS_MAPPINGS
    finally:
        del sys.modules["nodes"]
        if ours is not None:
            sys.modules["nodes"] = ours


def inputs_of(kind, *groups):
    """Return a node's inputs: name -> (type, options)."""
    types = kind.INPUT_TYPES()
    return {
        name: (entry[0], entry[1] if len(entry) > 1 else {})
        for group in groups
        for name, entry in types.get(group, {}).items()
    }


def defaults_of(kind, sockets):
    """Return values for the required inputs, of `sockets` (type -> value) or defaults, and the names that have none."""
    values, missing = {}, []
    for name, (type_, options) in inputs_of(kind, "required").items():
        choices = type_ if isinstance(type_, list | tuple) else options.get("options")
        if isinstance(type_, str) and type_ in sockets:
            values[name] = sockets[type_]
        elif "default" in options:
            values[name] = options["default"]
        elif choices:
            values[name] = choices[0]
        else:
            missing.append(name)
    return values, missing


def call(kind, **values):
    """Run a node; return its outputs by type (several of a type: the first)."""
    run = kind.execute if hasattr(kind, "define_schema") else getattr(kind(), kind.FUNCTION)
    if not hasattr(kind, "define_schema"):
        values = {name: value for name, value in values.items() if name in inspect.signature(run).parameters}
    result = run(**values)
    outputs = result.args if hasattr(result, "args") else result
    return list(zip(kind.RETURN_TYPES, outputs))
