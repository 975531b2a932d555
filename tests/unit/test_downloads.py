"""Downloads from stand-ins of both hubs: existing files are verified, broken ones begun anew, one writer at a time."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from bitdance_core.checkpoints.fetch import changed_files
from bitdance_core.checkpoints.locks import locked
from bitdance_core.checkpoints.sources import PROXIES
from hub_server import serve
from paths import ROOT

REPOSITORY, DATA = "owner/model", bytes(range(256)) * 2000
IMPORT = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from bitdance_core.checkpoints.fetch import main"


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "x.bin").write_bytes(DATA)
    return folder


def start(address, folder, source="huggingface", repository=REPOSITORY, **more):
    env = os.environ | {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder.parent / "home"), **more}
    env["HF_ENDPOINT" if source == "huggingface" else "MODELSCOPE_DOMAIN"] = address
    command = [sys.executable, "-c", f"{IMPORT}; sys.exit(main())", source, repository, str(folder), "x.bin"]
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def fetch(address, folder, *arguments, **more):
    """Run the download as the node does; return its message, "" for success."""
    lines = lines_of(address, folder, *arguments, **more)
    return "\n".join(line for line in lines if not line.startswith(("checking ", "arrived ")))


def lines_of(address, folder, *arguments, **more):
    with start(address, folder, *arguments, **more) as process:
        # communicate() would close standard input, and end the process
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
    with serve(REPOSITORY, source, checksums=False) as (address, _):
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

        def checking(folder):
            return [line for line in lines_of(address, folder) if line.startswith("checking ")]

        assert checking(tmp_path / "to") == expected and not sent
        assert checking(tmp_path / "to") == []
        assert checking(tmp_path / "new") == expected and sent == ["x.bin"]


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


def test_a_download_waits_for_no_pytorch():
    """It is a process of its own; the public names import PyTorch when they are first used."""
    code = f"{IMPORT}; import bitdance_core; assert 'torch' not in sys.modules; "
    code += "assert set(bitdance_core.__all__) <= set(dir(bitdance_core)); from bitdance_core import *; "
    code += "assert BitDancePipeline.__name__ in vars(bitdance_core) and 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_second_hub_has_the_same_files(source, tmp_path):
    """ModelScope's list and addresses: checked by the SHA-256 of its list, resumed, replaced if it is damaged."""
    folder = tmp_path / "to"
    part = cache(folder) / f"{hashlib.sha256(DATA).hexdigest()}.incomplete"
    with serve(REPOSITORY, source) as (address, sent):
        part.write_bytes(DATA[:1000])
        assert fetch(address, folder, "modelscope") == "" and sent == ["x.bin from 1000"]
        assert (folder / "x.bin").read_bytes() == DATA and changed_files(folder) == []
        (folder / "x.bin").write_bytes(bytes(len(DATA)))
        part.write_bytes(bytes(1000))
        assert "its SHA-256 is not the hub's" in fetch(address, folder, "modelscope")
        assert fetch(address, folder, "modelscope") == "" and (folder / "x.bin").read_bytes() == DATA
        said = fetch(address, folder, "modelscope", "owner/other")
        assert f"{address} has no such public repository" in said and "source huggingface" in said


def test_a_hubs_checksums_are_those_of_its_list(source, tmp_path):
    """A file that a hub sends is not what its list says: the list decides."""
    with serve(REPOSITORY, source, damaged="x.bin") as (address, _):
        for hub in ("huggingface", "modelscope"):
            assert "its SHA-256 is not the hub's" in fetch(address, tmp_path / hub, hub)
            assert not (tmp_path / hub / "x.bin").exists()


def test_a_hub_out_of_reach_is_named_with_what_leads_to_it(tmp_path):
    proxy = {"HTTPS_PROXY": "http://me:secret@127.0.0.1:9", "NO_PROXY": "", "no_proxy": ""}
    said = fetch("http://127.0.0.1:9", tmp_path, HTTP_PROXY="", http_proxy="", **proxy)
    for part in ("http://127.0.0.1:9 cannot be reached", "HTTPS_PROXY=http://***@127.0.0.1:9", "HF_ENDPOINT: http"):
        assert part in said
    assert "secret" not in said and "\n" not in said
    said = fetch("127.0.0.1:9", tmp_path, "modelscope", **dict.fromkeys(PROXIES, ""))
    for part in ("https://127.0.0.1:9 cannot be reached", "proxy: none set", "MODELSCOPE_DOMAIN: 127.0.0.1:9"):
        assert part in said


def test_bytes_that_arrive_are_counted(source, tmp_path):
    folder, part = tmp_path / "to", DATA[:1000]
    (cache(folder) / f"{hashlib.sha256(DATA).hexdigest()}.incomplete").write_bytes(part)
    with serve(REPOSITORY, source) as (address, _):
        first = next(line for line in lines_of(address, folder) if line.startswith("arrived "))
    assert int(first.split()[1]) >= len(part) and first.split()[2] == str(len(DATA))
