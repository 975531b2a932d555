"""ComfyUI's own nodes around ours, in a real server. Where they lead to the same inputs, pictures agree to the byte."""

import shutil

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from graphs import PROMPT, Graph, draw, finish, load, means, sample, show, stock_start, text_to_image


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
    ground = graph.add("BitDancePrompt", clip=loader[1], text="a large white square on a black background")
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
    positive = graph.add("BitDancePrompt", clip=loader[1], text=PROMPT)
    canvas = graph.add("BitDanceEmptyBits", width=64, height=64, batch_size=1)
    for model in (stock, own, loader):
        show(graph, loader, sample(graph, model[0], positive[0], canvas[0]))
    by_stock, by_own, plain = (image.tobytes() for image in run(graph))
    assert by_stock == by_own != plain == run(text_to_image())[0].tobytes()


def test_torch_compile_is_honoured(run):
    """The stock node compiles a model's head here; its picture is the plain one's."""
    graph = Graph()
    loader = load(graph)
    compiled = graph.add("TorchCompileModel", model=loader[0], backend="inductor")
    positive = graph.add("BitDancePrompt", clip=loader[1], text=PROMPT)
    canvas = graph.add("BitDanceEmptyBits", width=64, height=64, batch_size=1)
    show(graph, loader, sample(graph, compiled[0], positive[0], canvas[0]))
    assert means(run(graph)[0])


def stock_lora(graph, model, base):
    generator = torch.Generator().manual_seed(0)
    key = "diffusion_model.head.res_blocks.0.attn.wo"
    file = {f"{key}.lora_A.weight": torch.randn(2, 256, generator=generator)}
    file |= {f"{key}.lora_B.weight": torch.randn(256, 2, generator=generator)}
    (base / "models" / "loras").mkdir(exist_ok=True)
    save_file(file, base / "models" / "loras" / "of_the_head.safetensors")
    return graph.add("LoraLoaderModelOnly", model=model, lora_name="of_the_head.safetensors", strength_model=1.0)


def test_a_merge_after_a_lora_and_a_saved_merge(run, base):
    """A model merged with itself after a picture with a LoRA is itself; saved with the LoRA it loads as one file."""
    graph = Graph()
    loader = load(graph)
    lora = stock_lora(graph, loader[0], base)
    positive = graph.add("BitDancePrompt", clip=loader[1], text=PROMPT)
    canvas = graph.add("BitDanceEmptyBits", width=64, height=64, batch_size=1)
    with_lora = show(graph, loader, sample(graph, lora[0], positive[0], canvas[0]))
    first = run(graph)[0].tobytes()
    del graph[with_lora.id]
    merged = graph.add("ModelMergeSimple", model1=loader[0], model2=loader[0], ratio=0.5)
    show(graph, loader, sample(graph, merged[0], positive[0], canvas[0]))
    graph.add("CheckpointSave", model=lora[0], clip=loader[1], vae=loader[2], filename_prefix="checkpoints/merged")
    graph.add("ModelSave", model=lora[0], filename_prefix="diffusion_models/merged")
    assert run(graph)[0].tobytes() == run(text_to_image())[0].tobytes() != first
    for folder in ("checkpoints", "diffusion_models"):
        (base / "models" / folder).mkdir(exist_ok=True)
        (path,) = (base / "output" / folder).glob("merged*.safetensors")
        shutil.copy(path, base / "models" / folder / f"of_{folder}.safetensors")
        assert run(text_to_image(model=f"of_{folder}.safetensors"))[0].tobytes() == first


def test_an_effect_that_is_not_followed_is_shown_on_the_sampler(server):
    graph = Graph()
    loader = load(graph)
    rescaled = graph.add("RescaleCFG", model=loader[0], multiplier=0.7)
    positive = graph.add("BitDancePrompt", clip=loader[1], text=PROMPT)
    canvas = graph.add("BitDanceEmptyBits", width=64, height=64, batch_size=1)
    bits = sample(graph, rescaled[0], positive[0], canvas[0], steps=2)
    show(graph, loader, bits)
    history = server.wait(server.queue(graph))
    assert "RescaleCFG" in history["outputs"][bits.id]["text"][0]
