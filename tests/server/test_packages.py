"""What users install: the registry's zip in a real server, and the wheel's command."""

import os
import re
import subprocess
import sys
import urllib.parse
import zipfile
from pathlib import Path

import pytest

from comfyui import PACK, Server, error_of
from graphs import images, means, text_to_image
from packing import copy_sources
from paths import ROOT


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return copy_sources(tmp_path_factory.mktemp("sources") / "bitdance")


@pytest.fixture(scope="module")
def archive(sources):
    """The zip that the registry keeps, made by its own tool: .comfyignore says what is in it."""
    env = {**os.environ, "DO_NOT_TRACK": "1", "HOME": str(sources.parent)}
    command = [Path(sys.executable).with_name("comfy"), "--skip-prompt", "node", "pack"]
    subprocess.run(command, cwd=sources, env=env, check=True, capture_output=True)
    return sources / "node.zip"


def test_the_zip_has_what_runs_and_is_as_small_as_its_description_says(archive):
    names = zipfile.ZipFile(archive).namelist()
    folders = {name.split("/")[0] for name in names}
    assert "locales/zh/main.json" in names and "locales/zh/made_from.json" not in names
    assert not folders & {"tests", "docs", "scripts", "benchmarks", "builtin", ".ci", ".github"}
    assert folders >= {"bitdance_core", "nodes", "web", "workflows", "subgraphs", "LICENSE", "pyproject.toml"}
    (said,) = re.findall(r"zip is (\d+) MB", (ROOT / "docs" / "page.md").read_text("utf-8"))
    assert round(archive.stat().st_size / 1e6) == int(said)


def test_the_unpacked_zip_is_a_whole_pack(archive, comfyui, tmp_path):
    folder = tmp_path / "base" / "custom_nodes" / PACK
    zipfile.ZipFile(archive).extractall(folder)
    with Server(Path(sys.executable), comfyui, tmp_path / "base", "--cpu") as server:
        assert not folder.is_symlink()
        schemas = {
            name: node for name, node in server.get("/object_info").items() if node["python_module"].endswith(PACK)
        }
        assert schemas.keys() == {page.stem for page in (ROOT / "web" / "docs").glob("*.md")}
        for name in schemas:
            assert server.get_bytes(f"/extensions/{PACK}/docs/{name}.md").startswith(b"# ")
        assert f"/extensions/{PACK}/bitdance.js" in server.get("/extensions")
        templates = server.get("/workflow_templates")[PACK]
        assert sorted(templates) == sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
        for name in templates:
            address = f"/api/workflow_templates/{PACK}/{urllib.parse.quote(name)}"
            assert server.get(f"{address}.json")["nodes"] and len(images([server.get_bytes(f"{address}.jpg")])) == 1
        blueprints = [entry for entry in server.get("/global_subgraphs").values() if PACK in entry["info"]["node_pack"]]
        assert {entry["name"] for entry in blueprints} == {p.stem for p in (ROOT / "subgraphs").glob("*.json")}
        languages = server.get("/i18n")
        for language in (ROOT / "locales").glob("*/"):
            assert languages[language.name]["nodeDefs"].keys() >= schemas.keys()
        bits = schemas["BitDanceLoadBits"]["input"]["required"]["bits_file"][1]["options"]
        assert "example/red_star.safetensors" in bits
        history = server.wait(server.queue(text_to_image()))
        assert error_of(history) is None and means(images(server.images(history))[0])
        assert "IMPORT FAILED" not in server.log.read_text()


def test_installing_gives_a_command_that_has_its_model(sources, tmp_path):
    python, target = sys.executable, tmp_path / "installed"
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check")
    subprocess.run([python, "-m", "pip", "install", *options, "--target", target, "."], cwd=sources, check=True)
    env = {**os.environ, "PYTHONPATH": str(target)}
    command = [target / "bin" / "bitdance", "info", "builtin"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(target) in done.stdout or "64x64" in done.stdout
    assert list((target / "bitdance_core" / "assets" / "builtin").glob("*.safetensors"))
    assert not list(target.glob("nodes*")), "only the core is a package; ComfyUI loads the nodes from their folder"
