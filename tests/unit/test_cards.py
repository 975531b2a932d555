"""What `info` says of graphics cards agrees with the documents and with what each card holds."""

import re

import pytest

from bitdance_core.cards import CARDS, PRECISIONS, drawing_of, parts_of, room_of, smallest_card, split, text_rows
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
