"""Memory that the pack takes while it loads a synthetic model: `benchmarks/bench_loading.py [--gigabytes 4]`.

Each load runs in a separate process, on the CPU. "Private" memory is anonymous; the rest of a process's memory is the
model's files, memory-mapped, which the system can drop when it needs the room.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from scripts.environment import ensure_comfyui

CHOICES = ("bf16", "fp8_e4m3fn", "int8", "nvfp4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--gigabytes", type=float, default=4.0, help="size of the synthetic model (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="where to create a temporary folder (default: the system's)")
    parser.add_argument("--measure", nargs=2, metavar=("SOURCE", "WEIGHT_DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(*args.measure)
    from benchmarks import hardware
    from benchmarks.bench_convert import write_synthetic

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder) / "source"
        write_synthetic(source, int(args.gigabytes * 1e9))
        size = sum(file.stat().st_size for file in source.iterdir())
        print(f"{hardware.describe()}; files of {size / 1e9:.2f} GB of bfloat16\n")
        print("| weight_dtype | private memory at its peak | after loading | seconds |\n| --- | --- | --- | --- |")
        for choice in CHOICES:
            command = [sys.executable, "-m", "benchmarks.bench_loading", "--measure", source, choice]
            run = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            print(
                f"| {choice} | {run['peak'] / 1e9:.2f} GB | {run['after'] / 1e9:.2f} GB | {run['seconds']:.0f} |",
                flush=True,
            )


def measure(source: str, choice: str) -> None:
    """Load a model and print the increase of private bytes (peak and after) and seconds as JSON."""
    from scripts.in_process import import_pack

    import_pack(ensure_comfyui())
    loaders = importlib.import_module("pack.nodes.loaders")
    before, peak, done = private_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    loaded = loaders.load(Path(source), choice)
    seconds = time.perf_counter() - begun
    done.set()
    watcher.join()
    after = private_bytes()
    assert loaded
    print(json.dumps({"peak": max(peak, after) - before, "after": after - before, "seconds": seconds}))


def private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


if __name__ == "__main__":
    main()
