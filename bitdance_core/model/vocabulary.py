"""The words that a small model was trained on: what to say of a prompt that has others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import BitDanceError
from .fields import read_field

WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
PAIR = re.compile(rf"(?<![^\W_])({WORD.pattern})(?=\s+({WORD.pattern}))")
ARTICLES = frozenset(("a", "an", "the"))  # that change nothing of what a prompt asks for


@dataclass(frozen=True)
class Vocabulary:
    """`words`, in small letters; `draws`, a sentence's end that says what the model draws; and `followed_by`: for some
    words the only ones that came right behind them (behind a colour that is the ground's alone, "background").
    """

    words: frozenset[str]
    draws: str
    followed_by: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, config: dict[str, Any], source: str) -> Vocabulary | None:
        """Read `words`, `draws` and `followed_by` of a model's bitdance.json; None without words: a model of any.

        Raises BitDanceError for other values than texts; `source` is the file named there.
        """
        if config.get("words") is None:
            return None
        words = _words(config["words"], "words", source)
        pairs = read_field({"followed_by": {}, **config}, "followed_by", dict, source)
        followed_by = {word.casefold(): _words(behind, f"followed_by.{word}", source) for word, behind in pairs.items()}
        return cls(words, read_field(config, "draws", str, source), followed_by)

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` reads."""
        followed_by = {word: sorted(behind) for word, behind in sorted(self.followed_by.items())}
        return {"draws": self.draws, "words": sorted(self.words)} | (
            {"followed_by": followed_by} if followed_by else {}
        )

    def with_texts(self, texts: Sequence[str]) -> Vocabulary:
        """Return one that knows the words and the pairs of more prompts, too."""
        known = replace(self, words=self.words.union(word.casefold() for word in self.unseen(texts)))
        followed_by = dict(self.followed_by)
        for pair in known.unseen_pairs(texts):
            word, behind = pair.casefold().split()
            followed_by[word] = followed_by[word] | {behind}
        return replace(known, followed_by=followed_by)

    def unseen(self, texts: Iterable[str], taught: Iterable[str] = ()) -> list[str]:
        """List the words of prompts that the model was not trained on, each once; `taught` are texts of its LoRAs.

        Capitals, signs and articles do not count; "red-star" is known if its parts are.
        """
        known = self.words | ARTICLES | _all_words(taught)
        found: dict[str, str] = {}
        for text in texts:
            for word in WORD.findall(text):
                plain = word.casefold()
                if plain not in known and not known.issuperset(plain.split("-")):
                    found.setdefault(plain, word)
        return list(found.values())

    def unseen_pairs(self, texts: Iterable[str], taught: Iterable[str] = ()) -> list[str]:
        """List what `followed_by` excludes, such as "red car", each once; `taught` are texts of its LoRAs.

        Words with a sign between them are no pair, and those that `unseen` lists, or that a LoRA taught, are in none.
        """
        found: dict[str, str] = {}
        known = self.words - ARTICLES - _all_words(taught)
        for text in texts:
            for pair in PAIR.finditer(text):
                word, behind = pair[1].casefold(), pair[2].casefold()
                if word in known and behind in known and behind not in self.followed_by.get(word, (behind,)):
                    found.setdefault(f"{word} {behind}", f"{pair[1]} {pair[2]}")
        return list(found.values())


def _words(value: Any, name: str, source: str) -> frozenset[str]:
    words = read_field({name: value}, name, list, source)
    if not all(isinstance(word, str) for word in words):
        raise BitDanceError(f"{source}: '{name}' must be a list of words")
    return frozenset(word.casefold() for word in words)


def _all_words(texts: Iterable[str]) -> set[str]:
    return {word.casefold() for text in texts for word in WORD.findall(text)}


def unseen_note(vocabulary: Vocabulary | None, texts: Iterable[str], taught: Iterable[str] = ()) -> str | None:
    """Return a sentence about the words that a model never saw, or None; `taught` are words of its LoRAs.

    It is no error: a model draws something of every text.
    """
    if vocabulary is None:
        return None
    texts, taught = list(texts), list(taught)
    words = vocabulary.unseen(texts, taught) + vocabulary.unseen_pairs(texts, taught)
    if not words:
        return None
    named = ", ".join(f'"{word}"' for word in words[:8]) + (" and others" if len(words) > 8 else "")
    return f"the model was not trained on {named}; it draws {vocabulary.draws}"
