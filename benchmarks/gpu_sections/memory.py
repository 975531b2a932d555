"""Sections about memory: peaks against the estimate, streaming against the bus, and cards that are smaller."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from statistics import median

import torch

from benchmarks.gpu_sections.pictures import memory_row
from benchmarks.gpu_sections.scaled import build_scaled, scaled_weight, set_scales
from benchmarks.gpu_sections.setting import Row, Setting, free, one_line
from benchmarks.gpu_sections.streams import fill_and_stream
from benchmarks.memory_table import drawing_of, parts_of, split
from benchmarks.random_models import build, fill_randomly, random_weight
from benchmarks.trials import Case, Run, time_run
from bitdance_core.sampling.editing import make_edit
from bitdance_core.sampling.generate import generate
from bitdance_core.sampling.plan import Request

CARDS = (24, 16, 12, 8)  # GiB, sold as GB
RESERVED = 1.5e9  # bytes that other programs and CUDA itself take, as in memory_table.py
MAKERS = {"bf16": (build, random_weight, 16.0), "fp8": (build_scaled, scaled_weight, 8.0)}


class EditCase(Case):
    """A case that keeps all patches but the last, which are then read in one pass."""

    @property
    def request(self) -> Request:
        whole, head = super().request, self.model.config.head
        shape = self.batch, head.bits, self.grid.height, self.grid.width
        side = self.grid.patch_size * self.model.config.autoencoder.downscale
        mask = torch.zeros(1, *self.size)
        mask[:, -side:, -side:] = 1
        bits = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
        step = self.model.config.autoencoder.downscale
        return replace(whole, edit=make_edit(bits, 1.0, mask, self.grid, self.batch, head.bits, step))


def peaks(setting: Setting) -> Iterator[Row]:
    """Compare the peaks of larger batches and of an edit with the estimate."""
    first = setting.case(setting.config("bitdance-14b-64x"), patches=2)
    fill_randomly(first.model, first.device, first.dtype)
    cases = {"one picture": first, "4 pictures": replace(first, batch=4)}
    cases["an edit of the last patch"] = EditCase(**vars(first) | {"patches": 1})
    for name, case in cases.items():
        try:
            run = time_drawing(case)
        except torch.OutOfMemoryError as error:
            yield {"what": name, "note": one_line(error)}
            free(setting.device)
            continue
        yield memory_row(case, [run], "eager") | {"what": f"memory beside the weights, {name}"}


def time_drawing(case: Case) -> Run:
    return time_run(case, partial(generate, case.model), torch.Generator("cpu").manual_seed(0))


def streaming(setting: Setting) -> Iterator[Row]:
    """Time a pass of the language model with every layer streamed, beside the bytes / the bus's rate."""
    for name, (make_model, make_weight, _) in MAKERS.items():
        config = setting.config("bitdance-14b-64x")
        case = setting.case(config, make_model(config).eval(), patches=3)
        size = fill_and_stream(setting, case.model, 0, make_weight)
        set_scales(case.model, setting.device)
        run = time_drawing(case)
        rate = setting.peaks.to_device
        yield {
            "what": f"{name}, all {config.backbone.num_layers} layers streamed",
            "GB a pass": size / 1e9,
            "s a pass": median(run.backbone),
            "GB/s": size / 1e9 / median(run.backbone),
            "the bus, GB/s": rate and rate / 1e9,
            "s a pass / bus": rate and median(run.backbone) * rate / size,
            "head, s a patch": median(run.head),
        }
        del case
        free(setting.device)


def capped(setting: Setting) -> Iterator[Row]:
    """Draw with no more memory than smaller cards have, the language model resident as far as memory_table.py says."""
    total = torch.cuda.get_device_properties(setting.device).total_memory if setting.is_cuda else None
    for card in CARDS if setting.is_cuda else CARDS[:1]:
        for name, (_, _, bits) in MAKERS.items():
            row: Row = {"what": f"{card} GB", "layers": name}
            room = card * 2**30 - RESERVED
            if total is not None and room > total:
                yield row | {"runs": None, "note": "this card has less"}
                continue
            try:
                if total is not None:
                    torch.cuda.set_per_process_memory_fraction(room / total, setting.device)
                yield row | draw_within(setting, name, bits, room)
            except torch.OutOfMemoryError as error:
                yield row | {"runs": False, "note": one_line(error)}
            finally:
                free(setting.device)
                if total is not None:
                    torch.cuda.set_per_process_memory_fraction(1.0, setting.device)
    yield {"what": "nvfp4", "note": "PyTorch alone has no such layers; counted in docs/memory.md"}


def draw_within(setting: Setting, name: str, bits: float, room: float) -> Row:
    """Draw the first patches of a picture in so many bytes."""
    config = setting.config("bitdance-14b-64x")
    make_model, make_weight, _ = MAKERS[name]
    found = split(config, bits, room - drawing_of(config, 1))
    if found is None:
        return {"runs": False, "note": "the head, a picture's memory and two layers are too large"}
    layers, parts = config.backbone.num_layers, parts_of(config, bits)
    resident = min(layers, int(layers * found[0] / parts[0])) if setting.is_cuda else layers // 2
    case = setting.case(config, make_model(config).eval(), patches=3)
    streamed = fill_and_stream(setting, case.model, resident, make_weight)
    set_scales(case.model, setting.device)
    run = time_drawing(case)
    count = case.grid.num_patches
    return {
        "runs": True,
        "layers that stay": f"{resident} of {layers}",
        "GB streamed a patch": streamed / 1e9,
        "s a patch": median(run.backbone) + median(run.head),
        "s a picture": run.prefill + count * median(run.head) + (count - 1) * median(run.backbone),
        "peak GB": run.memory_peak and run.memory_peak / 1e9,
        "allowed GB": room / 1e9 if setting.is_cuda else None,
    }
