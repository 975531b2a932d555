"""Write the GPU report: the machine, the targets, and a table for each section, as JSON and as markdown."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import hardware
from benchmarks.gpu_sections.setting import Row, Setting
from bitdance_core.checkpoints.files import write_whole

ROOT = Path(__file__).resolve().parents[2]
Report = dict[str, Any]
# seconds of a 1024x1024 picture of 14B-64x in bfloat16, by a part of the card's name
SECONDS = {"H200": 3.1, "H100": 3.8}
BF16, FP8 = "14b-64x bf16", "14b-64x fp8"  # ids of rows


def describe(setting: Setting) -> dict[str, Any]:
    """Describe the machine, the software and the code that is measured."""
    device = setting.device
    card = torch.cuda.get_device_properties(device) if setting.is_cuda else None
    return {
        "card": card.name if card else f"none ({device})",
        "card's memory, GB": round(card.total_memory / 1e9, 1) if card else None,
        "compute capability": f"{card.major}.{card.minor}" if card else None,
        "driver": said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if card else None,
        "CUDA": torch.version.cuda or torch.version.hip,
        "cuDNN": torch.backends.cudnn.version() if card else None,
        "PyTorch": torch.__version__,
        "processor": hardware.describe().partition(", torch")[0],
        "commit": commit(),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "models": "tiny: figures mean nothing" if setting.tiny else "random weights of the published sizes",
    }


def commit() -> str | None:
    """Return the commit of the code, and whether it was changed since; None outside a repository."""
    found = said_by("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    changed = found and said_by("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{found} with changes" if changed else found


def said_by(*command: str) -> str | None:
    """Return the first line that a command prints; None where it does not work."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.splitlines() or [None])[0] if done.returncode == 0 else None


def targets(report: Report) -> list[dict[str, Any]]:
    """Compare the rows with what was aimed at: `reached` is None where a figure is missing."""
    is_tiny = report["options"]["tiny"]  # then the rows are those of another model
    rows = [row for section in report["sections"] for row in section["rows"] if row.get("id") and not is_tiny]
    measured = [row for row in rows if row["what"].endswith("measured")]  # and not from medians of the first patches
    seconds = least(measured or rows, BF16, "s")
    baseline, roofline = (least(rows, BF16, column) for column in ("baseline s", "roofline s"))
    # by the same path: graphs with graphs
    fp8 = min((row for row in rows if row["id"] == FP8), key=lambda row: row["s"], default={"s": None, "path": None})
    alike = least([row for row in rows if row.get("path") == fp8["path"]], BF16, "s")
    card = next((name for name in SECONDS if name in report["machine"]["card"]), None)
    limit = SECONDS.get(card)
    wanted = [
        ("bf16 within 1.3x of the roofline", ratio(seconds, roofline), at_most(1.3)),
        ("bf16 at least 2.5x the eager baseline", ratio(baseline, seconds), at_least(2.5)),
        ("fp8 at least 1.6x faster than bf16", ratio(alike, fp8["s"]), at_least(1.6)),
    ]
    if limit is not None:
        wanted.append((f"bf16 in about {limit} s ({card})", seconds, at_most(limit)))
    return [
        {"target": f"14B-64x, 1024x1024: {name}", "found": found, "reached": reach(found)}
        for name, found, reach in wanted
    ]


def least(rows: Iterable[Row], id: str, column: str) -> float | None:
    """Return the least value in a column of the rows of one id; None where there is none."""
    return min((row[column] for row in rows if row["id"] == id and row.get(column) is not None), default=None)


def at_most(limit: float) -> Callable[[float | None], bool | None]:
    return lambda found: None if found is None else found <= limit


def at_least(limit: float) -> Callable[[float | None], bool | None]:
    return lambda found: None if found is None else found >= limit


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def write(report: Report, folder: Path) -> None:
    """Write report.json and report.md whole, so that a run that is ended leaves the last ones."""
    report = report | {"targets": targets(report)}
    write_whole(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    write_whole(folder / "report.md", markdown(report).encode())


def markdown(report: Report) -> str:
    """Return the report as markdown."""
    machine = "; ".join(f"{name} {value}" for name, value in report["machine"].items() if value is not None)
    words = {True: "reached", False: "missed", None: "not measured"}
    parts = [
        f"# GPU report\n\n{machine}.\n\n`{report['command']}`, {report['seconds']:.0f} s so far.\n\n## Targets\n",
        table([row | {"reached": words[row["reached"]]} for row in report["targets"]]),
        "\n## Sections\n",
        table([{name: section[name] for name in ("section", "status", "s")} for section in report["sections"]]),
    ]
    for section in report["sections"]:
        if section["rows"]:
            parts += [f"\n## {section['section']}: {section['about']}\n", table(section["rows"])]
    return "\n".join(parts) + "\n"


def table(rows: Iterable[Row]) -> str:
    """Return rows as a table, whose columns come in the order in which rows name them."""
    rows = [{name: value for name, value in row.items() if name != "id"} for row in rows]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([cell(row.get(name)) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    """Show a value: three digits of a fraction, yes or no, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
