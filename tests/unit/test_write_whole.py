"""Files are written completely or not at all, whatever interrupts the writing."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from bitdance_core import BitDanceError
from bitdance_core.bits.grid import BitGrid, load_bits, save_bits
from bitdance_core.checkpoints.files import write_whole
from paths import ROOT

OLD, NEW = b"old " * 1000, b"new " * 5000


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(OLD)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("data", [NEW, lambda file: file.write(NEW)])
def test_a_file_is_replaced(path, data):
    write_whole(path, data)
    assert path.read_bytes() == NEW and names(path.parent) == ["a.bin"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("no")])
def test_a_writer_that_fails_leaves_the_old_file(path, error):
    def write(file):
        file.write(NEW[:100])
        raise error

    expected = BitDanceError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as raised:
        write_whole(path, write)
    assert expected is not BitDanceError or "a.bin cannot be written (No space left" in str(raised.value)
    assert path.read_bytes() == OLD and names(path.parent) == ["a.bin"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
@pytest.mark.parametrize("size", [10, 10**7])
def test_a_full_disk_leaves_the_old_file(path, size, monkeypatch):
    """The disk is really full: the partial file is /dev/full, at the first write or not before the flush."""
    opened = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, mode: opened(Path("/dev/full"), "wb"))
        with pytest.raises(BitDanceError, match="a.bin cannot be written .No space left on device"):
            write_whole(path, bytes(size))
    assert path.read_bytes() == OLD


def test_a_killed_process_leaves_the_old_file(path):
    script = """
import os, signal, sys
from pathlib import Path
from bitdance_core.checkpoints.files import write_whole
def write(file):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
write_whole(Path(sys.argv[1]), write)
"""
    done = subprocess.run([sys.executable, "-c", script, path], cwd=ROOT)
    assert done.returncode == -9 and path.read_bytes() == OLD
    write_whole(path, NEW)  # what is left over is in nobody's way
    assert path.read_bytes() == NEW


def test_two_writers_do_not_spoil_each_others_file(path):
    barrier = threading.Barrier(2)

    def write(content):
        def both(file):
            file.write(content[:500])
            file.flush()
            barrier.wait()
            file.write(content[500:])

        write_whole(path, both)

    threads = [threading.Thread(target=write, args=(content,)) for content in (NEW, OLD * 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in (NEW, OLD * 2) and names(path.parent) == ["a.bin"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_permissions_are_those_of_any_new_file_or_of_the_old_one(path):
    path.with_name("plain").write_bytes(b"")
    write_whole(path.with_name("new"), NEW)
    assert path.with_name("new").stat().st_mode == path.with_name("plain").stat().st_mode
    path.chmod(0o640)
    write_whole(path, NEW)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_link_keeps_pointing_to_its_file(path):
    link = path.with_name("link.bin")
    link.symlink_to("a.bin")
    write_whole(link, NEW)
    assert link.is_symlink() and path.read_bytes() == NEW


def test_names_may_be_as_long_as_names_can_be(tmp_path):
    path = tmp_path / ("x" * 255)
    write_whole(path, NEW)
    assert path.read_bytes() == NEW


@pytest.mark.parametrize("place", ["folder", "none/a.bin", "y" * 256])
def test_what_cannot_be_written_is_named(tmp_path, place):
    (tmp_path / "folder").mkdir()
    with pytest.raises(BitDanceError, match=f"{place} cannot be written"):
        write_whole(tmp_path / place, NEW)
    assert names(tmp_path) == ["folder"]


def test_a_device_is_not_replaced(tmp_path):
    with pytest.raises(BitDanceError, match="/dev/null cannot be written .it is a folder or a device"):
        write_whole(Path("/dev/null"), NEW)
    assert Path("/dev/null").is_char_device()


def test_bits_that_cannot_be_saved_leave_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    old = torch.rand(1, 8, 4, 4) > 0.5
    save_bits(BitGrid.from_bits(old, 16), path)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BitDanceError, match="x.safetensors cannot be written .No space"):
        save_bits(BitGrid.from_bits(~old, 16), path)
    assert load_bits(path).bits().equal(old) and names(tmp_path) == ["x.safetensors"]
