"""Graphs in a real ComfyUI server: what users queue, what they get, and what they are told."""

import io
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bitdance_core import BitDancePipeline
from bitdance_core.bits.grid import load_bits
from bitdance_core.checkpoints.checkpoint import read_checkpoint
from bitdance_core.model.text_model import BitDance
from builtin import pictures
from comfyui import Server
from graphs import PROMPT, Graph, draw, images, load, means, sample, show, text_to_image
from listening import listen
from paths import DATA


def test_the_picture_means_the_prompt(run):
    for prompt in (PROMPT, "a small green circle on a white background"):
        (image,) = run(text_to_image(prompt))
        assert image.size == (64, 64) and means(image, prompt)


def test_the_bits_are_those_of_the_core(run, base):
    """Exactly: the same kernels, shapes and count of threads in another process."""
    graph = Graph()
    loader = load(graph)
    bits = draw(graph, loader, width=128, height=64, seed=7, batch_size=2)
    graph.add("BitDanceSaveBits", bits=bits[0], filename_prefix="same/core")
    run(graph)
    grid = load_bits(base / "output" / "same" / "core_00001_.safetensors")
    expected = BitDancePipeline.from_pretrained("builtin", device="cpu").generate(
        PROMPT, height=64, width=128, seed=7, num_images=2
    )
    assert (grid.tokenizer, grid.step, grid.prompt) == ("d8c32", 8, PROMPT)
    assert grid.bits().equal(expected.bits)


def test_empty_bits_of_no_size_are_the_models_own(run):
    (image,) = run(text_to_image(width=0, height=0))
    assert image.size == (64, 64) and means(image)


def test_a_batch_is_different_pictures_of_one_prompt(run):
    drawn = run(text_to_image(batch_size=3, seed=5))
    assert len(drawn) == 3 and all(map(means, drawn))
    assert drawn[0].tobytes() != drawn[1].tobytes()


def test_the_same_seed_is_the_same_picture_in_another_server(run, comfyui, base, tmp_path):
    first, other = run(text_to_image(seed=3))[0], run(text_to_image(seed=4))[0]
    with Server(Path(sys.executable), comfyui, tmp_path, "--cpu", "--cache-none") as server:
        again = images(server.images(server.wait(server.queue(text_to_image(seed=3)))))[0]
    assert first.tobytes() == again.tobytes() != other.tobytes()


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_every_sampler(run, sampler):
    assert means(run(text_to_image(sampler_name=sampler))[0])


def test_negative_prompts_steer(run):
    def negative(text):
        graph = Graph()
        loader = load(graph)
        positive = graph.add("BitDancePrompt", clip=loader[1], text=PROMPT)
        links = {}
        if text is not None:
            links["negative"] = graph.add("BitDancePrompt", clip=loader[1], text=text)[0]
        canvas = graph.add("BitDanceEmptyBits", width=64, height=64, batch_size=1)
        show(graph, loader, sample(graph, loader[0], positive[0], canvas[0], **links))
        return run(graph)[0].tobytes()

    assert negative(None) == negative("") == negative("  ") != negative("a small green circle on a white background")


def test_two_models_in_one_graph(run):
    graph = Graph()
    for model, sizes in (("builtin", (64, 64)), ("t2i_p16", (64, 64)), ("t2i_p64", (128, 128))):
        loader = load(graph, model)
        show(graph, loader, draw(graph, loader, width=sizes[0], height=sizes[1], steps=2))
    pictures_drawn = run(graph)
    assert [image.size for image in pictures_drawn] == [(64, 64), (64, 64), (128, 128)]


def test_prompts_queued_at_once_all_come_right(server):
    prompts = [picture.prompt for picture in pictures.ALL_PICTURES[::97]]
    queued = [server.queue(text_to_image(prompt, seed=1)) for prompt in prompts]
    drawn = [images(server.images(server.wait(prompt_id)))[0] for prompt_id in queued]
    assert sum(map(means, drawn, prompts)) >= len(prompts) - 1 and len(prompts) >= 4


def test_progress_counts_evaluations_and_previews_grow(server):
    """64x64 pixels are four patches, and the built-in model evaluates its networks 26 + 1 times for each."""
    events = list(listen(server, text_to_image(seed=11), preview_method="latent2rgb"))
    progress = [data for kind, data in events if kind == "progress"]
    values = [data["value"] for data in progress]
    assert values == sorted(values) and {data["max"] for data in progress} == {4 * 27} and values[-1] == 4 * 27
    frames = [Image.open(io.BytesIO(message[8:])).convert("RGB") for kind, message in events if kind == "preview"]
    assert 1 <= len(frames) <= 4  # at most three a second, and the last
    # the ground of a red star is blue: drawn corners are, the others come later
    corners = [(0, 0), (-1, 0), (0, -1), (-1, -1)]  # x, y in raster order
    counts = []
    for frame in frames:
        pixels = np.asarray(frame, dtype=float)
        blue = [pixels[y, x, 2] - pixels[y, x, 0] > 60 for x, y in corners]
        counts.append(sum(blue))
        assert blue == [index < counts[-1] for index in range(4)], blue
    assert counts == sorted(set(counts)) and counts[-1] == 4


