"""Wrong graphs, names and files, in a real server: each is refused in one sentence."""

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
