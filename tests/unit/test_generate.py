"""The engine against the plain reference, and what a caller may rely on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import golden
import reference
from bitdance_core import BitDanceError, BitDancePipeline, Cancelled
from bitdance_core.model.grid import Grid
from bitdance_core.sampling.flow import SAMPLERS
from bitdance_core.sampling.generate import generate
from bitdance_core.sampling.plan import Request
from bitdance_core.sampling.settings import Sampling
from bitdance_core.sampling.sizes import make_grid
from requests_of import branches_of, planned

PROMPTS = ("a photo of a red cat on the beach", "x")


@pytest.mark.parametrize("name", golden.MODELS)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize(("sampler", "schedule"), [*((name, "constant") for name in SAMPLERS), ("heun", "linear")])
def test_cached_and_batched_equals_uncached(name, guidance, sampler, schedule):
    pipe = golden.load(name, torch.float64).pipe
    grid = make_grid(pipe.config, pipe.prompts, 64, 96)
    branches = branches_of(pipe, grid, PROMPTS[0], guidance)
    sampling = Sampling(sampler, 4, guidance, schedule=schedule)
    generator = torch.Generator().manual_seed(5)
    fast = generate(pipe.model, Request(branches, grid, sampling, 1), generator, "cpu", torch.float64)
    noise = planned(grid, sampling, seed=5)
    assert torch.equal(fast > 0, 0 < reference.generate(pipe.model, branches, grid, sampling, noise))


@settings(max_examples=12, deadline=None)
@given(
    images=st.integers(1, 3),
    rows=st.integers(1, 2),
    columns=st.integers(1, 3),
    guidance=st.sampled_from([1.0, 2.5]),
    prompt=st.text(max_size=12),
    seed=st.integers(0, 2**64 - 1),
)
def test_a_batch_is_its_images_drawn_alone(images, rows, columns, guidance, prompt, seed):
    """Given the same noise, every image of a batch is what the plain reference makes of it alone."""
    pipe = golden.load("t2i_p16", torch.float64).pipe
    grid = Grid(4 * rows, 4 * columns, 4)
    branches = branches_of(pipe, grid, prompt, guidance)
    sampling = Sampling("euler_maruyama", 2, guidance)
    noise = planned(grid, sampling, seed, images)
    generator = torch.Generator().manual_seed(seed)
    together = generate(pipe.model, Request(branches, grid, sampling, images), generator, "cpu", torch.float64)
    for image in range(images):
        own = [draws[:, image : image + 1] for draws in noise]
        alone = reference.generate(pipe.model, branches, grid, sampling, own)
        assert torch.equal(together[image : image + 1] > 0, alone > 0)


def test_padding_does_not_matter():
    """The longer unconditional row of a negative prompt pads the conditional one; it draws the same."""
    pipe = golden.load("t2i_p16", torch.float64).pipe
    settings = {"height": 32, "width": 32, "steps": 4, "guidance": 2.0, "seed": 3}
    grid = make_grid(pipe.config, pipe.prompts, 32, 32)
    opening = pipe.prompts.opening(8, 8, 16)
    negative = "a very long negative prompt, longer than the prompt itself by far"
    branches = [pipe.prompts.conditional("x") + opening, pipe.prompts.conditional(negative) + opening]
    output = pipe.generate("x", negative_prompt=negative, **settings)
    sampling = Sampling("euler_maruyama", 4, 2.0)
    expected = reference.generate(pipe.model, branches, grid, sampling, planned(grid, sampling, seed=3))
    assert torch.equal(output.bits, expected > 0)


def test_same_seed_same_bits_and_the_global_generator_is_left_alone():
    pipe = golden.load("t2i_p16").pipe
    settings = {"height": 32, "width": 32, "steps": 3}
    before = torch.random.get_rng_state()
    first = pipe.generate("a cat", seed=1, **settings).bits
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(first, pipe.generate("a cat", seed=1, **settings).bits)
    assert not torch.equal(first, pipe.generate("a cat", seed=2, **settings).bits)


def test_callback_sees_the_picture_grow():
    pipe = golden.load("t2i_p16").pipe
    seen = []

    def callback(patch, patches, bits):
        seen.append((patch, patches, bits))

    output = pipe.generate("a cat", height=32, width=48, steps=2, num_images=2, callback=callback)
    patch_values = 2 * 16 * 16
    assert [(p, n, int(bits.count_nonzero())) for p, n, bits in seen] == [(i, 6, i * patch_values) for i in range(1, 7)]
    assert output.bits.shape == (2, 16, 8, 12) and output.bits.dtype == torch.bool
    assert [image.size for image in output.images] == [(48, 32)] * 2


def test_bits_are_the_users_to_edit():
    """Outside inference mode, as a user's script is."""
    with torch.inference_mode(False):
        output = golden.load("t2i_p16").pipe.generate("a cat", height=32, width=np.int64(32), steps=2)
        output.bits[0, 0] = True
        assert output.bits[0, 0].all()