def test_words_that_the_built_in_model_never_saw_are_said_on_the_node(server):
    """On our node and on the stock one, and no longer once they are gone."""
    for stock in (False, True):
        for prompt, said in (("a Dragon on a blue background", True), (PROMPT, False)):
            graph = text_to_image(prompt, steps=1, seed=13)
            if stock:
                graph["2"]["class_type"] = "CLIPTextEncode"
            notes = [data for kind, data in listen(server, graph) if kind == "bitdance.note" and data["node"] == "2"]
            assert len(notes) == 1 and ('not trained on "Dragon"; it draws' in notes[0]["text"]) == said
            assert said or notes[0]["text"] == ""
    assert 'not trained on "Dragon"' in server.log.read_text()


def test_no_previews_where_the_user_wants_none(server):
    events = listen(server, text_to_image(seed=12), preview_method="none")
    assert not [kind for kind, _ in events if kind == "preview"]


def test_interrupt_ends_a_run_inside_a_patch(server, run):
    """Four patches of 1000 steps each: stopped in the first, and the next prompt draws as if nothing had been."""
    events = []
    for kind, data in listen(server, text_to_image(seed=13, steps=1000)):
        events.append(kind)
        if kind == "progress" and 0 < data["value"] < 1000:
            server.post("/interrupt", {})
    assert events[-1] == "execution_interrupted"
    assert data["node_id"] == "4"
    assert means(run(text_to_image(seed=14))[0])


def test_bits_files_there_and_back(run, server, base):
    graph = Graph()
    loader = load(graph)
    bits = draw(graph, loader, seed=9)
    saved = graph.add("BitDanceSaveBits", bits=bits[0], filename_prefix="bits/kept")
    show(graph, loader, saved)
    (drawn,) = run(graph)
    grid = load_bits(base / "output" / "bits" / "kept_00001_.safetensors")
    assert grid.packed.nbytes == 256 and grid.prompt == PROMPT
    graph = Graph()
    loader = load(graph)
    show(graph, loader, graph.add("BitDanceLoadBits", bits_file="bits/kept_00001_.safetensors [output]"))
    show(graph, loader, graph.add("BitDanceLoadBits", bits_file="example/red_star.safetensors"))
    again, example = run(graph)
    assert again.tobytes() == drawn.tobytes() and means(example)
    listed = server.get("/object_info/BitDanceLoadBits")["BitDanceLoadBits"]["input"]["required"]["bits_file"]
    assert "bits/kept_00001_.safetensors [output]" in listed[1]["options"]


def test_load_binary_tokenizer_alone(run):
    graph = Graph()
    vae = graph.add("BitDanceLoadTokenizer", tokenizer_name="builtin")
    bits = graph.add("BitDanceLoadBits", bits_file="example/red_star.safetensors")
    image = graph.add("BitDanceTokenizerDecode", vae=vae[0], bits=bits[0])
    graph.add("PreviewImage", images=image[0])
    assert means(run(graph)[0])


def test_free_gives_the_memory_back(server, run, base):
    """Hundreds of megabytes of weights come and, with ComfyUI's "unload models" button, go."""
    size = make_large_model(base / "models" / "bitdance" / "large")
    run(text_to_image())  # what any run takes is there now
    before = memory_of(server.process.pid)
    run(text_to_image(model="large", steps=1))
    during = memory_of(server.process.pid)
    server.post("/free", {"unload_models": True, "free_memory": True})
    deadline = time.monotonic() + 30
    while memory_of(server.process.pid) > before + 0.3 * size and time.monotonic() < deadline:
        time.sleep(0.2)
    after = memory_of(server.process.pid)
    print(f"MB before, during, after: {before >> 20}, {during >> 20}, {after >> 20}; weights: {size >> 20}")
    assert 0.7 * size < during - before < 1.3 * size and after - before < 0.3 * size
    assert means(run(text_to_image())[0])


def memory_of(pid: int) -> int:
    """Bytes of a process's own memory, without what it maps from files."""
    memory = psutil.Process(pid).memory_info()
    return memory.rss - memory.shared


def make_large_model(folder: Path) -> int:
    """The golden model with a wide language model of random weights; the bytes of its weights in float32."""
    shutil.copytree(DATA / "t2i_p16", folder)
    edit = json.loads((folder / "config.json").read_text())
    edit |= {"num_hidden_layers": 8, "intermediate_size": 131072}
    (folder / "config.json").write_text(json.dumps(edit))
    checkpoint = BitDance(read_checkpoint(folder).config)
    state = {f"model.{name}": torch.zeros_like(tensor) for name, tensor in checkpoint.backbone.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    return sum(tensor.nbytes for tensor in state.values())
