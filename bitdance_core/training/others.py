"""What the pictures of a data set do not show: conditions under which a model should go on drawing as it does.

The words that all captions share are what is taught; a caption with other words in their place is something else. For
class-conditional models it is any other class.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from .data import DataSet, Example, Subjects
from .loss import Condition

WORD = re.compile(r"\w+")
COMMON = 0.9  # the share of captions that have a common word
# words without a meaning of their own, which other captions have too
SMALL_WORDS = frozenset("a an the of on in at by with and to for from is as it its".split())
MAX_WORDS = 20


def common_words(data: DataSet) -> list[str]:
    """Return the words that nearly all captions have, in their order, at most MAX_WORDS."""
    captions = [WORD.findall(example.words.casefold()) for example in data.examples]
    counts = Counter(word for caption in captions for word in set(caption))
    return [word for word in dict.fromkeys(captions[0]) if counts[word] >= COMMON * len(captions)][:MAX_WORDS]


class Others:
    """Make conditions that a data set does not show."""

    def __init__(self, data: DataSet, subjects: Subjects) -> None:
        self.subjects = subjects
        if subjects.is_of_classes:
            shown = {example.condition for example in data.examples}
            self.classes = [number for number in range(subjects.config.num_classes) if number not in shown]
            return
        self.taught = frozenset(common_words(data)) - SMALL_WORDS
        self.words = [word for word in subjects.prompts.words() if word.casefold() not in self.taught]

    def conditions(self, examples: Sequence[Example], rng: np.random.Generator) -> list[Condition] | None:
        """Return one condition per picture; None if the captions share no word, as of pictures in one style."""
        if self.subjects.is_of_classes:
            return [int(n) for n in rng.choice(self.classes, len(examples))] if self.classes else None
        if not self.taught or not self.words:
            return None
        return [self.subjects.condition(self._caption(example.words, rng), example.size) for example in examples]

    def _caption(self, caption: str, rng: np.random.Generator) -> str:
        """Put a random word of the model's vocabulary in the place of each taught word."""

        def replaced(match: re.Match) -> str:
            is_taught = match[0].casefold() in self.taught
            return self.words[rng.integers(len(self.words))] if is_taught else match[0]

        return WORD.sub(replaced, caption)
