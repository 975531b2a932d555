"""The trainer: every stage runs, its model loads, and a stopped run goes on as if it had not been."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from bitdance_core import BitDancePipeline
from builtin import model as builtin_model
from builtin import train as train_builtin
from paths import ROOT

QUICK = [
    *("--tokenizer-steps", "2", "--polish-steps", "1", "--model-steps", "2", "--decoder-steps", "1"),
    *("--tokenizer-batch", "2", "--model-batch", "2"),
]


def test_all_stages_make_a_model_that_draws(tmp_path):
    run, folder = tmp_path / "run", tmp_path / "model"
    command = [sys.executable, "-m", "builtin.train", "all", "--run", run, "--to", folder]
    result = subprocess.run([*command, *QUICK], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    pipe = BitDancePipeline.from_pretrained(folder, device="cpu")
    assert pipe.default_size == (64, 64) and pipe.config.family == "builtin"
    assert pipe.generate("a small red circle on a white background", steps=1).images[0].size == (64, 64)
    other = subprocess.run([*command, *QUICK, "--seed", "1"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert other.returncode == 1 and "seed 0 -> 1" in other.stderr and "another --run" in other.stderr


@torch.inference_mode(False)
def test_a_stopped_run_continues_as_if_it_had_not_been(tmp_path):
    def start(run, stop_at=None):
        """Train a small layer for 6 steps, or until it is stopped."""

        def loss_of_step(step):
            if step == stop_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            return module(x).square().mean(), {}

        run.mkdir(exist_ok=True)
        torch.manual_seed(0)
        module = nn.Linear(4, 4)
        train_builtin.train(run, "part", module, 6, 1e-2, 0.9, loss_of_step, save_every=2)
        return torch.load(run / "part.pt", weights_only=True)["ema"]

    whole = start(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "stopped", stop_at=5)
    resumed = start(tmp_path / "stopped")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("text", ["a small red circle on a white background", "Zwölf Boxkämpfer 🎈"])
def test_the_prompt_tokenizer_spells_anything(tmp_path, text):
    tokenizer = builtin_model.train_prompt_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text).ids) == text.lower()
    assert len(tokenizer.encode("a small red circle on a white background").ids) == 8
