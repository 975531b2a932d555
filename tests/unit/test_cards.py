"""What `info` says of graphics cards agrees with the documents and with what each card holds."""

import re

import pytest

from bitdance_core.cards import (
    CARDS,
    PRECISIONS,
    Machine,
    comfortable_card,
    drawing_of,
    parts_of,
    recommend,
    room_of,
    size_and_card,
    smallest_card,
    split,
    text_rows,
)
from bitdance_core.checkpoints.hub import PUBLISHED_MODELS, RECOMMENDED
from bitdance_core.cli import main
from bitdance_core.model.text_config import PUBLISHED_CONFIGS
from paths import ROOT


@pytest.mark.parametrize("config", PUBLISHED_CONFIGS, ids=lambda config: config.family)
def test_a_published_model_fits_the_cards_that_are_named(config):
    rows = text_rows(config)
    assert len(rows) == len(PRECISIONS)
    documents = "".join((ROOT / name).read_text("utf-8") for name in ("README.md", "docs/memory.md"))
    for (_, line), bits in zip(rows, PRECISIONS.values()):
        amount, whole, streamed = map(float, re.findall(r"[\d.]+(?= GB)", line))
        needed = sum(parts_of(config, bits)) + drawing_of(config, 1)
        assert amount == pytest.approx(needed / 1e9, abs=0.05) and f" {amount}" in documents
        assert needed <= room_of(whole) and streamed < whole
        below = [card for card in CARDS if card < whole]
        assert below and all(needed > room_of(card) for card in below)
        assert split(config, bits, room_of(streamed) - drawing_of(config, 1)) is not None


def test_what_no_card_holds_is_said():
    assert smallest_card(room_of(CARDS[-1]) + 1) is None and smallest_card(0) == CARDS[0]


def test_info_ends_with_the_card(capsys):
    tokenizer = ROOT / "bitdance_core" / "assets" / "builtin" / "ae.safetensors"
    classes = ROOT / "tests" / "data" / "imagenet" / "tiny_4x.pt"
    for source in ("builtin", classes, tokenizer):
        assert main(["info", str(source)]) == 0
        assert re.match(r"memory in bf16 +.* GB, fits cards from 8 GB", capsys.readouterr().out.splitlines()[-1])


GIB = 2**30


def test_the_cards_of_the_published_models_are_those_of_their_configurations():
    for config in PUBLISHED_CONFIGS:
        name = config.family.replace("bitdance-14b", "BitDance-14B")
        drawing = drawing_of(config, 1)
        assert PUBLISHED_MODELS[name].card == comfortable_card(*parts_of(config, 16), drawing)
        assert PUBLISHED_MODELS[f"{name}-diffusers"].card == PUBLISHED_MODELS[name].card
        if name in RECOMMENDED:
            assert RECOMMENDED[name] == smallest_card(sum(parts_of(config, 16)) + drawing)
            assert PUBLISHED_MODELS[f"{name}-fp8"].card == comfortable_card(*parts_of(config, 8), drawing)
            assert RECOMMENDED[f"{name}-fp8"] == PUBLISHED_MODELS[f"{name}-fp8"].card


@pytest.mark.parametrize(
    ("machine", "here", "name"),
    [
        (Machine(0, 64 * GIB, 500 * GIB), [], None),  # no graphics card
        (Machine(8 * GIB, 64 * GIB, 500 * GIB), [], None),
        (Machine(int(11.9 * GIB), 32 * GIB, 100 * GIB), [], "BitDance-14B-64x-fp8"),
        (Machine(12 * GIB, 16 * GIB, 100 * GIB), [], None),  # no system memory to stream from
        (Machine(12 * GIB, 32 * GIB, 10 * GIB), [], None),  # no room on the disk
        (Machine(12 * GIB, 32 * GIB, 10 * GIB), ["BitDance-14B-64x-fp8"], "BitDance-14B-64x-fp8"),
        (Machine(24 * GIB, 64 * GIB, 500 * GIB), ["BitDance-14B-64x"], "BitDance-14B-64x-fp8"),
        (Machine(48 * GIB, 64 * GIB, 500 * GIB), [], "BitDance-14B-64x"),
        (Machine(48 * GIB, 32 * GIB, 500 * GIB), [], "BitDance-14B-64x-fp8"),
        (Machine(80 * GIB, 64 * GIB, 20 * GIB), [], "BitDance-14B-64x-fp8"),
    ],
)
def test_what_is_recommended_fits_card_memory_and_disk(machine, here, name):
    assert recommend(machine, here) == name


def test_headers_tell_size_and_card():
    tiny = ROOT / "tests" / "data" / "t2i_p64"
    size, card = size_and_card(tiny)
    assert size == sum(
        path.stat().st_size for path in tiny.glob("*.safetensors") if path.name != "expected.safetensors"
    )
    assert card == CARDS[0]
