"""The grammar of captions: what a scene means, written in varied words, and read back."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from builtin.scenes.grounds import COLOURS, Ground
from builtin.scenes.things import THINGS

NUMBERS = ("one", "two", "three", "four")
SIZES = {"large": ("large", "big", "huge"), "small": ("small", "little", "tiny")}
RELATIONS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
    "beside": ("beside", "next to", "and", "with"),
}
PLACE_WORDS = {
    "grass": ("on grass", "on the grass", "in a meadow", "on grass under a blue sky"),
    "night": ("at night", "under the stars", "in a starry night", "in the night sky"),
    "sea": ("at sea", "on the sea", "by the sea", "over the sea"),
}
BARE = ("grapes", "broccoli", "lightning", "coffee", "ice cream", "fire")  # words that take no article
OPENINGS = ("a picture of ", "a drawing of ", "a photo of ")


@dataclass(frozen=True)
class Part:
    """A kind of thing, how many of it, and of a single one whether it is large or small (None: unsaid)."""

    name: str
    count: int = 1
    size: str | None = None


@dataclass(frozen=True)
class Meaning:
    """One or two kinds of things; two single ones have a relation of the first to the second."""

    parts: tuple[Part, ...]
    relation: str | None
    ground: Ground | None  # None: a caption that says none


def _pick(rng: np.random.Generator, options):
    return options[rng.integers(len(options))]


def article(words: str, rng: np.random.Generator | None = None) -> str:
    """The words behind "a" or "an", or now and then behind "the" or nothing."""
    if words.endswith(BARE) and " of " not in words:
        return words
    kind = 0.0 if rng is None else rng.random()
    if kind > 0.85:
        return words if kind > 0.92 else f"the {words}"
    return f"an {words}" if words[0] in "aeiou" and not words.startswith("uni") else f"a {words}"


def _part(part: Part, rng: np.random.Generator, counted: bool) -> str:
    words = [(thing.name, thing.plural) for thing in THINGS if thing.name == part.name]
    if rng.random() < 0.25:
        words = [pair for thing in THINGS if thing.name == part.name for pair in thing.words]
    singular, plural = _pick(rng, words)
    if part.count > 1:
        return f"{NUMBERS[part.count - 1]} {plural}"
    size = ""
    if part.size is not None and rng.random() < (0.5 if part.size == "large" else 0.9):  # unsaid most often is large
        size = _pick(rng, SIZES[part.size]) + " "
    if counted:
        return f"one {size}{singular}" if rng.random() < 0.5 else article(size + singular)
    return article(size + singular, rng)


def _ground(ground: Ground, rng: np.random.Generator) -> str:
    if ground.top not in COLOURS:
        return _pick(rng, PLACE_WORDS[ground.top])
    if ground.bottom is not None:
        return _pick(rng, ("on a {} to {} gradient", "on a gradient from {} to {}")).format(ground.top, ground.bottom)
    colour = article(ground.top)
    form = _pick(rng, ("on {a} background",) * 3 + ("on {c}", "with {a} background", "against {a} background"))
    return form.format(a=colour, c=ground.top)


def write_caption(meaning: Meaning, rng: np.random.Generator) -> str:
    """The meaning in words that vary with rng; one in twelve says no ground."""
    parts = meaning.parts
    counted = len(parts) == 2 and meaning.relation is None
    words = [_part(part, rng, counted) for part in parts]
    joint = _pick(rng, RELATIONS[meaning.relation]) if meaning.relation else "and"
    caption = f" {joint} ".join(words)
    if rng.random() < 0.06 and not caption.startswith("the "):
        caption = _pick(rng, OPENINGS) + caption
    if meaning.ground is None or rng.random() < 0.08:
        return caption
    ground = _ground(meaning.ground, rng)
    if rng.random() < 0.08:
        return f"{ground}, {caption}"
    return f"{caption} {ground}"


# -- reading -----------------------------------------------------------------------------------------------------------


def _either(options) -> str:
    return "|".join(re.escape(option) for option in sorted(options, key=len, reverse=True))


_SINGULAR = {word: thing.name for thing in THINGS for word, _ in thing.words}
_PLURAL = {word: thing.name for thing in THINGS for _, word in thing.words}
_SIZE = {word: size for size, words in SIZES.items() for word in words}
_RELATION = {word: relation for relation, words in RELATIONS.items() for word in words}
_PLACE = {word: place for place, words in PLACE_WORDS.items() for word in words}
_PART = re.compile(
    rf"(?:(?P<number>{_either(NUMBERS[1:])}) (?P<plural>{_either(_PLURAL)}))"
    rf"|(?:(?:a|an|the|one) )?(?:(?P<size>{_either(_SIZE)}) )?(?P<singular>{_either(_SINGULAR)})"
)
_GROUND = re.compile(
    rf"(?P<place>{_either(_PLACE)})"
    rf"|on a (?P<top>{_either(COLOURS)}) to (?P<bottom>{_either(COLOURS)}) gradient"
    rf"|on a gradient from (?P<first>{_either(COLOURS)}) to (?P<last>{_either(COLOURS)})"
    rf"|(?:on|with|against) an? (?P<colour>{_either(COLOURS)}) background|on (?P<plain>{_either(COLOURS)})"
)


def _read_ground(text: str) -> Ground | None:
    match = _GROUND.fullmatch(text)
    if match is None:
        return None
    if match["place"]:
        return Ground(_PLACE[match["place"]])
    if match["top"] or match["first"]:
        return Ground(match["top"] or match["first"], match["bottom"] or match["last"])
    return Ground(match["colour"] or match["plain"])


def _read_part(text: str) -> Part | None:
    match = _PART.fullmatch(text)
    if match is None:
        return None
    if match["number"]:
        return Part(_PLURAL[match["plural"]], NUMBERS.index(match["number"]) + 1)
    return Part(_SINGULAR[match["singular"]], 1, _SIZE.get(match["size"]))


def _read_things(text: str) -> tuple[tuple[Part, ...], str | None] | None:
    for opening in OPENINGS:
        text = text.removeprefix(opening)
    if part := _read_part(text):
        return (part,), None
    for word in sorted(_RELATION, key=len, reverse=True):
        first, joint, second = text.partition(f" {word} ")
        parts = _read_part(first), _read_part(second)
        if joint and all(parts):
            counted = parts[0].count + parts[1].count > 2
            return parts, None if counted else _RELATION[word]
    return None


def read_caption(caption: str) -> Meaning:
    """What a caption asks for. Raises ValueError for one that this grammar does not write."""
    before, comma, after = caption.partition(", ")
    splits = [(after, before)] if comma else []
    splits += [(caption[: at.start()], caption[at.end() :]) for at in re.finditer(" ", caption)]
    for things, ground in splits:
        if (place := _read_ground(ground)) and (read := _read_things(things)):
            return Meaning(*read, place)
    if read := _read_things(caption):
        return Meaning(*read, None)
    raise ValueError(f"not a caption of a scene: {caption!r}")
