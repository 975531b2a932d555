"""The list of Load Bits: right after every change, and without reading folders again that did not change."""

import importlib
import os
import time

import pytest

SUFFIX = ".safetensors"


@pytest.fixture
def listing(pack_module):
    module = importlib.import_module("pack.nodes.comfy.listing")
    module._scan.cache_clear()
    return module


@pytest.fixture
def root(tmp_path):
    """An output folder of three folders with 300 pictures each, one file of bits among them; changed a minute ago."""
    for name in ("", "a", "b/c"):
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(300):
            (folder / f"{number}.png").touch()
        (folder / f"x{SUFFIX}").touch()
    for hidden in (".hidden", "b/.trash"):
        (tmp_path / hidden).mkdir()
        (tmp_path / hidden / f"no{SUFFIX}").touch()
    settle(tmp_path)
    return tmp_path


@pytest.fixture
def scans(listing, root, monkeypatch):
    """The folders that are read from the disk, in order."""
    scanned, scandir = [], os.scandir

    def count(folder):
        scanned.append(os.path.basename(folder))
        return scandir(folder)

    monkeypatch.setattr(listing.os, "scandir", count)
    return scanned


def settle(root):
    """Set the folders' time of change to that of a minute ago."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (time.time() - 60,) * 2)


def test_unchanged_folders_are_read_once(listing, scans, root):
    expected = [f"a/x{SUFFIX}", f"b/c/x{SUFFIX}", f"x{SUFFIX}"]
    for _ in range(100):
        assert listing.files_below(str(root), SUFFIX) == expected
    assert sorted(scans) == sorted([root.name, "a", "b", "c"])


def test_only_a_changed_folder_is_read_again(listing, scans, root):
    listing.files_below(str(root), SUFFIX)
    scans.clear()
    (root / "a" / f"y{SUFFIX}").touch()
    os.utime(root / "a", (time.time() - 30,) * 2)
    for _ in range(2):
        assert f"a/y{SUFFIX}" in listing.files_below(str(root), SUFFIX)
    assert scans == ["a"]


def test_changes_show_at_once_even_within_one_tick_of_the_clock(listing, root):
    """A file that comes right after a scan may leave the folder's time as it was."""
    now = time.time()
    for number in range(5):
        (root / "a" / f"new{number}{SUFFIX}").touch()
        os.utime(root / "a", (now, now))
        assert f"a/new{number}{SUFFIX}" in listing.files_below(str(root), SUFFIX)
    (root / "a" / f"new0{SUFFIX}").unlink()
    os.utime(root / "a", (now, now))
    assert f"a/new0{SUFFIX}" not in listing.files_below(str(root), SUFFIX)


def test_new_and_gone_folders_show(listing, root):
    listing.files_below(str(root), SUFFIX)
    (root / "new").mkdir()
    (root / "new" / f"z{SUFFIX}").touch()
    (root / "a" / f"x{SUFFIX}").unlink()
    names = listing.files_below(str(root), SUFFIX)
    assert f"new/z{SUFFIX}" in names and f"a/x{SUFFIX}" not in names


def test_links_missing_folders_and_odd_entries(listing, root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / f"far{SUFFIX}").touch()
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / f"linked{SUFFIX}").symlink_to(elsewhere / f"far{SUFFIX}")
    (root / f"folder{SUFFIX}").mkdir()
    (root / f"._x{SUFFIX}").touch()
    names = listing.files_below(str(root), SUFFIX)
    assert names == [f"a/x{SUFFIX}", f"b/c/x{SUFFIX}", f"linked{SUFFIX}", f"x{SUFFIX}"]
    assert listing.files_below(str(root / "none"), SUFFIX) == []


def test_load_bits_asks_for_its_list_without_reading_the_disk_again(pack_module, listing, scans, root, monkeypatch):
    """Through the node's schema, which ComfyUI asks for several times in each queued graph."""
    import folder_paths

    files = importlib.import_module("pack.nodes.files")
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(root))
    for _ in range(20):
        options = files.BitDanceLoadBits.define_schema().inputs[0].options
    assert f"a/x{SUFFIX} [output]" in options
    assert scans.count("a") == scans.count("b") == scans.count(root.name) == 1
