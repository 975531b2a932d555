"""The golden models: small random weights in the official layout, and what the official pipelines make of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bitdance_core import BitDancePipeline
from paths import DATA

MODELS = ("t2i_p16", "t2i_p64")


@dataclass(frozen=True)
class Golden:
    name: str
    pipe: BitDancePipeline
    values: dict[str, Tensor]
    cases: list[dict[str, Any]]


@cache
def load(name: str, dtype: torch.dtype = torch.float32) -> Golden:
    folder = DATA / name
    return Golden(
        name,
        BitDancePipeline.from_pretrained(folder, device="cpu", dtype=dtype),
        load_file(folder / "expected.safetensors"),
        json.loads((folder / "expected.json").read_text())["cases"],
    )


def all_cases() -> list[tuple[str, int]]:
    found = []
    for name in MODELS:
        cases = json.loads((DATA / name / "expected.json").read_text())["cases"]
        found += [(name, number) for number in range(len(cases))]
    return found
