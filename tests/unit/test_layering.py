"""Imports go downwards only, and never in a circle (docs/structure.md#layers): the core works without ComfyUI."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from paths import ROOT

CORE = ROOT / "bitdance_core"
ALLOWED = {"torch", "safetensors", "tokenizers", "huggingface_hub", "numpy", "PIL", "tqdm", "flash_attn", "skimage"}
# packages of an extra, by the module that needs them
OPTIONAL = {
    "batch.ray_workers": {"ray"},
    "model.kernels": {"triton"},
    "model.products": {"triton"},
    "training.lora": {"peft"},
    "training.sharding": {"accelerate"},
    "training.trainer": {"accelerate"},
    "training.runner": {"accelerate"},
}
# a package or module imports those of lower layers, and itself
LAYERS = [
    {"errors", "parts", "version"},
    {"devices"},
    {"model"},
    {"checkpoints", "sampling"},
    {"bits", "tokenizer", "recipe", "cards"},
    {"pipeline"},
    {"batch"},
    {"training"},
    {"cli"},
    {"__init__", "__main__"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}


def imported(path: Path) -> set[str]:
    """Top-level names of a file's absolute imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def core_modules() -> dict[str, Path]:
    return {".".join(path.relative_to(CORE).with_suffix("").parts): path for path in sorted(CORE.rglob("*.py"))}


def imported_here(name: str, path: Path) -> set[str]:
    """Modules of the core that a module imports, as dotted names below the core."""
    known, package = core_modules(), name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            if ".".join(base) in known:
                found.add(".".join(base))
            else:  # `from . import module`
                found |= {".".join([*base, alias.name]) for alias in node.names}
    return found & known.keys()


def test_the_core_imports_only_what_the_design_allows():
    for name, path in core_modules().items():
        allowed = ALLOWED | OPTIONAL.get(name, set())
        foreign = imported(path) - sys.stdlib_module_names - allowed
        assert not foreign, f"{name} imports {foreign}"


@pytest.mark.parametrize("name", core_modules())
def test_the_core_imports_downwards(name):
    own = name.split(".")[0]
    for other in imported_here(name, core_modules()[name]):
        theirs = other.split(".")[0]
        assert theirs == own or LAYER[theirs] < LAYER[own], f"{name} imports {other}"


def test_no_modules_of_the_core_import_each_other():
    graph = {name: imported_here(name, path) for name, path in core_modules().items()}
    assert sum(map(len, graph.values())) > 100
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_nodes_reach_comfyuis_managers_only_through_nodes_comfy():
    for path in (ROOT / "nodes").glob("*.py"):
        foreign = imported(path) - sys.stdlib_module_names - {"torch", "comfy_api"}
        assert not foreign, f"{path.name} imports {foreign}"


def test_nodes_comfy_imports_no_node():
    for path in (ROOT / "nodes" / "comfy").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        from_nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 2]
        assert not from_nodes and "comfy_api" not in imported(path), path.name


def test_set_up_scripts_need_only_the_standard_library():
    for name in ("environment", "comfyui", "demo", "test"):
        foreign = imported(ROOT / "scripts" / f"{name}.py") - sys.stdlib_module_names - {"environment", "comfyui"}
        assert not foreign, f"{name}.py imports {foreign}"
