"""What cards of each size hold of a published model, as benchmarks/memory_table.py counts it."""

import re

import pytest

from benchmarks import memory_table
from bitdance_core.model.text_config import PUBLISHED_CONFIGS


@pytest.mark.parametrize("config", PUBLISHED_CONFIGS, ids=lambda config: config.family)
def test_the_weights_are_the_published_parameters(config):
    """13.2e9 in the layers and 1.76e9 in the head (docs/facts.md#published-models), at two bytes, or near one."""
    language_model, head = memory_table.parts_of(config, 16)
    assert language_model == pytest.approx(2 * 13.24e9, rel=0.01) and head == pytest.approx(2 * 1.76e9, rel=0.01)
    quantized, head = memory_table.parts_of(config, 8)
    assert quantized == pytest.approx(13.24e9, rel=0.01) and 1.76e9 < head < 2e9


@pytest.mark.parametrize("bits", memory_table.PRECISIONS.values())
def test_what_stays_and_what_is_streamed(bits):
    """All of it where there is room; the less room, the more comes over the bus."""
    config = PUBLISHED_CONFIGS[0]
    whole = sum(memory_table.parts_of(config, bits))
    assert memory_table.split(config, bits, whole) == (memory_table.parts_of(config, bits)[0], 0.0)
    streamed = [memory_table.split(config, bits, share * whole)[1] for share in (0.9, 0.7, 0.5)]
    assert 0 < streamed[0] < streamed[1] < streamed[2]
    assert memory_table.split(config, bits, 0.05 * whole) is None


def test_the_14b_fits_12_gb_at_4_bits():
    """All of it, on any card: convrot_w4a4 needs integer units, nvfp4 none if it is dequantized."""
    config = PUBLISHED_CONFIGS[0]
    room = 12 * 2**30 - 1.5e9 - memory_table.drawing_of(config, 1)
    for bits in (4.5, 4.0):
        assert memory_table.split(config, bits, room)[1] == 0.0
    _, head = memory_table.parts_of(config, 4.0)  # whose layers stay in 8
    assert head == memory_table.parts_of(config, 8.0)[1]


def test_the_14b_fits_at_fp8(capsys):
    """Under 19 GB with everything resident, under 11 GB with the language model streamed."""
    config = PUBLISHED_CONFIGS[0]
    drawing, (language_model, head) = memory_table.drawing_of(config, 1), memory_table.parts_of(config, 8)
    assert language_model + head + drawing < 19e9
    assert head + drawing + 2 * language_model / config.backbone.num_layers < 11e9
    memory_table.main(["--batch", "2"])
    printed = capsys.readouterr().out
    assert len(re.findall(r"^\| \d+ GB \|", printed, re.M)) == len(memory_table.CARDS)
    assert "batch 2" in printed
