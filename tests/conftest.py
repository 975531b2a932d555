import asyncio
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, settings

from paths import DATA, ROOT

sys.path += [str(ROOT), str(ROOT / "scripts")]  # appended: the pack's `nodes` must not hide ComfyUI's

from comfyui import Server  # noqa: E402
from environment import ensure_comfyui  # noqa: E402
from hub_server import serve  # noqa: E402
from in_process import import_pack  # noqa: E402

# tests never time: how fast examples come depends on the machine
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """ComfyUI's folder."""
    return ensure_comfyui()


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """The server's folders; small random models (golden ones) lie in models/bitdance."""
    base = tmp_path_factory.mktemp("comfyui")
    (base / "models" / "bitdance").mkdir(parents=True)
    for folder in (DATA).iterdir():
        (base / "models" / "bitdance" / folder.name).symlink_to(folder, target_is_directory=True)
    return base


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> Iterator[dict[str, str]]:
    """What makes a server ask a stand-in hub, which has the fastest of the small models under a published name."""
    folder = tmp_path_factory.mktemp("hub")
    for name, ours in {"BitDance_B_4x.pt": "tiny_16x.pt", "ae_d16c32.pt": "ae_tiny_16x.pt"}.items():
        (folder / name).symlink_to(DATA / "imagenet" / ours)
    with serve("shallowdream204/BitDance-ImageNet", folder) as (address, _):
        yield {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "home")}


@pytest.fixture(scope="session")
def server(comfyui, base, hub):
    """A real ComfyUI with this pack, started once; BITDANCE_FRONTEND is the folder of another page to serve."""
    page = os.environ.get("BITDANCE_FRONTEND")
    options = ["--cpu", *(["--front-end-root", page] if page else [])]
    with Server(Path(sys.executable), comfyui, base, *options, env=hub) as server:
        yield server


@pytest.fixture
def run(server):
    """Run a graph to its end: `run(graph)` returns its pictures, or raises RuntimeError with ComfyUI's message."""
    from comfyui import error_of
    from graphs import images

    def run(graph):
        history = server.wait(server.queue(graph))
        if message := error_of(history):
            raise RuntimeError(message)
        return images(server.images(history))

    return run


@pytest.fixture(scope="session")
def pack_module(comfyui):
    """Our nodes in this process, imported as ComfyUI imports a pack, beside ComfyUI's own modules."""
    import_pack(comfyui)
    nodes = importlib.import_module("pack.nodes")
    asyncio.run(nodes.BitDanceExtension().on_load())
    return nodes


@pytest.fixture(scope="session")
def pack(pack_module):
    """The modules between the nodes and ComfyUI, and the loaders."""
    names = ["model", "weights", "quantize", "previews", "vae", "lora", "prefetch", "graphs", "saving", "run", "clip"]
    names += ["attention", "float8", "weight_choice", "weight_facts", "placement"]
    modules = {name: importlib.import_module(f"pack.nodes.comfy.{name}") for name in names}
    return SimpleNamespace(**modules, loaders=importlib.import_module("pack.nodes.loaders"))


@pytest.fixture
def fp8_card(monkeypatch):
    """ComfyUI takes the CPU for a card with fp8 matrix units: its own --supports-fp8-compute."""
    import comfy.model_management as mm

    monkeypatch.setattr(mm, "SUPPORT_FP8_OPS", True)


@pytest.fixture(scope="module")
def stock_nodes(comfyui, pack):
    """ComfyUI's `nodes`, which its other files import; in this process ours would come first."""
    spec = importlib.util.spec_from_file_location("nodes", comfyui / "nodes.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "nodes", importlib.util.module_from_spec(spec))
        spec.loader.exec_module(sys.modules["nodes"])
        yield
