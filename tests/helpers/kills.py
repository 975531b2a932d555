"""Kill a run of our command line by SIGKILL before each call that changes a file, and run it again after each.

As a program: `kills.py FOLDER MOMENTS COMMAND …`. FOLDER/start is what lies there before; "{}" in the command is the
place to work in. Makes FOLDER/whole (an undisturbed run), and FOLDER/N/killed and FOLDER/N/again for each moment N.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from paths import ROOT

# what CPython reports before it happens; `open` counts if it may write
CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.chmod", "os.truncate", "fcntl.flock"}
NEVER = 0
WRITES = {"write", "flush", "fsync"}


def kill_everywhere(folder: Path, command: Sequence[str], moments: int, **environment: str) -> list[Path]:
    """Kill at `moments` moments spread over the run; return the folders N, each with `killed`, `again`.

    `folder / "start"` must exist. Fails if a second run does not end well.
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, Path(__file__).parent))), **environment}
    script = [sys.executable, __file__, str(folder), str(moments), *map(str, command)]
    # its standard input stays open: a download ends with it
    with subprocess.Popen(script, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        *_, last = process.stdout.read().splitlines()
    assert process.returncode == 0
    count, killed = json.loads(last)
    print(f"killed at {len(killed)} of {count} moments")
    return [folder / str(moment) for moment in killed]


def _run(command: Sequence[str], place: Path, kill_at: int | None) -> tuple[int, int]:
    """Run a command in a fork of this process; return its status and, if `kill_at` is None, how many moments passed."""
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        _, status = os.waitpid(child, 0)
        with open(reading, "rb") as pipe:
            return os.waitstatus_to_exitcode(status), int(pipe.read() or 0)
    os.close(reading)
    os.chdir(place)
    count = _count_moments(kill_at) if kill_at != NEVER else lambda: 0
    status = 70
    try:
        status = _main(command)([part.replace("{}", str(place)) for part in command[1:]])
        os.write(writing, str(count()).encode())
    finally:
        os._exit(status)


def _main(command: Sequence[str]) -> Callable[[list[str]], int]:
    import torch._dynamo  # noqa: F401  PyTorch does, late, when it first makes a module on the meta device

    from bitdance_core import cli
    from bitdance_core.checkpoints import fetch as module

    def fetch(arguments: list[str]) -> int:
        sys.argv = ["fetch", *arguments]
        return module.main()

    return fetch if command[0] == "fetch" else lambda arguments: cli.main([command[0], *arguments])


def _count_moments(kill_at: int | None) -> Callable[[], int]:
    passed = 0

    def moment() -> None:
        nonlocal passed
        passed += 1
        if passed == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple) -> None:
        if event in CHANGES and (event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
            moment()

    def profile(frame, event: str, function) -> None:
        if event == "c_call" and function.__name__ in WRITES:
            of = getattr(function, "__self__", None)
            if of not in (sys.stdout, sys.stderr):
                moment()

    sys.addaudithook(audit)
    sys.setprofile(profile)
    return lambda: passed


def main() -> None:
    folder, wanted, command = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    _main(command)  # imported once, for all forks
    shutil.copytree(folder / "start", folder / "whole")
    status, count = _run(command, folder / "whole", None)
    assert status == 0 and count > 0, (status, count)
    moments = sorted({1 + k * (count - 1) // max(1, wanted - 1) for k in range(wanted)})
    for moment in moments:
        place = folder / str(moment) / "at"
        shutil.copytree(folder / "start", place)
        status, _ = _run(command, place, moment)
        assert status == -signal.SIGKILL, (moment, status)
        shutil.copytree(place, place.with_name("killed"))
        status, _ = _run(command, place, NEVER)
        assert status == 0, (moment, status)
        place.rename(place.with_name("again"))
    print()
    print(json.dumps([count, moments]))


if __name__ == "__main__":
    main()
