"""Run `batch`, here or in a process of its own, and look at what it wrote."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

from bitdance_core.cli import main
from paths import ROOT


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def batch(prompts, out, *arguments):
    return main(["batch", str(prompts), "--out", str(out), *map(str, arguments)])


def manifest(out):
    """Records by id; there must be one line for each."""
    records = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert len({record["id"] for record in records}) == len(records)
    return {record["id"]: record for record in records}


def files(out):
    """Every file below a folder but the manifest and the lock, with its bytes."""
    paths = [path for path in out.rglob("*") if path.is_file()]
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in paths
        if path.name not in ("manifest.jsonl", ".lock")
    }


def check_files(out):
    """What lies there is what the manifest says, all of it and no more."""
    noted = {file["name"]: file for record in manifest(out).values() for file in record["files"]}
    found = files(out)
    assert noted.keys() == found.keys()
    for name, data in found.items():
        assert (noted[name]["size"], noted[name]["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def start(*arguments, **environment):
    """`python -m bitdance_core batch` in a process of its own."""
    command = [sys.executable, "-m", "bitdance_core", "batch", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    pipe = subprocess.PIPE
    # a shell starts what runs in its background deaf to Ctrl-C, and so would be what the tests start
    hear = (lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) if os.name == "posix" else None
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, preexec_fn=hear)


def wait_for_lines(out, count, process):
    """Until the manifest has so many lines."""
    path = out / "manifest.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
