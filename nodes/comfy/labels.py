"""What the lists of models and files show on the page beside a name: size, the smallest card, what is recommended.

Values stay the plain names, so that graphs and workflow files of every machine agree; web/bitdance.js shows the labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import comfy.model_management as mm
import folder_paths
import psutil

from ...bitdance_core.cards import CARDS, Machine, recommend, size_and_card
from ...bitdance_core.checkpoints import hub
from ...bitdance_core.checkpoints.fetch import free_bytes
from ...bitdance_core.checkpoints.hub import Published
from ...bitdance_core.checkpoints.locate import ASSETS, builtin_models
from ...bitdance_core.errors import BitDanceError
from . import catalog
from .catalog import Source
from .folders import FOLDER
from .published import DOWNLOAD, is_here

RECOMMENDED = "recommended"


def model_labels(names: Iterable[str], machine: Machine | None = None) -> dict[str, str]:
    """Label the names that `catalog.model_names` lists, and those of downloads that it does not list any more.

    One is marked as recommended for a machine, by default this one.
    """
    local = {**{name: ASSETS / name for name in builtin_models()}, **catalog.local_models()}
    best = recommended_entry(names := list(names), machine or this_machine())
    published = hub.PUBLISHED_MODELS
    return {name: _label(name, local, published, name == best) for name in _and_old(names, published)}


def tokenizer_labels(names: Iterable[str]) -> dict[str, str]:
    """Label the names that `catalog.tokenizer_names` lists, and those of downloads that it does not list any more."""
    local, published = catalog.local_tokenizers(), hub.PUBLISHED_TOKENIZERS
    return {name: _label(name, local, published) for name in _and_old(names, published)}


def file_labels(paths: Mapping[str, Path]) -> dict[str, str]:
    """Label files by their sizes."""
    found = {}
    for name, path in paths.items():
        with suppress(OSError):  # gone just now
            found[name] = f"{name} · {_short(path.stat().st_size)}"
    return found


def recommended_entry(names: list[str], machine: Machine) -> str:
    """Return the entry of Load BitDance Model that suits a machine best."""
    here = [name for name, model in hub.PUBLISHED_MODELS.items() if name in names or is_here(name, model)]
    best = recommend(machine, here)
    if best is None:
        return builtin_models()[0]
    # a model of single files is listed by the file that draws
    own = [name for name in names if name == best or name.startswith(f"{best}/")]
    return own[0] if best in here and own else best + DOWNLOAD


def this_machine() -> Machine:
    """Ask for the memory of the GPU, the system's, and the free disk below models/bitdance."""
    device = mm.get_torch_device()
    card = 0 if device.type == "cpu" else mm.get_total_memory(device)
    folder = Path(folder_paths.get_folder_paths(FOLDER)[0])
    return Machine(card, psutil.virtual_memory().total, free_bytes(folder))


def _and_old(names: Iterable[str], published: Mapping[str, Published]) -> list[str]:
    return list(dict.fromkeys([*names, *(name + DOWNLOAD for name in published)]))


def _label(name: str, local: Mapping[str, Source], published: Mapping[str, Published], is_best: bool = False) -> str:
    bare, facts = name.removesuffix(DOWNLOAD), []
    if source := local.get(name) or local.get(bare):
        facts = _facts(source)
    elif bare in published and not is_here(bare, published[bare]):
        facts = [f"{published[bare].gigabytes:g} GB download", _cards(published[bare].card)]
    if name in builtin_models():
        facts[1:] = ["any machine"]
    return " · ".join([bare, *facts, *([RECOMMENDED] if is_best else [])])


def _facts(source: Source) -> list[str]:
    try:
        return list(_read(source, tuple(catalog.fingerprint(source))))
    except OSError:  # gone just now
        return []


@lru_cache(maxsize=1024)  # two short texts each; the page asks for the lists often
def _read(source: Source, stamp: tuple) -> tuple[str, ...]:
    """Read the headers of a model's files as of `stamp`, their sizes and times of change."""
    try:
        size, card = size_and_card(source)
    except (BitDanceError, KeyError):  # a part of one, or damaged, which loading it reports
        paths = source if isinstance(source, tuple) else (source,)
        return (_short(sum(path.stat().st_size for path in paths)),) if all(map(Path.is_file, paths)) else ()
    return _short(size), _cards(card)


def _cards(card: int | None) -> str:
    return f"cards from {card} GB" if card else f"more than a card of {CARDS[-1]} GB"


def _short(count: int) -> str:
    """Write a number of bytes in two or three digits: "18 GB", "1.8 GB", "5 MB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.0f} {unit}" if count >= 9.95 * size else f"{count / size:.1f} {unit}"
    return f"{max(1, round(count / 1000))} kB"
