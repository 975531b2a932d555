"""The pack as ComfyUI and its page see it: schemas, help pages, templates, downloads, the registry's checks."""

import inspect
import json
import keyword
import re
import socket
import sys
import tomllib
from pathlib import Path

import pytest

import locales
from comfyui import PACK, Server, comfy_cli, error_of
from graphs import images, text_to_image
from hub_server import serve
from listening import listen
from paths import ROOT

IDS = {
    "BitDanceLoadModel": (["model_name", "weight_dtype"], ["MODEL", "CLIP", "VAE"]),
    "BitDanceLoadFiles": (["diffusion_model", "text_encoder", "tokenizer", "weight_dtype"], ["MODEL", "CLIP", "VAE"]),
    "BitDancePrompt": (["clip", "text"], ["CONDITIONING"]),
    "BitDanceClassCondition": (["model", "class"], ["CONDITIONING", "CONDITIONING"]),
    "BitDanceEmptyBits": (["width", "height", "batch_size"], ["BITDANCE_BITS"]),
    "BitDanceNextPatchSampler": (
        ["model", "positive", "bits", "seed", "steps", "cfg", "sampler_name", "denoise"],
        ["BITDANCE_BITS"],
    ),
    "BitDanceSamplingOptions": (
        ["last_steps", "last_cfg", "guide_from", "guide_to", "noise_scale", "time_shift"],
        ["BITDANCE_OPTIONS"],
    ),
    "BitDanceFitSize": (
        ["model", "image", "mode", "aspect_ratio", "position", "scale"],
        ["IMAGE", "MASK", "INT", "INT"],
    ),
    "BitDancePadBits": (["model", "bits", "left", "top", "right", "bottom"], ["BITDANCE_BITS", "MASK"]),
    "BitDanceVaryBits": (["bits", "share", "seed"], ["BITDANCE_BITS"]),
    "BitDanceBlendBits": (["below", "above", "mask"], ["BITDANCE_BITS"]),
    "BitDanceInspectBits": (["bits"], ["IMAGE", "IMAGE", "STRING"]),
    "BitDanceTrainLora": (
        ["model", "pictures", "positive", "steps", "rank", "lr", "batch_size", "seed", "keep"],
        ["LORA_MODEL", "LOSS_MAP", "INT"],
    ),
    "BitDanceCompareImages": (["image", "reconstruction"], ["FLOAT", "FLOAT", "FLOAT", "STRING"]),
    "BitDanceTokenizerEncode": (["vae", "image"], ["BITDANCE_BITS"]),
    "BitDanceTokenizerDecode": (["vae", "bits"], ["IMAGE"]),
    "BitDanceBitsToLatent": (["bits"], ["LATENT"]),
    "BitDanceLatentToBits": (["latent"], ["BITDANCE_BITS"]),
    "BitDanceLoadTokenizer": (["tokenizer_name"], ["VAE"]),
    "BitDanceLoadLora": (["model", "lora_name", "strength"], ["MODEL"]),
    "BitDanceSaveBits": (["bits", "filename_prefix"], ["BITDANCE_BITS"]),
    "BitDanceLoadBits": (["bits_file"], ["BITDANCE_BITS"]),
}


ON = {"download": True}


@pytest.fixture(scope="module")
def schemas(server):
    return {name: node for name, node in server.get("/object_info").items() if node["python_module"].endswith(PACK)}


def test_the_nodes_are_the_designs(schemas):
    assert set(schemas) == set(IDS)
    for name, (inputs, outputs) in IDS.items():
        assert (schemas[name]["input_order"]["required"], schemas[name]["output"]) == (inputs, outputs)
    assert schemas["BitDanceNextPatchSampler"]["input_order"]["optional"] == [
        "negative", "mask", "options", "allow_untrained_size",
    ]  # fmt: skip
    for loader in ("BitDanceLoadModel", "BitDanceLoadTokenizer"):
        assert schemas[loader]["input_order"]["optional"] == ["download", "source"]
    assert schemas["BitDanceNextPatchSampler"]["input"]["required"]["seed"][1]["control_after_generate"] is True
    assert schemas["BitDanceLoadModel"]["input"]["required"]["model_name"][1]["options"][:2] == ["scenes", "builtin"]


