"""What a notebook shows: the sheet of pictures, the progress bar; and docs/notebook.ipynb runs from top to bottom."""

import io
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import golden
from bitdance_core import BitDanceError, BitDancePipeline, GenerateOutput, ImageNetPipeline
from bitdance_core.pipeline.progress import in_notebook, reporting
from paths import ROOT

P16 = golden.DATA / "t2i_p16"
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


@pytest.fixture(scope="module")
def pipe():
    return BitDancePipeline.from_pretrained(P16, device="cpu")


@pytest.mark.parametrize(("count", "size"), [(1, (6, 4)), (2, (12, 4)), (3, (12, 8)), (4, (12, 8)), (5, (18, 8))])
def test_an_output_shows_its_pictures(count, size):
    images = [Image.new("RGB", (6, 4), (40 * k + 10, 0, 0)) for k in range(count)]
    output = GenerateOutput(images, torch.zeros(count, 1, 1, 1, dtype=torch.bool))
    shown = Image.open(io.BytesIO(output._repr_png_()))
    assert shown.format == "PNG" and shown.size == size
    levels = {int(level) for level in np.unique(np.asarray(shown)[..., 0])} - {0}
    assert levels == {40 * k + 10 for k in range(count)}
    assert repr(output).startswith(f"GenerateOutput({count} of 6x4 pixels")


def test_a_bar_counts_patches_and_the_callback_is_called_too(pipe, capsys):
    seen = []
    settings = {"height": 32, "width": 48, "steps": 1, "callback": lambda done, *_: seen.append(done)}
    with_bar = pipe("a cat", progress=True, **settings)
    assert "6/6" in capsys.readouterr().err and seen == [1, 2, 3, 4, 5, 6]
    assert torch.equal(pipe("a cat", **settings).bits, with_bar.bits) and not capsys.readouterr().err
    ImageNetPipeline.from_pretrained(golden.DATA / "imagenet" / "tiny_4x.pt", device="cpu")([1], 1, progress=True)
    assert "patch" in capsys.readouterr().err


def test_the_bar_is_shown_in_notebooks_by_default(monkeypatch):
    assert not in_notebook()
    with reporting(None, None) as callback:
        assert callback is None
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert in_notebook()
    shell.config = {"TerminalIPythonApp": {}}
    assert not in_notebook()


def test_a_pipeline_says_what_it_is(pipe):
    text = repr(pipe)
    count = sum(weight.numel() for weight in pipe.model.parameters())
    assert f"custom: {count:,} parameters, float32 on cpu, draws " in text and "BinaryTokenizer(" in text
    assert "64x64, 128x64 pixels" in repr(BitDancePipeline.from_pretrained("builtin", device="cpu"))


def test_only_a_picture_is_encoded(pipe):
    odd = pipe.encode(Image.new("L", (19, 21)))
    assert odd.shape == (1, pipe.tokenizer.channels, 5, 4) and odd.dtype == torch.bool
    for wrong in ("picture.png", np.zeros((8, 8, 3)), Image.new("RGB", (3, 8))):
        with pytest.raises(BitDanceError, match="encode takes a PIL image of at least 4x4 pixels, found"):
            pipe.encode(wrong)


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    """Its cells, in order, in one new process; they are plain Python and were saved without their outputs."""
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 4 and not any(cell["outputs"] or cell["execution_count"] for cell in code)
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in code), "utf-8")
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, script], cwd=tmp_path, env={**os.environ, **environment},
                            capture_output=True, text=True, timeout=300)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "star.png").is_file()
