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
import websocket
from PIL import Image
from safetensors.torch import save_file

import pictures
from bitdance_core import BitDancePipeline
from bitdance_core.bit_grid import load_bits
from bitdance_core.checkpoint import read_checkpoint
from bitdance_core.model import BitDance
from comfyui import Server
from graphs import PROMPT, Graph, draw, images, load, sample, show, text_to_image


def means(image, prompt=PROMPT) -> bool:
    return pictures.read(image) == pictures.parse(prompt)


def listen(server, graph, **extra_data):
    """Queue a graph and yield what the server tells a page that follows it, until it ends."""
    ws = websocket.create_connection(f"ws://127.0.0.1:{server.port}/ws?clientId=listener", timeout=60)
    prompt_id = server.queue(graph, client_id="listener", extra_data=extra_data)
    try:
        while True:
            message = ws.recv()
            if isinstance(message, bytes):
                yield "preview", message
                continue
            event = json.loads(message)
            yield event["type"], event["data"]
            ended = event["type"] in ("execution_success", "execution_error", "execution_interrupted")
            if ended and event["data"]["prompt_id"] == prompt_id:
                return
    finally:
        ws.close()


def test_the_picture_means_the_prompt(run):
    for prompt in (PROMPT, "a small green circle on a white background"):
        (image,) = run(text_to_image(prompt))
        assert image.size == (64, 64) and means(image, prompt)


def test_the_bits_are_those_of_the_core(run, base):
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
        positive = graph.add("BitDanceTextEncode", clip=loader[1], text=PROMPT)
        links = {}
        if text is not None:
            links["negative"] = graph.add("BitDanceTextEncode", clip=loader[1], text=text)[0]
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
    assert len(frames) == 4
    # the ground of a red star is blue: drawn corners are, the others come later
    corners = [(0, 0), (-1, 0), (0, -1), (-1, -1)]  # x, y in raster order
    for drawn, frame in enumerate(frames, start=1):
        pixels = np.asarray(frame, dtype=float)
        blue = [pixels[y, x, 2] - pixels[y, x, 0] > 60 for x, y in corners]
        assert blue == [index < drawn for index in range(4)], (drawn, blue)


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


def stock_start(prompt=PROMPT, **changes):
    """The stock nodes' way to a LATENT: CLIP Text Encode, Empty Latent Image."""
    graph = Graph()
    loader = load(graph)
    positive = graph.add("CLIPTextEncode", clip=loader[1], text=prompt)
    empty = graph.add("EmptyLatentImage", width=64, height=64, batch_size=changes.pop("batch_size", 1))
    canvas = graph.add("BitDanceLatentToBits", latent=empty[0])
    bits = sample(graph, loader[0], positive[0], canvas[0], **changes)
    return graph, loader, graph.add("BitDanceBitsToLatent", bits=bits[0])


def finish(graph, loader, latent, decoder="VAEDecode", **inputs):
    image = graph.add(decoder, samples=latent[0], vae=loader[2], **inputs)
    graph.add("PreviewImage", images=image[0])
    return graph


def test_stock_text_encode_empty_latent_and_decode(run):
    assert run(finish(*stock_start()))[0].tobytes() == run(text_to_image())[0].tobytes()


def test_latent_flip(run):
    graph, loader, latent = stock_start()
    finish(graph, loader, latent)
    flipped = graph.add("LatentFlip", samples=latent[0], flip_method="y-axis: horizontally")
    upright, mirrored = run(finish(graph, loader, flipped))
    assert means(mirrored)
    back = mirrored.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert np.abs(np.asarray(upright, float) - np.asarray(back, float)).mean() < 12


def test_latent_composite_puts_one_picture_into_another(run):
    graph, loader, below = stock_start()
    ground = graph.add("BitDanceTextEncode", clip=loader[1], text="a large white square on a black background")
    canvas = graph.add("BitDanceEmptyBits", width=64, height=64, batch_size=1)
    above = graph.add("BitDanceBitsToLatent", bits=sample(graph, loader[0], ground[0], canvas[0])[0])
    # its pixel fields count 8 to a latent cell, which is just this tokenizer's token
    both = graph.add("LatentComposite", samples_to=below[0], samples_from=above[0], x=32, y=0, feather=0)
    (image,) = run(finish(graph, loader, both))
    pixels = np.asarray(image, float)
    assert pixels[60, 4, 2] > 150 and pixels[60, 4, 0] < 100, "the ground of the one"
    assert pixels[32, 52].min() > 150, "the white of the other"


