"""The memory that fine-tuning takes, as benchmarks/finetuning_memory.py computes it, against tensors that exist."""

import pytest
import torch

from benchmarks import finetuning_memory as memory
from bitdance_core import BitDancePipeline
from bitdance_core.model.attention import attention
from bitdance_core.model.text_config import PUBLISHED_CONFIGS


@pytest.fixture(autouse=True)
def gradients():
    with torch.inference_mode(False), torch.enable_grad():
        yield


@pytest.mark.parametrize("recompute", [False, True])
def test_computed_sizes_are_those_of_tensors(recompute):
    """A step of the built-in model on the CPU holds what was computed without data, within 15 %."""
    config = BitDancePipeline.from_pretrained("builtin", device="cpu").config
    computed = memory.needs(config, 16, "both", recompute, batch=8, dtype=torch.float32)
    counted = memory.needs(config, 16, "both", recompute, 8, dtype=torch.float32, device="cpu", attend=attention)
    assert computed.activations == pytest.approx(counted.activations, rel=0.15)
    assert (computed.weights, computed.adapter) == (counted.weights, counted.adapter)


def test_the_14b_model_fits_cards_and_its_lora_a_file():
    need = memory.needs(PUBLISHED_CONFIGS[0], 8, "both", True)
    assert need.weights == pytest.approx(16.7e9, rel=0.01)
    assert need.total + memory.RESERVE < 24 * 2**30
    assert need.adapter / 4 < 300e6  # of the adapter, its gradient and two moments, the file has the first, in float32