def test_cancel_stops_inside_a_patch():
    pipe = golden.load("t2i_p16").pipe
    asked = []

    def cancel():
        asked.append(None)
        return len(asked) == 5

    with pytest.raises(Cancelled):
        pipe.generate("a cat", height=32, width=32, steps=50, cancel=cancel)
    assert len(asked) == 5


def test_no_backbone_pass_after_the_last_patch():
    pipe = golden.load("t2i_p16").pipe
    passes = []
    hook = pipe.model.backbone.register_forward_pre_hook(lambda module, args: passes.append(args[0].shape[1]))
    try:
        pipe.generate("a cat", height=32, width=32, steps=2)
    finally:
        hook.remove()
    assert len(passes) == 1 + 4 and passes[1:] == [16] * 4  # the prompt, then block 0 and three patches


def test_bfloat16_runs():
    pipe = golden.load("t2i_p16", torch.bfloat16).pipe
    output = pipe.generate("a cat", height=32, width=32, steps=3)
    assert output.bits.shape == (1, 16, 8, 8)
    assert {p.dtype for p in pipe.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"height": 36}, "multiples of 16.*nearest: 32x32"),
        ({"height": 4096}, "no side may exceed 256"),
        ({"height": 0}, "height must be a whole number from 1 to 65536, found 0"),
        ({"width": 64.0}, "width must be a whole number"),
        ({"num_images": True}, "num_images must be a whole number"),
        ({"sampler": "ddim"}, "unknown sampler 'ddim', have: euler_maruyama, euler, heun"),
        ({"steps": 0}, "steps must be a whole number from 1 to 100000, found 0"),
        ({"guidance": float("nan")}, "guidance must be"),
        ({"height": 10**400}, "height must be a whole number from 1 to 65536"),
        ({"prompt": "a \udcff cat"}, "prompt cannot be tokenized"),
        ({"negative_prompt": "\udcff"}, "prompt cannot be tokenized"),
        ({"num_images": 0}, "num_images"),
        ({"seed": -1}, "seed must be a whole number from 0 to 18446744073709551615, found -1"),
        ({"negative_prompt": 3}, "must be text"),
    ],
)
def test_bad_settings_are_named_before_any_work(settings, words):
    pipe = golden.load("t2i_p16").pipe

    def never():
        raise AssertionError("work was begun")

    with pytest.raises(ValueError, match=words):
        pipe.generate(**{"prompt": "a cat", "height": 32, "width": 32, "cancel": never, **settings})


def test_numbers_that_overflow_are_no_picture():
    """NaN has no sign: rather than a picture of minus ones, a sentence; and as soon as there is one."""
    pipe = BitDancePipeline.from_pretrained(golden.DATA / "t2i_p16", device="cpu", dtype=torch.float32)
    pipe.model.head.input_proj.bias.fill_(float("nan"))
    seen = []
    with pytest.raises(BitDanceError, match="overflow in torch.float32"):
        pipe.generate("a cat", height=32, width=32, steps=2, callback=lambda *patch: seen.append(patch))
    assert not seen


def test_numpy_numbers_are_welcome():
    pipe = golden.load("t2i_p16").pipe
    first = pipe.generate("a cat", height=32, width=32, steps=2, guidance=2.0).bits
    again = pipe.generate("a cat", height=np.int64(32), width=np.int32(32), steps=np.int8(2), guidance=np.float32(2))
    assert torch.equal(first, again.bits)
