"""What lists of models say beside the names, and what the loader says while it downloads."""

import importlib
import shutil
from pathlib import Path

import pytest

from bitdance_core.cards import Machine
from bitdance_core.checkpoints.hub import PUBLISHED_MODELS
from paths import DATA

GIB = 2**30
NO_CARD = Machine(0, 64 * GIB, 500 * GIB)
LARGE = Machine(80 * GIB, 128 * GIB, 500 * GIB)
MEDIUM = Machine(12 * GIB, 32 * GIB, 500 * GIB)


@pytest.fixture(scope="module")
def modules(pack_module):
    return {name: importlib.import_module(f"pack.nodes.comfy.{name}") for name in ("labels", "catalog", "downloads")}


@pytest.fixture
def models(pack_module, tmp_path, monkeypatch):
    """An empty `bitdance` folder, the only one."""
    import folder_paths

    _, extensions = folder_paths.folder_names_and_paths["bitdance"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "bitdance", ([str(tmp_path)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def marked(modules, machine):
    labels = modules["labels"].model_labels(modules["catalog"].model_names(), machine)
    assert labels.keys() >= {*modules["catalog"].model_names()}
    return [(name, label) for name, label in labels.items() if label.endswith(" · recommended")]


def test_entries_say_size_card_and_what_suits_the_machine(modules, models):
    names = modules["catalog"].model_names()
    labels = modules["labels"].model_labels(names, NO_CARD)
    fp8 = "BitDance-14B-64x-fp8"
    assert labels[f"{fp8} (download)"] == f"{fp8} · 18 GB download · cards from 12 GB"
    assert labels["scenes"] == "scenes · 30 MB · any machine · recommended"
    assert labels["builtin"] == "builtin · 11 MB · any machine"
    assert marked(modules, MEDIUM) == [
        (f"{fp8} (download)", f"{fp8} · 18 GB download · cards from 12 GB · recommended")
    ]
    ((best, _),) = marked(modules, LARGE)
    assert best == "BitDance-14B-64x (download)"


def test_a_model_on_the_disk_is_the_one_that_is_marked(modules, models):
    (models / "BitDance-14B-64x").symlink_to(DATA / "t2i_p64", target_is_directory=True)
    full = Machine(80 * GIB, 128 * GIB, GIB)
    assert marked(modules, full) == [("BitDance-14B-64x", "BitDance-14B-64x · 5.2 MB · cards from 8 GB · recommended")]
    labels = modules["labels"].model_labels(modules["catalog"].model_names(), full)
    assert (
        labels["BitDance-14B-64x (download)"] == "BitDance-14B-64x · 5.2 MB · cards from 8 GB"
    )  # of an older workflow


def test_a_second_layout_is_offered_where_a_part_of_it_is(modules, models):
    twin = "BitDance-14B-64x-diffusers (download)"
    names = modules["catalog"].model_names()
    assert (
        not [name for name in names if "diffusers" in name] and "35 GB" in modules["labels"].model_labels(names)[twin]
    )
    assert modules["catalog"].check_name(twin, names, PUBLISHED_MODELS, "BitDance model") is True
    (models / "BitDance-14B-64x-diffusers").mkdir()
    assert twin in modules["catalog"].model_names()


def test_headers_are_read_again_only_after_a_change(modules, models):
    labels, catalog = modules["labels"], modules["catalog"]
    shutil.copytree(DATA / "t2i_p16", models / "mine")
    assert labels.model_labels(["mine"])["mine"].startswith("mine · 5.2 MB")
    read = labels._read.cache_info().misses
    assert labels.model_labels(["mine"])["mine"].startswith("mine · 5.2 MB")
    assert labels._read.cache_info().misses == read
    (models / "mine" / "model.safetensors").write_bytes(b"damaged")
    assert catalog.model_names().count("mine") == 1 and labels.model_labels(["mine"])["mine"] == "mine"
    assert labels._read.cache_info().misses == read + 1


def test_files_show_their_sizes(modules, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(bytes(2_500_000))
    files = {"a.safetensors": tmp_path / "a.safetensors", "gone.safetensors": tmp_path / "gone.safetensors"}
    assert modules["labels"].file_labels(files) == {"a.safetensors": "a.safetensors · 2.5 MB"}


def test_progress_says_bytes_speed_time_left_and_folder(modules):
    progress = modules["downloads"].Progress("it", Path("/models/it"), "modelscope")
    assert progress.add("a sentence about an error", 0.0) is None
    text, done, total = progress.add("arrived 1000000000 18000000000", 0.0)
    assert (done, total) == (10**9, 18 * 10**9) and text.splitlines()[0] == "1.0 GB of 18.0 GB"
    for second in range(1, 60):
        text, *_ = progress.add(f"arrived {10**9 + second * 10**7} 18000000000", float(second))
    first, *others = text.splitlines()
    assert first == "1.6 GB of 18.0 GB · 10.0 MB/s · 27 min left"
    assert others == ["from www.modelscope.cn", f"to {Path('/models/it')}"]
    assert progress.add("checking 5 10 a b.safetensors", 60.0) == (
        "checking a b.safetensors: 5 bytes of 10 bytes",
        5,
        10,
    )
    assert "1.6 GB of 18.0 GB are kept" in progress.kept() and "press Run again" in progress.kept()


def test_a_download_is_asked_for_and_its_hub_is_known(modules, models):
    name = "BitDance-14B-64x-fp8 (download)"
    with pytest.raises(ValueError, match="switch download on .* 18.0 GB .*huggingface.co .*GB free"):
        modules["catalog"].model_source(name)
    with pytest.raises(ValueError, match="switch download on .* 1.8 GB .*www.modelscope.cn "):
        modules["catalog"].tokenizer_path("ae_d16c32 (download)", False, "modelscope")
    with pytest.raises(ValueError, match="source is 'elsewhere'; choose one of: huggingface, modelscope"):
        modules["catalog"].model_source(name, True, "elsewhere")
    assert [*models.iterdir()] == []