def test_vae_encode_and_decode_keep_the_picture(run):
    graph = Graph()
    loader = load(graph)
    drawn = graph.add("BitDanceTokenizerDecode", vae=loader[2], bits=draw(graph, loader)[0])
    latent = graph.add("VAEEncode", pixels=drawn[0], vae=loader[2])
    bits = graph.add("BitDanceTokenizerEncode", image=drawn[0], vae=loader[2])
    finish(graph, loader, latent)
    show(graph, loader, bits)
    stock, own = run(graph)
    assert means(stock) and stock.tobytes() == own.tobytes()


def test_tiled_encode_and_decode(run):
    graph = Graph()
    loader = load(graph)
    drawn = graph.add("BitDanceTokenizerDecode", vae=loader[2], bits=draw(graph, loader, width=128)[0])
    tiles = {"tile_size": 64, "overlap": 16, "temporal_size": 64, "temporal_overlap": 8}
    latent = graph.add("VAEEncodeTiled", pixels=drawn[0], vae=loader[2], **tiles)
    finish(graph, loader, latent, "VAEDecodeTiled", **tiles)
    (image,) = run(graph)
    assert image.size == (128, 64) and means(image)


def test_save_latent_and_load_latent(run, base):
    graph, loader, latent = stock_start(batch_size=2, seed=2)
    graph.add("SaveLatent", samples=latent[0], filename_prefix="kept")
    finish(graph, loader, latent)
    drawn = run(graph)
    (base / "input").mkdir(exist_ok=True)
    shutil.copy(base / "output" / "kept_00001_.latent", base / "input" / "kept.latent")
    graph = Graph()
    loader = load(graph)
    loaded = graph.add("LoadLatent", latent="kept.latent")
    finish(graph, loader, loaded)
    show(graph, loader, graph.add("BitDanceLatentToBits", latent=loaded[0]))
    assert [image.tobytes() for image in run(graph)] == 2 * [image.tobytes() for image in drawn]


def test_blended_latents_are_bits_again(run):
    """Half of one picture and half of the other is not +-1: signs decide, and the sampler takes it for a canvas."""
    graph, loader, latent = stock_start()
    flipped = graph.add("LatentFlip", samples=latent[0], flip_method="x-axis: vertically")
    blend = graph.add("LatentBlend", samples1=latent[0], samples2=flipped[0], blend_factor=0.7)
    finish(graph, loader, blend)
    finish(graph, loader, latent)
    blended, original = run(graph)
    assert blended.tobytes() == original.tobytes()


def test_conditioning_zero_out_is_unconditional(run):
    def negative(zero):
        graph = Graph()
        loader = load(graph)
        positive = graph.add("CLIPTextEncode", clip=loader[1], text=PROMPT)
        negative = graph.add("ConditioningZeroOut", conditioning=positive[0]) if zero else None
        canvas = graph.add("BitDanceEmptyBits", width=64, height=64, batch_size=1)
        links = {"negative": negative[0]} if negative else {}
        show(graph, loader, sample(graph, loader[0], positive[0], canvas[0], **links))
        return run(graph)[0].tobytes()

    assert negative(zero=True) == negative(zero=False)


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


def refused(changes):
    """A text-to-image graph with changes: {node number: {input: value}}."""
    graph = text_to_image()
    for node, inputs in changes.items():
        graph[node]["inputs"].update(inputs)
    return graph


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"3": {"width": 96, "height": 96}}, "96x96 (height x width) is not a size that builtin was trained on"),
        ({"3": {"width": 64, "height": 0}}, "width and height must both be set"),
        ({"4": {"denoise": 0.5}}, "denoise below 1 and masks need bits to start from"),
        ({"3": {"width": 100, "height": 100}, "4": {"allow_untrained_size": True}}, "multiples of 32 pixels"),
        ({"1": {"model_name": "t2i_p64"}, "3": {"width": 72, "height": 72}}, "must be multiples of"),
    ],
)
def test_what_cannot_be_is_named(run, changes, message):
    with pytest.raises(RuntimeError) as error:
        run(refused(changes))
    assert message in str(error.value) and "\n" not in str(error.value)


def graph_with(build):
    graph = Graph()
    loader = load(graph)
    build(graph, loader)
    return graph


def ksampler(graph, loader):
    positive = graph.add("CLIPTextEncode", clip=loader[1], text=PROMPT)
    empty = graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)
    latent = graph.add(
        "KSampler", model=loader[0], positive=positive[0], negative=positive[0], latent_image=empty[0], seed=0, steps=4,
        cfg=2.0, sampler_name="euler", scheduler="simple", denoise=1.0,
    )  # fmt: skip
    finish(graph, loader, latent)


