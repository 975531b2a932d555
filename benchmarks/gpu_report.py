"""Run every check and figure that awaits a GPU, most important first, in at most 9 minutes; downloads nothing.

python benchmarks/gpu_report.py                         # on the GPU; the report goes to gpu_report/report.md and .json
python benchmarks/gpu_report.py --quick                 # under 2 minutes
python benchmarks/gpu_report.py --device cpu --tiny     # a trial of the report itself, with tiny models

The report is written after every section. One that fails or takes too long is named there, and the next one runs. The
last section draws through ComfyUI where there is one: in .comfyui, or at COMFYUI_DIR.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
try:
    from benchmarks.gpu_sections import kernels, memory, pack, pictures
    from benchmarks.gpu_sections.setting import Options
    from benchmarks.gpu_sections.worker import DONE, Function, Worker
    from benchmarks.gpu_sections.written import Report, write
    from bitdance_core.errors import BitDanceError
except ModuleNotFoundError as error:
    sys.exit(f"the package {error.name} is missing; install PyTorch for your GPU, then run: pip install .")

LIMIT, QUICK_LIMIT = 520.0, 105.0  # seconds in all, but for importing PyTorch once


@dataclass(frozen=True)
class Section:
    """A part of the report, and the seconds after which it is cut off; 0 in `quick`: --quick leaves it out."""

    name: str
    function: Function
    seconds: float
    quick: float
    about: str


SECTIONS = (
    Section("rates", kernels.rates, 30, 15, "what the card does, by our own measurement"),
    Section("bits", pictures.bits, 60, 25, "the built-in model: the CPU's bits, and CUDA graphs against none"),
    Section("14b-64x", pictures.draws_64x, 120, 45, "a 1024x1024 picture in bfloat16, random weights"),
    Section("fp8", pictures.draws_fp8, 60, 30, "the same picture with float8 layers, by PyTorch's products"),
    Section("attention", kernels.attention_plans, 60, 20, "the first call of each key length, with cuDNN and without"),
    Section("products", kernels.products, 40, 15, "the matrix products of a picture, by type"),
    Section("head", kernels.evaluations, 40, 0, "an evaluation of the head, with Triton's kernels and its products"),
    Section("memory", memory.peaks, 60, 20, "peaks of drawing against the estimate"),
    Section("streaming", memory.streaming, 60, 25, "the language model over the bus, layer by layer"),
    Section("capped", memory.capped, 120, 0, "what runs where PyTorch may take no more than a smaller card has"),
    Section("14b-16x", pictures.draws_16x, 90, 0, "a 1024x1024 picture in bfloat16, random weights"),
    Section("imagenet", pictures.draws_classes, 60, 0, "64 pictures of B-4x at once, random weights"),
    Section("ranges", kernels.ranges, 60, 10, "the largest inputs of each down_proj; fp8 without scales ends at 448"),
    Section("compile", pictures.compiled, 100, 0, "the head of 14B-64x by torch.compile"),
    Section("comfyui", pack.draws, 150, 0, "draws through the pack in ComfyUI"),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(section.name for section in SECTIONS)
    parser.add_argument("--quick", action="store_true", help="the most important sections, in under 2 minutes")
    parser.add_argument("--out", type=Path, default=Path("gpu_report"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--sections", metavar="A,B", help=f"only these, of {names}")
    parser.add_argument("--device", help="default: the GPU")
    parser.add_argument("--tiny", action="store_true", help="tiny models: tries the report, measures nothing")
    parser.add_argument(
        "--model",
        default="builtin",
        metavar="FOLDER",
        help="published weights for the section ranges (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    chosen = SECTIONS if args.sections is None else [s for s in SECTIONS if s.name in args.sections.split(",")]
    unknown = set((args.sections or "rates").split(",")) - {section.name for section in SECTIONS}
    if unknown:
        parser.error(f"--sections: unknown section '{min(unknown)}', have: {names}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {args.out} cannot be made ({error.strerror})")
    options = Options(args.device, args.tiny, args.quick, args.model)
    command = " ".join(["python", "benchmarks/gpu_report.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        report = run(chosen, options, args.out, QUICK_LIMIT if args.quick else LIMIT, command, args.sections is None)
    except BitDanceError as error:
        parser.error(str(error))
    print((args.out / "report.md").read_text(encoding="utf-8"))
    return int(any(section["status"].startswith(("failed", "cut off")) for section in report["sections"]))


def run(
    sections: Sequence[Section], options: Options, out: Path, limit: float, command: str = "", leaves_out: bool = True
) -> Report:
    """Run sections one after the other for `limit` seconds in all; write the report after each, and return it.

    With `leaves_out` a quick report leaves out what takes long. Raises BitDanceError for a device that is not there.
    """
    begin = time.monotonic()
    worker: Worker | None = Worker(options)
    report: Report = {"machine": worker.machine, "options": asdict(options), "command": command, "seconds": 0.0}
    report["sections"] = [
        {"section": section.name, "about": section.about, "status": "not run: time", "s": None, "rows": []}
        for section in sections
    ]
    try:
        for section, written in zip(sections, report["sections"]):
            start = time.monotonic()
            seconds = min(section.quick if options.quick and leaves_out else section.seconds, begin + limit - start)
            if options.quick and leaves_out and not section.quick:
                written["status"] = "not run: --quick leaves it out"
            elif seconds > 0:
                print(f"{section.name} …", file=sys.stderr, flush=True)
                worker = run_section(section, written, worker, options, seconds)
                written["s"] = time.monotonic() - start
            report["seconds"] = time.monotonic() - begin
            write(report, out)
    finally:
        if worker is not None:
            worker.stop()
    return report


def run_section(
    section: Section, written: Report, worker: Worker | None, options: Options, seconds: float
) -> Worker | None:
    """Write down what a section yields and how it ends; return the worker if it is still of use."""
    end = time.monotonic() + seconds
    try:
        worker = worker or Worker(options, seconds)
    except BitDanceError as error:  # the device may be gone since the last section
        written["status"] = f"failed: {error}"
        return None
    written["status"], written["rows"] = worker.run(section.function, end - time.monotonic())
    if written["status"].startswith((DONE, "not possible")):
        return worker
    worker.stop()
    return None


if __name__ == "__main__":
    sys.exit(main())
