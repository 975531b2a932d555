"""ComfyUI's server and the nodes of all packs, where they run: tests import our nodes without them."""

from __future__ import annotations

import sys
from typing import Any


def running_server() -> Any | None:
    """Return ComfyUI's PromptServer; None in a process without one."""
    server = sys.modules.get("server")
    return getattr(server.PromptServer, "instance", None) if server else None


def registered_nodes() -> dict[str, type]:
    """Return the classes of all nodes by their ids, as loaded so far."""
    import nodes  # late: it imports every model that ComfyUI knows

    return nodes.NODE_CLASS_MAPPINGS