def other_models_prompt(graph, loader):
    other = load(graph, "t2i_p16")
    positive = graph.add("CLIPTextEncode", clip=other[1], text=PROMPT)
    canvas = graph.add("BitDanceEmptyBits", width=64, height=64, batch_size=1)
    show(graph, loader, sample(graph, loader[0], positive[0], canvas[0]))


def other_families_bits(graph, loader):
    other = load(graph, "t2i_p16")
    show(graph, loader, draw(graph, other, steps=1))


def canvas_of_other_bits(graph, loader):
    other = load(graph, "t2i_p16")
    positive = graph.add("CLIPTextEncode", clip=loader[1], text=PROMPT)
    show(graph, loader, sample(graph, loader[0], positive[0], draw(graph, other, steps=1)[0]))


def joined_prompts(node):
    def build(graph, loader):
        one = graph.add("CLIPTextEncode", clip=loader[1], text=PROMPT)
        two = graph.add("CLIPTextEncode", clip=loader[1], text="a small green circle on a white background")
        area = graph.add("ConditioningSetArea", conditioning=one[0], width=64, height=64, x=0, y=0, strength=1.0)
        joined = {
            "ConditioningCombine": {"conditioning_1": one[0], "conditioning_2": two[0]},
            "ConditioningConcat": {"conditioning_to": one[0], "conditioning_from": two[0]},
            "ConditioningAverage": {
                "conditioning_to": one[0], "conditioning_from": two[0], "conditioning_to_strength": 0.5,
            },
            "ConditioningSetTimestepRange": {"conditioning": one[0], "start": 0.2, "end": 1.0},
            "ConditioningSetAreaStrength": {"conditioning": area[0], "strength": 0.5},
        }[node]  # fmt: skip
        canvas = graph.add("BitDanceEmptyBits", width=64, height=64, batch_size=1)
        show(graph, loader, sample(graph, loader[0], graph.add(node, **joined)[0], canvas[0]))

    return build


def empty_canvas(graph, loader):
    show(graph, loader, graph.add("BitDanceEmptyBits", width=64, height=64, batch_size=1))


def saved_canvas(graph, loader):
    canvas = graph.add("BitDanceEmptyBits", width=64, height=64, batch_size=1)
    graph.add("BitDanceSaveBits", bits=canvas[0], filename_prefix="nothing")


def wrong_latent(graph, loader):
    empty = graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)
    finish(graph, loader, empty)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (ksampler, "use the Next-Patch Sampler"),
        (other_models_prompt, "encoded by another model's CLIP"),
        (other_families_bits, "needs those of a d8c32 one"),
        (canvas_of_other_bits, "builtin needs those of a d8c32 one"),
        (joined_prompts("ConditioningCombine"), "combines 2 prompts"),
        (joined_prompts("ConditioningConcat"), "averaged or concatenated"),
        (joined_prompts("ConditioningAverage"), "averaged or concatenated"),
        (joined_prompts("ConditioningSetAreaStrength"), "must have strength 1"),
        (joined_prompts("ConditioningSetTimestepRange"), "has start percent set"),
        (empty_canvas, "this is an empty canvas"),
        (saved_canvas, "an empty canvas has no bits to save"),
        (wrong_latent, "decodes 32 bits a token"),
    ],
)
def test_what_makes_no_sense_is_said_in_a_sentence(run, build, message):
    with pytest.raises(RuntimeError) as error:
        run(graph_with(build))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_names_that_are_not_there_are_refused_before_anything_runs(server):
    for changes, message in (
        ({"1": {"model_name": "no such model"}}, "there is no BitDance model"),
        ({"1": {"model_name": "../../etc"}}, "there is no BitDance model"),
        ({"4": {"sampler_name": "dpmpp"}}, "sampler_name"),
        ({"4": {"steps": -1}}, "steps"),
    ):
        with pytest.raises(RuntimeError, match="prompt_outputs_failed_validation") as error:
            server.queue(refused(changes))
        assert message in str(error.value)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "kept.latent", "example/../../x.safetensors"])
def test_load_bits_stays_in_its_folders(server, name):
    graph = Graph()
    bits = graph.add("BitDanceLoadBits", bits_file=name)
    graph.add("BitDanceSaveBits", bits=bits[0], filename_prefix="x")
    with pytest.raises(RuntimeError, match="there is no file of bits"):
        server.queue(graph)


