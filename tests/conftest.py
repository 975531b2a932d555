import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "scripts")]  # appended: the pack's `nodes` must not hide ComfyUI's


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield
