"""The words that a small model was trained on: what to say of a prompt that has others."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import BitDanceError
from .fields import read_field

WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
ARTICLES = frozenset(("a", "an", "the"))  # that change nothing of what a prompt asks for


@dataclass(frozen=True)
class Vocabulary:
    """`words`, in small letters, and `draws`: a sentence's end that says what the model draws."""

    words: frozenset[str]
    draws: str

    @classmethod
    def from_dict(cls, config: dict[str, Any], source: str) -> Vocabulary | None:
        """Read `words` and `draws` of a model's bitdance.json; None without them: a model of any words.

        Raises BitDanceError for other values than texts; `source` is the file named there.
        """
        if config.get("words") is None:
            return None
        words = read_field(config, "words", list, source)
        if not all(isinstance(word, str) for word in words):
            raise BitDanceError(f"{source}: 'words' must be a list of words")
        return cls(frozenset(word.casefold() for word in words), read_field(config, "draws", str, source))

    def unseen(self, texts: Iterable[str], taught: Iterable[str] = ()) -> list[str]:
        """List the words of prompts that the model was not trained on, each once; `taught` are texts of its LoRAs.

        Capitals, signs and articles do not count; "red-star" is known if its parts are.
        """
        known = self.words | ARTICLES | {word.casefold() for text in taught for word in WORD.findall(text)}
        found: dict[str, str] = {}
        for text in texts:
            for word in WORD.findall(text):
                plain = word.casefold()
                if plain not in known and not known.issuperset(plain.split("-")):
                    found.setdefault(plain, word)
        return list(found.values())


def unseen_note(vocabulary: Vocabulary | None, texts: Iterable[str], taught: Iterable[str] = ()) -> str | None:
    """Return a sentence about the words that a model never saw, or None; `taught` are words of its LoRAs.

    It is no error: a model draws something of every text.
    """
    if vocabulary is None:
        return None
    words = vocabulary.unseen(texts, taught)
    if not words:
        return None
    named = ", ".join(f'"{word}"' for word in words[:8]) + (" and others" if len(words) > 8 else "")
    return f"the model was not trained on {named}; it draws {vocabulary.draws}"
