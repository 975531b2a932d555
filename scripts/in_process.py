"""Import our nodes as ComfyUI imports a pack, together with ComfyUI's modules, in this process and on the CPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def import_pack(comfyui: Path) -> ModuleType:
    """Import the pack as the module `pack`; its modules are then pack.nodes, pack.nodes.comfy.model, …"""
    sys.path.append(str(comfyui))  # at the end, so that its `nodes` and `tests` do not hide ours
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = True
    spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules["pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["pack"])
    return sys.modules["pack"]
