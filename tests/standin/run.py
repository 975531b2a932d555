"""Run pytest on files of checks, in a process whose GPUs are the stand-in: `python run.py [pytest arguments]`."""

import sys
import tempfile
from pathlib import Path

import pytest

from device import Card, build, end_node

CARD_BYTES = 8 << 30


class Plugin:
    """The fixture `card`: the stand-in, of its usual size, with nothing on it."""

    def __init__(self, card: Card) -> None:
        self._card, self._is_plugged_in = card, False

    @pytest.fixture(autouse=True)
    def card(self, pack):
        import comfy.model_management as mm

        if not self._is_plugged_in:
            self._card.plug_in()
            self._is_plugged_in = True
        yield self._card
        end_node()
        mm.unload_all_models()
        self._card.dtype = "bfloat16"
        self._card.resize(CARD_BYTES)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        card = Card(build(Path(folder)), CARD_BYTES)
        arguments = ["-q", "-p", "no:cacheprovider", *sys.argv[1:]]
        sys.exit(pytest.main(arguments, plugins=[Plugin(card)]))