def test_a_damaged_model_is_named_and_nothing_stays(run, server, base):
    folder = base / "models" / "bitdance" / "damaged"
    shutil.copytree(base / "models" / "bitdance" / "t2i_p16", folder)
    head = folder / "vision_head.safetensors"
    head.write_bytes(head.read_bytes()[:-100])
    with pytest.raises(RuntimeError, match="vision_head.safetensors is truncated"):
        run(text_to_image(model="damaged"))
    shutil.copy(base / "models" / "bitdance" / "t2i_p16" / head.name, head)
    assert run(text_to_image(model="damaged", steps=1))


def test_a_broken_index_of_shards_hides_nothing_else(run, server, base):
    folder = base / "models" / "bitdance" / "broken"
    shutil.copytree(base / "models" / "bitdance" / "t2i_p16", folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.no')
    listed = server.get("/object_info/BitDanceLoadModel")["BitDanceLoadModel"]["input"]["required"]["model_name"]
    assert {"builtin", "broken"} <= set(listed[1]["options"])
    with pytest.raises(RuntimeError, match="model.safetensors.index.json is not valid JSON"):
        run(text_to_image(model="broken"))
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["BitDanceLoadModel", "BitDanceLoadTokenizer", "BitDanceLoadBits"])
def test_a_linked_name_is_comfyuis_to_judge(server, name):
    """Links reach our own validation without a value."""
    graph = Graph()
    text = graph.add("PrimitiveString", value="builtin")
    inputs = {"BitDanceLoadModel": "model_name", "BitDanceLoadTokenizer": "tokenizer_name"}
    linked = {inputs.get(name, "bits_file"): text[0]}
    if name == "BitDanceLoadModel":
        linked["weight_dtype"] = "default"
    graph.add("PreviewAny", source=graph.add(name, **linked)[0])
    with pytest.raises(RuntimeError, match="Return type mismatch"):
        server.queue(graph)


def test_lora_nodes_change_the_picture_and_only_theirs(run, base):
    """ComfyUI's loader and ours, one after the other in one graph with the plain model."""
    weights = {"lora_A.weight": torch.randn(2, 256), "lora_B.weight": torch.randn(256, 2)}
    (base / "models" / "loras").mkdir(exist_ok=True)
    for name in ("diffusion_model.head.res_blocks.0.attn.wo", "vision_head.net.res_blocks.0.attn.wo"):
        file = base / "models" / "loras" / f"{name.split('.')[0]}.safetensors"
        save_file({f"{name}.{part}": weight for part, weight in weights.items()}, file)
    graph = Graph()
    loader = load(graph)
    stock = graph.add(
        "LoraLoaderModelOnly", model=loader[0], lora_name="diffusion_model.safetensors", strength_model=1.0
    )
    own = graph.add("BitDanceLoadLora", model=loader[0], lora_name="vision_head.safetensors", strength=1.0)
    positive = graph.add("BitDanceTextEncode", clip=loader[1], text=PROMPT)
    canvas = graph.add("BitDanceEmptyBits", width=64, height=64, batch_size=1)
    for model in (stock, own, loader):
        show(graph, loader, sample(graph, model[0], positive[0], canvas[0]))
    by_stock, by_own, plain = (image.tobytes() for image in run(graph))
    assert by_stock == by_own != plain == run(text_to_image())[0].tobytes()


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
    shutil.copytree(Path(__file__).parent / "data" / "t2i_p16", folder)
    edit = json.loads((folder / "config.json").read_text())
    edit |= {"num_hidden_layers": 8, "intermediate_size": 131072}
    (folder / "config.json").write_text(json.dumps(edit))
    checkpoint = BitDance(read_checkpoint(folder).config)
    state = {f"model.{name}": torch.zeros_like(tensor) for name, tensor in checkpoint.backbone.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    return sum(tensor.nbytes for tensor in state.values())


def test_torch_compile_is_honoured(run):
    """The stock node compiles a model's head here; its picture is the plain one's."""
    graph = Graph()
    loader = load(graph)
    compiled = graph.add("TorchCompileModel", model=loader[0], backend="inductor")
    positive = graph.add("BitDanceTextEncode", clip=loader[1], text=PROMPT)
    canvas = graph.add("BitDanceEmptyBits", width=64, height=64, batch_size=1)
    show(graph, loader, sample(graph, compiled[0], positive[0], canvas[0]))
    assert means(run(graph)[0])
