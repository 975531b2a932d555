"""Wrong graphs, names and files, in a real server: each is refused in one sentence, with the value and the remedy."""

import re
import shutil

import pytest

from graphs import PROMPT, Graph, draw, finish, load, sample, show, text_to_image


def refused(changes):
    """A text-to-image graph with changes: {node number: {input: value}}."""
    graph = text_to_image()
    for node, inputs in changes.items():
        graph[node]["inputs"].update(inputs)
    return graph


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"3": {"width": 96, "height": 96}}, ["96x96", "builtin", "64x64"]),
        ({"3": {"width": 64, "height": 0}}, ["width is 64", "height 0", "both"]),
        ({"4": {"denoise": 0.5}}, ["denoise 0.5", "'bits'"]),
        ({"3": {"width": 100, "height": 100}, "4": {"allow_untrained_size": True}}, ["100x100", "multiples of 32"]),
        ({"1": {"model_name": "t2i_p64"}, "3": {"width": 72, "height": 72}}, ["72x72", "multiples of 32"]),
    ],
)
def test_wrong_settings_are_named(run, changes, words):
    with pytest.raises(RuntimeError) as error:
        run(refused(changes))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


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


def draw_with_options(graph, loader, **changes):
    values = {"last_steps": 0, "last_cfg": 0.0, "guide_from": 0.0, "guide_to": 1.0, "noise_scale": 1.0} | changes
    options = graph.add("BitDanceSamplingOptions", time_shift=0.0, **values)
    show(graph, loader, draw(graph, loader, options=options[0]))


def contradicting_options(graph, loader):
    draw_with_options(graph, loader, cfg_schedule="linear", last_cfg=2.0)


def reversed_times(graph, loader):
    draw_with_options(graph, loader, guide_from=0.9, guide_to=0.2)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (ksampler, ["Next-Patch Sampler"]),
        (other_models_prompt, ["'positive'", "use the CLIP"]),
        (other_families_bits, ["d4c16", "d8c32"]),
        (canvas_of_other_bits, ["d4c16", "builtin", "d8c32"]),
        (joined_prompts("ConditioningCombine"), ["'positive'", "2 prompts", "areas"]),
        (joined_prompts("ConditioningConcat"), ["'positive'", "one prompt"]),
        (joined_prompts("ConditioningAverage"), ["'positive'", "one prompt"]),
        (joined_prompts("ConditioningSetAreaStrength"), ["strength 1, found 0.5"]),
        (joined_prompts("ConditioningSetTimestepRange"), ["'positive'", "start percent", "remove"]),
        (empty_canvas, ["'bits' is an empty canvas", "Next-Patch Sampler"]),
        (saved_canvas, ["empty canvas", "draw on it"]),
        (wrong_latent, ["32 bits", "[1, 4, 8, 8]"]),
        (contradicting_options, ["cfg_schedule", "last_cfg 2"]),
        (reversed_times, ["guide_from is 0.9", "guide_to 0.2"]),
    ],
)
def test_graphs_that_make_no_sense_are_refused(run, build, words):
    with pytest.raises(RuntimeError) as error:
        run(graph_with(build))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_names_that_are_not_there_are_refused_before_anything_runs(server):
    for changes, message in (
        ({"1": {"model_name": "no such model"}}, "model_name - there is no BitDance model 'no such model'"),
        ({"1": {"model_name": "../../etc"}}, "model_name - there is no BitDance model '../../etc'"),
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
    with pytest.raises(RuntimeError, match=f"bits_file - .*'{re.escape(name)}'"):
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
