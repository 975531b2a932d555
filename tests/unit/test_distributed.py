"""`batch --ray`: a real Ray cluster on this machine, and workers that are killed while they draw."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from batches import batch, check_files, files, manifest, start, wait_for_lines, write_lines

pytestmark = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds workers in /proc")

PROMPTS = [
    {"prompt": f"a {size} {colour} star on a {ground} background", "seed": 1}
    for size in ("small", "large")
    for colour in ("red", "white")
    for ground in ("blue", "black")
]


@pytest.fixture(autouse=True)
def one_thread():
    """As each worker has: files agree to the byte for one count of threads, since another one orders sums otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start_on_ray(prompts, out, mark):
    """A run with two workers of one thread each; `mark` stands in the environment of all its processes."""
    environment = {"OMP_NUM_THREADS": "1", "BITDANCE_TEST": str(mark)}
    return start(prompts, "--out", out, "--ray", "local", "--workers", 2, **environment)


def drawing(mark):
    """Of the processes of this run that are drawing: their ids, and the titles that say what."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            title = (folder / "cmdline").read_bytes().rstrip(b"\0 ").decode()
            if title.startswith("ray::draw ") and str(mark).encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = title.removeprefix("ray::draw ")
        except (OSError, UnicodeDecodeError):
            pass  # gone meanwhile, or another user's
    return found


def kill_who_draws(mark, run, wanted=lambda job: True, but=()):
    """SIGKILL a worker that is drawing what is wanted; its process id."""
    while True:
        assert run.poll() is None, run.communicate()[1]
        for pid, job in drawing(mark).items():
            if wanted(job) and pid not in but:
                os.kill(pid, signal.SIGKILL)
                return pid
        time.sleep(0.005)


def test_a_killed_worker_loses_nothing(tmp_path):
    """Two workers; one dies in the middle: every prompt once, every file as one process alone draws it."""
    prompts, out = write_lines(tmp_path / "p.jsonl", *PROMPTS), tmp_path / "out"
    run = start_on_ray(prompts, out, tmp_path)
    wait_for_lines(out, 2, run)
    kill_who_draws(tmp_path, run)
    stdout, stderr = run.communicate(timeout=120)
    assert run.returncode == 0, stderr
    assert stdout.splitlines()[-1] == f"{out / 'manifest.jsonl'} (8 prompts, 0 of them drawn earlier)"
    assert "8/8" in stderr and "Traceback" not in stderr  # Ray itself says on stdout that a worker died
    assert sorted(manifest(out)) == [f"{k:05}" for k in range(8)]
    check_files(out)
    assert batch(prompts, tmp_path / "alone", "--device", "cpu") == 0
    assert files(out) == files(tmp_path / "alone")
    ours, theirs = manifest(out), manifest(tmp_path / "alone")
    assert all({**ours[name], "seconds": 0} == {**theirs[name], "seconds": 0} for name in theirs)


@pytest.mark.long
def test_a_prompt_that_kills_its_workers_is_given_up(tmp_path):
    """After three of them; the others are drawn. The next run, without Ray, draws it."""
    rows = [{"prompt": "a red star", "id": "bad"}, {"prompt": "a blue star", "id": "good"}]
    prompts, out = write_lines(tmp_path / "p.jsonl", *rows), tmp_path / "out"
    run, killed = start_on_ray(prompts, out, tmp_path), []
    for _ in range(3):
        killed.append(kill_who_draws(tmp_path, run, lambda job: job == "bad", killed))
    stderr = run.communicate(timeout=120)[1]
    assert run.returncode == 1 and list(manifest(out)) == ["good"]
    assert "bitdance: 1 of 2 prompts could not be drawn (bad: 3 workers died drawing it" in stderr.splitlines()[-1]
    check_files(out)
    assert batch(prompts, out, "--device", "cpu") == 0
    assert list(manifest(out)) == ["good", "bad"]
    check_files(out)


def test_a_cluster_that_is_not_there(tmp_path, capsys):
    prompts = write_lines(tmp_path / "p.jsonl", {"prompt": "a red star"})
    assert batch(prompts, tmp_path / "out", "--ray", "127.0.0.1:1") == 1
    assert "no Ray cluster at '127.0.0.1:1'" in capsys.readouterr().err
