"""Run every check: `python3 scripts/test.py [--long] [--browser] [pytest arguments]`.

--long adds the checks that take minutes (the built-in model on 100 prompts at every size). Browser tests run if
Chromium is installed; --browser fails if it is not. Without further arguments two halves run at the same time, the unit
tests in as many processes as the machine has cores; the output of the second half follows that of the first.
"""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from environment import ROOT, ensure_all, find_chromium, run

# those that share a server; those that share ComfyUI's modules; and those of which any process may run any file
SERVER, COMFY, UNIT = ("tests/browser", "tests/server"), ("tests/comfy",), ("tests/unit",)


def main() -> int:
    arguments = sys.argv[1:]
    left_out = [] if "--long" in arguments else ["long"]
    if find_chromium() is None:
        if "--browser" in arguments:
            sys.exit("--browser needs Chromium, which was not found; on Debian and Ubuntu: apt install chromium")
        print("skipping the browser tests: Chromium is not installed", flush=True)
        left_out.append("browser")
    selection = ["-m", " and ".join(f"not {mark}" for mark in left_out)] if left_out else []
    arguments = [a for a in arguments if a not in ("--long", "--browser")]
    python, _ = ensure_all("test", "demo")
    ruff, pytest = python.with_name("ruff"), python.with_name("pytest")
    status = run(ruff, "check", ".") or run(ruff, "format", "--check", ".")
    if status:
        return status
    return run(pytest, *selection, *arguments) if arguments else run_halves(pytest, selection)


def run_halves(pytest: Path, selection: list[str]) -> int:
    """Run both halves at the same time and return an exit status that is not 0 if one failed."""
    cores = os.cpu_count() or 2
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // 2)))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the cores to the other half
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said, ThreadPoolExecutor(1) as second:

        def run_second() -> int:
            commands = [*selection, *COMFY], [*selection, "-n", str(cores), "--dist", "loadfile", *UNIT]
            runs = [subprocess.run([pytest, *c], cwd=ROOT, stdout=said, stderr=subprocess.STDOUT) for c in commands]
            return next((run.returncode for run in runs if run.returncode), 0)

        later = second.submit(run_second)
        status = run(pytest, *selection, *SERVER)
        second.shutdown()
        said.seek(0)
        print(said.read(), flush=True)
    return status or later.result()


if __name__ == "__main__":
    sys.exit(main())
