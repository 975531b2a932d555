"""Downloads from a stand-in hub: existing files are verified, broken ones begun anew, one writer at a time."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from bitdance_core.checkpoints.hub import changed_files
from bitdance_core.checkpoints.locks import locked
from hub_server import serve
from paths import ROOT

REPOSITORY, DATA = "owner/model", bytes(range(256)) * 2000
IMPORT = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from bitdance_core.checkpoints.hub import main"


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "x.bin").write_bytes(DATA)
    return folder


def start(address, folder):
    env = os.environ | {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder.parent / "home")}
    command = [sys.executable, "-c", f"{IMPORT}; sys.exit(main())", REPOSITORY, str(folder), "x.bin"]
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def fetch(address, folder):
    """Run the download as the node does; return its message, "" for success."""
    return "\n".join(line for line in lines_of(address, folder) if not line.startswith("checking "))


def lines_of(address, folder):
    with start(address, folder) as process:  # communicate() would close standard input, and end the process
        return process.stdout.read().splitlines()


def cache(folder):
    (folder / ".cache" / "bitdance").mkdir(parents=True, exist_ok=True)
    return folder / ".cache" / "bitdance"


def test_a_file_of_the_right_size_and_wrong_content_is_replaced(source, tmp_path):
    folder = tmp_path / "to"
    folder.mkdir()
    (folder / "x.bin").write_bytes(bytes(len(DATA)))
    with serve(REPOSITORY, source) as (address, sent):
        assert fetch(address, folder) == "" and sent == ["x.bin"]
        assert (folder / "x.bin").read_bytes() == DATA
        known = json.loads((cache(folder) / "verified.json").read_text())["x.bin"]
        assert known[0] == len(DATA) and known[2] == hashlib.sha256(DATA).hexdigest()
        assert fetch(address, folder) == "" and sent == ["x.bin"]
    assert [path.name for path in cache(folder).iterdir()] == ["verified.json"]


@pytest.mark.parametrize(
    ("part", "sent_then"),
    [(DATA + b"more", ["x.bin"]), (DATA, []), (DATA[:1000], ["x.bin from 1000"])],
    ids=["longer", "complete", "begun"],
)
def test_a_part_of_an_earlier_run_is_used_or_begun_anew(source, tmp_path, part, sent_then):
    folder = tmp_path / "to"
    (cache(folder) / f"{hashlib.sha256(DATA).hexdigest()}.incomplete").write_bytes(part)
    with serve(REPOSITORY, source) as (address, sent):
        assert fetch(address, folder) == "" and sent == sent_then
    assert (folder / "x.bin").read_bytes() == DATA


def test_a_damaged_part_is_named_and_removed(source, tmp_path):
    folder = tmp_path / "to"
    part = cache(folder) / f"{hashlib.sha256(DATA).hexdigest()}.incomplete"
    part.write_bytes(bytes(1000))
    with serve(REPOSITORY, source) as (address, _):
        assert "arrived damaged and was removed" in fetch(address, folder)
        assert not part.exists() and not (folder / "x.bin").exists()
        assert fetch(address, folder) == "" and (folder / "x.bin").read_bytes() == DATA


def test_a_mirror_without_checksums_is_checked_by_size(source, tmp_path):
    with serve(REPOSITORY, source, etag=False) as (address, _):
        message = fetch(address, tmp_path / "to")
    assert message == "" and (tmp_path / "to" / "x.bin").read_bytes() == DATA


def test_a_second_writer_is_refused(source, tmp_path):
    folder = tmp_path / "to"
    with serve(REPOSITORY, source) as (address, sent), locked(cache(folder) / "x.bin"):
        assert "is being written by another program" in fetch(address, folder) and not sent


def test_a_download_ends_with_its_parent(source, tmp_path):
    with serve(REPOSITORY, source, slow="x.bin") as (address, sent):
        process = start(address, tmp_path / "to")
        try:
            until = time.monotonic() + 60
            while not sent and time.monotonic() < until:
                time.sleep(0.1)
            assert sent and process.poll() is None
            process.stdin.close()  # the system does this when the parent is killed
            assert process.wait(10) == 1
        finally:
            process.kill()
            process.stdout.close()


def test_reading_a_file_for_its_checksum_shows_progress(source, tmp_path):
    """Of a file that is there already, and of one that arrived; 16 MiB at a time, and not again once it is known."""
    size = 40 * 2**20
    (source / "x.bin").write_bytes(bytes(size))
    shutil.copytree(source, tmp_path / "to")
    with serve(REPOSITORY, source) as (address, sent):
        expected = [f"checking {done} {size} x.bin" for done in (16 * 2**20, 32 * 2**20, size)]
        assert lines_of(address, tmp_path / "to") == expected and not sent
        assert lines_of(address, tmp_path / "to") == []
        assert lines_of(address, tmp_path / "new") == expected and sent == ["x.bin"]


def test_files_that_changed_since_they_were_verified_are_known_without_reading_them(source, tmp_path):
    folder = tmp_path / "to"
    assert changed_files(folder) == []
    with serve(REPOSITORY, source) as (address, _):
        assert fetch(address, folder) == "" and changed_files(folder) == []
        (folder / "x.bin").write_bytes(DATA[::-1])
        assert changed_files(folder) == ["x.bin"]
        assert fetch(address, folder) == "" and changed_files(folder) == []
    (folder / "x.bin").unlink()
    assert changed_files(folder) == ["x.bin"]
    for damage in (b"{", b"[]", b'{"x.bin": 5}', b'{"y.bin": []}'):
        (cache(folder) / "verified.json").write_bytes(damage)
        assert changed_files(folder) == (["y.bin"] if b"y" in damage else [])