@pytest.mark.parametrize("name", IDS)
def test_every_node_explains_itself(server, schemas, name):
    node = schemas[name]
    assert node["category"] == "BitDance" and node["display_name"] != name
    assert len(node["description"]) > 20 and node["search_aliases"]
    inputs = node["input"]["required"] | node["input"].get("optional", {})
    assert all(len(options["tooltip"]) > 10 for _, options in inputs.values())
    assert all(len(tooltip) > 10 for tooltip in node["output_tooltips"])
    page = server.get_bytes(f"/extensions/{PACK}/docs/{name}.md").decode()
    assert page.startswith(f"# {node['display_name']}\n")


@pytest.mark.parametrize("language", ["en", *locales.LANGUAGES])
def test_the_page_gets_every_language(server, language):
    served = locales.flatten(server.get("/i18n")[language])
    pages = {key: text for key, text in locales.read(language).items() if key.endswith(".md")}
    texts = {key: text for key, text in locales.read(language).items() if key not in pages}
    assert len(texts) > 200 and served.items() >= texts.items()
    for page in (ROOT / "web" / "docs").glob("*.md") if language in locales.WITH_PAGES else ():
        address = f"/extensions/{PACK}/docs/{page.stem}/{language}.md"  # where the page looks first
        assert server.get_bytes(address).decode() == pages[page.relative_to(ROOT).as_posix()]


@pytest.mark.parametrize("name", IDS)
def test_schemas_and_execute_agree(pack_module, name):
    node = next(node for node in pack_module.NODES if node.__name__ == name)
    declared = {declared_input.id: declared_input.optional for declared_input in node.define_schema().inputs}
    parameters = dict(inspect.signature(node.execute).parameters)
    if parameters.pop("inputs", None):  # **inputs takes what Python does not let a parameter be called
        declared = {name: optional for name, optional in declared.items() if not keyword.iskeyword(name)}
    assert {p: parameters[p].default is not inspect.Parameter.empty for p in parameters} == declared


def test_the_log_of_a_start_names_no_failure(server):
    log = server.log.read_text()
    assert "IMPORT FAILED" not in log and "Cannot import" not in log


def test_the_registry_accepts_the_pack():
    done = comfy_cli(Path(sys.executable), "--no-json", "node", "validate", capture_output=True, text=True)
    assert done.returncode == 0 and "All validation checks passed" in done.stdout, done.stdout + done.stderr
    assert "warning" not in done.stdout.lower()


def test_models_in_other_folders_are_found(comfyui, tmp_path):
    """`bitdance` is a model folder like ComfyUI's own: extra_model_paths.yaml extends it."""
    elsewhere = tmp_path / "elsewhere" / "deep"
    elsewhere.mkdir(parents=True)
    (elsewhere / "mine").symlink_to(ROOT / "tests" / "data" / "t2i_p16", target_is_directory=True)
    (tmp_path / "paths.yaml").write_text(f"other:\n  bitdance: {tmp_path / 'elsewhere'}\n")
    options = ("--cpu", "--extra-model-paths-config", str(tmp_path / "paths.yaml"))
    with Server(Path(sys.executable), comfyui, tmp_path / "base", *options) as server:
        listed = server.get("/object_info/BitDanceLoadModel")["BitDanceLoadModel"]["input"]["required"]["model_name"]
        assert listed[1]["options"][:3] == ["scenes", "builtin", "deep/mine"]
        history = server.wait(server.queue(text_to_image(model="deep/mine", steps=1)))
        assert error_of(history) is None and len(images(server.images(history))) == 1


