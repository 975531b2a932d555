"""Imports go downwards only (docs/structure.md#layers): the core must work where there is no ComfyUI."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {"torch", "safetensors", "tokenizers", "huggingface_hub", "numpy", "PIL", "tqdm", "flash_attn", "skimage"}


def imported(path: Path) -> set[str]:
    """Top-level names of a file's absolute imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_the_core_imports_only_what_the_design_allows():
    import sys

    for path in (ROOT / "bitdance_core").rglob("*.py"):
        allowed = ALLOWED | ({"ray"} if path.name == "distributed.py" else set())
        foreign = imported(path) - set(sys.stdlib_module_names) - allowed
        assert not foreign, f"{path.name} imports {foreign}"


def test_only_the_adapter_knows_how_comfyui_manages_models():
    for path in (ROOT / "nodes").glob("*.py"):
        foreign = imported(path) - {"__future__", "comfy_api"}
        assert not foreign, f"{path.name} imports {foreign}"


def test_set_up_scripts_need_only_the_standard_library():
    import sys

    for name in ("environment", "comfyui", "demo", "test"):
        foreign = imported(ROOT / "scripts" / f"{name}.py") - set(sys.stdlib_module_names) - {"environment", "comfyui"}
        assert not foreign, f"{name}.py imports {foreign}"
