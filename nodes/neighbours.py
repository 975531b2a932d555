"""Say at ComfyUI's start which other packs have nodes of the same names: the last one loaded wins, in silence."""

from __future__ import annotations

import logging
from typing import Any

from .comfy.host import registered_nodes
from .replacements import REPLACEMENTS


def check_at_start(server: Any, own: dict[str, type]) -> None:
    """Compare ids when a PromptServer starts, after all packs are loaded; `own` maps our ids to our classes."""

    async def check(_) -> None:
        for line in describe(own, registered_nodes()):
            logging.warning(f"[BitDance] {line}")

    server.app.on_startup.append(check)


def describe(own: dict[str, type], registered: dict[str, type]) -> list[str]:
    """Return a sentence for each folder whose nodes have replaced ours, and for each other pack for BitDance."""
    replaced: dict[str, list[str]] = {}
    for node_id, node in own.items():
        if (other := registered.get(node_id)) not in (None, node):
            replaced.setdefault(_folder(other), []).append(node_id)
    own_folder = next((_folder(node) for node in own.values()), "")
    lines = [
        f"{len(ids)} of {len(own)} nodes of {own_folder} ({ids[0]}, …) come from {folder}, which was loaded later and "
        "has the same ids; keep one of the two folders in custom_nodes"
        for folder, ids in sorted(replaced.items())
    ]
    foreign = {r.old_node_id: registered[r.old_node_id] for r in REPLACEMENTS if r.old_node_id in registered}
    others = sorted({_folder(node) for node in foreign.values()} - {own_folder})
    lines += [
        f"{folder} is another pack for BitDance; its nodes ({', '.join(sorted(foreign))}) and ours work side by side, "
        "but their outputs do not fit each other's inputs"
        for folder in others
    ]
    return lines


def _folder(node: type) -> str:
    """Return the folder that a node was loaded from, as `custom_nodes/bitdance`."""
    return getattr(node, "RELATIVE_PYTHON_MODULE", node.__module__).replace(".", "/", 1)