def test_a_published_model_comes_only_when_it_is_picked(comfyui, tmp_path):
    """A stand-in hub serves a small model under a published name: listing asks nothing, picking it fetches it once."""
    name = "BitDance-14B-64x"
    with serve(f"shallowdream204/{name}", ROOT / "tests" / "data" / "t2i_p64") as (address, sent):
        env = {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
        with Server(Path(sys.executable), comfyui, tmp_path / "base", "--cpu", env=env) as server:

            def listed():
                answer = server.get("/object_info/BitDanceLoadModel")
                return answer["BitDanceLoadModel"]["input"]["required"]["model_name"][1]["options"]

            assert f"{name} (download)" in listed() and not sent
            graph = text_to_image(model=f"{name} (download)", width=128, height=128, steps=1)
            said = error_of(server.wait(server.queue(graph)))  # asked for first
            folder = tmp_path / "base" / "models" / "bitdance" / name
            for part in ("35.0 GB", address, str(folder), "GB free", "switch download on"):
                assert part in said
            assert "\n" not in said and not sent and not folder.exists()
            graph = text_to_image(model=f"{name} (download)", width=128, height=128, steps=1, loading=ON)
            history = server.wait(server.queue(graph))
            assert error_of(history) is None and len(server.images(history)) == 1
            assert "vision_head.safetensors" in sent and "expected.safetensors" not in sent
            assert json.loads((folder / "ae_config.json").read_text())
            assert name in listed() and f"{name} (download)" not in listed()
            # a workflow that still says "(download)" takes what is there
            fetched = len(sent)
            graph["4"]["inputs"]["seed"] = 1
            assert error_of(server.wait(server.queue(graph))) is None and len(sent) == fetched


def test_a_download_is_interrupted_at_once_and_goes_on_later(comfyui, tmp_path):
    name = "BitDance-14B-16x"
    folder = tmp_path / "base" / "models" / "bitdance" / name
    with serve(f"shallowdream204/{name}", ROOT / "tests" / "data" / "t2i_p16", slow="ae.safetensors") as (
        address,
        sent,
    ):
        env = {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
        with Server(Path(sys.executable), comfyui, tmp_path / "base", "--cpu", env=env) as server:
            graph = text_to_image(model=f"{name} (download)", steps=1, loading=ON)
            notes = []
            for event, data in listen(server, graph):
                if event == "bitdance.note" and data["text"]:
                    assert data["node"] == "1"  # the loader
                    notes.append(data["text"])
                    if "ae.safetensors" in sent and "\nfrom " in data["text"]:  # which takes minutes
                        server.post("/interrupt", {})
            assert event == "execution_interrupted" and not (folder / "ae.safetensors").exists()
            # the last of a running download: a stop may come while a finished file is checked
            running = [note for note in notes if "from " in note][-1].splitlines()
            assert running[1:] == [f"from {address}", f"to {folder}"]
            assert re.match(r"[\d.]+ (bytes|[kM]B) of [\d.]+ MB", running[0])
            assert re.search(rf"stopped: .* kept in {folder}; press Run again to go on", notes[-1])
            assert notes[-1] in server.log.read_text()
            whole = set(sent) - {"ae.safetensors"}
    with serve(f"shallowdream204/{name}", ROOT / "tests" / "data" / "t2i_p16") as (address, sent):
        env["HF_ENDPOINT"] = address
        with Server(Path(sys.executable), comfyui, tmp_path / "base", "--cpu", env=env) as server:
            history = server.wait(server.queue(graph))
            assert error_of(history) is None and len(server.images(history)) == 1
            assert not whole & set(sent) and any(file.startswith("ae.safetensors") for file in sent)


def test_an_unreachable_hub_is_said_in_a_sentence(comfyui, tmp_path):
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    with Server(Path(sys.executable), comfyui, tmp_path / "base", "--cpu", env=env) as server:
        history = server.wait(server.queue(text_to_image(model="BitDance-14B-64x (download)", loading=ON)))
        said = error_of(history)
        assert "http://127.0.0.1:9 cannot be reached" in said and "proxy: " in said and "\n" not in said


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_looking_up_a_hub_that_does_not_answer_stops_at_once(comfyui, tmp_path, source):
    """It accepts connections and never answers; the library would wait for it and try again."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        env = {"HF_ENDPOINT": address, "MODELSCOPE_DOMAIN": address, "HF_HOME": str(tmp_path / "hf")}
        with Server(Path(sys.executable), comfyui, tmp_path / "base", "--cpu", env=env) as server:
            prompt_id = server.queue(
                text_to_image(model="BitDance-14B-64x (download)", loading={**ON, "source": source})
            )
            silent.settimeout(120)
            silent.accept()  # the question has come
            server.post("/interrupt", {})
            assert error_of(server.wait(prompt_id, timeout=15)) == "interrupted"


def test_requirements_are_among_the_projects():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert set(wanted) <= set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
