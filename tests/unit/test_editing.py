"""Editing, exact to the token: what is kept stays, what is redrawn is what the plain reference draws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bitdance_core.sampling.generate as engine
import golden
import reference
from bitdance_core import BitDanceError, BitDancePipeline
from bitdance_core.bits.edits import bars, blend, differing, pad, planes, vary
from bitdance_core.model.grid import Grid
from bitdance_core.sampling.editing import crop_to_tokens, make_edit, token_mask
from bitdance_core.sampling.flow import make_schedule
from bitdance_core.sampling.generate import generate
from bitdance_core.sampling.plan import Request
from bitdance_core.sampling.settings import Sampling
from builtin import eval_editing
from closeness import check_close, samples_of, tolerance
from requests_of import branches_of, planned

SIZE = {"height": 32, "width": 48, "steps": 3}  # 2 x 3 patches of 4x4 tokens of 4 pixels


@pytest.fixture(scope="module")
def pipe():
    return golden.load("t2i_p16").pipe


@pytest.fixture(scope="module")
def pipe64():
    """In float64, where batches of other sizes round differently too, but never enough to turn a bit."""
    return golden.load("t2i_p16", torch.float64).pipe


@pytest.fixture(scope="module")
def start(pipe):
    return pipe.generate("a dog", seed=5, **SIZE).bits


def counted(pipe, monkeypatch):
    """Counts of calls: the head's, the backbone's."""
    calls = {"head": 0, "backbone": 0}
    for name, method in (("head", "predict"), ("backbone", "forward")):
        part = getattr(pipe.model, name)
        compute = getattr(part, method)

        def count(*args, name=name, compute=compute, **kwargs):
            calls[name] += 1
            return compute(*args, **kwargs)

        monkeypatch.setattr(part, method, count)
    return calls


def mask_of(*patches):
    """A mask in pixels that covers whole patches of the 2 x 3 grid."""
    mask = torch.zeros(1, 32, 48)
    for patch in patches:
        row, column = divmod(patch, 3)
        mask[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 1
    return mask


def test_denoise_1_is_a_fresh_picture(pipe, start):
    fresh = pipe.generate("a cat", seed=1, **SIZE).bits
    assert pipe.generate("a cat", seed=1, init_bits=start, denoise=1.0, steps=3).bits.equal(fresh)
    everything = pipe.generate("a cat", seed=1, init_bits=start, mask=torch.ones(1, 7, 9), steps=3).bits
    assert everything.equal(fresh)


def test_denoise_0_returns_the_bits_without_work(pipe, start, monkeypatch):
    calls = counted(pipe, monkeypatch)
    assert pipe.generate("a cat", init_bits=start, denoise=0.0).bits.equal(start)
    assert pipe.generate("a cat", init_bits=start, mask=torch.zeros(1, 32, 48)).bits.equal(start)
    assert calls == {"head": 0, "backbone": 0}


@pytest.mark.parametrize("sampler", ["euler_maruyama", "euler", "heun"])
def test_more_denoise_changes_more_bits(sampler):
    """With the built-in model, whose predictions are sure (a random one's are not)."""
    pipe = BitDancePipeline.from_pretrained("builtin", device="cpu")
    start = pipe.generate("a large red star on a blue background", seed=0).bits.expand(4, -1, -1, -1)
    changed = [
        float(
            (
                pipe.generate(
                    "a large red star on a blue background", init_bits=start, denoise=d, seed=1, sampler=sampler
                ).bits
                ^ start
            )
            .float()
            .mean()
        )
        for d in (0.1, 0.4, 0.7, 1.0)
    ]
    assert changed == sorted(changed) and changed[0] < 0.15 and changed[-1] > changed[0] + 0.1, changed


@settings(max_examples=15, deadline=None)
@given(
    denoise=st.sampled_from([1.0, 0.7, 0.3, 0.02]),
    guidance=st.sampled_from([1.0, 2.5]),
    sampler=st.sampled_from(["euler_maruyama", "heun"]),
    share=st.sampled_from([0.05, 0.3, 0.9]),
    soft=st.booleans(),
    schedule=st.sampled_from(["constant", "linear"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_edits_are_those_of_the_plain_reference(denoise, guidance, sampler, share, soft, schedule, seed):
    """Any mask, in float64: kept patches read together in one pass change nothing, nor does noise that none takes."""
    pipe = golden.load("t2i_p16", torch.float64).pipe
    grid = Grid(8, 12, 4)
    chosen = torch.Generator().manual_seed(seed)
    start = torch.rand(1, 16, 8, 12, generator=chosen) > 0.5
    mask = torch.rand(1, 8, 12, generator=chosen)
    mask = torch.where(mask < share, 0.5 + 0.5 * torch.rand(1, 8, 12, generator=chosen) if soft else 1.0, 0.0)
    edit = make_edit(start, denoise, mask, grid, 1, 16)
    sampling = Sampling(sampler, 3, guidance, schedule=schedule)
    branches = branches_of(pipe, grid, "a photo of a red cat", guidance)
    noise = planned(grid, sampling, seed)
    generator = torch.Generator().manual_seed(seed)
    drawn = generate(pipe.model, Request(branches, grid, sampling, 1, edit), generator, "cpu", torch.float64)
    expected = reference.generate(pipe.model, branches, grid, sampling, noise, edit)
    assert (drawn > 0).equal(expected > 0)
    kept = mask < 0.5
    assert (drawn > 0).masked_select(kept[:, None]).equal(start.masked_select(kept[:, None]))


def test_kept_tokens_are_kept_in_every_picture_of_a_batch(pipe):
    start = torch.rand(3, 16, 8, 12) > 0.5
    mask = torch.stack([mask_of(0)[0], mask_of(4, 5)[0], torch.zeros(32, 48)])
    mask[1, 3, 3] = 1  # one pixel: one token
    bits = pipe.generate("a cat", init_bits=start, mask=mask, seed=2, steps=3).bits
    redrawn = token_mask(mask, Grid(8, 12, 4), 3) >= 0.5
    assert redrawn.sum((1, 2)).tolist() == [16, 33, 0]
    changed = (bits ^ start).any(1)
    assert not (changed & ~redrawn).any() and changed[0].any() and changed[1].any()


def test_one_patch_costs_one_patch(pipe, start, monkeypatch):
    """Redrawing one of six patches asks the head as often as one patch does, and reads what lies before it at once."""
    calls = counted(pipe, monkeypatch)
    pipe.generate("a cat", init_bits=start, mask=mask_of(4), steps=3)
    one = dict(calls)
    assert one == {"head": 4, "backbone": 3}  # the prompt, the queries, then patches 0 to 3 in one pass
    pipe.generate("a cat", steps=3, height=32, width=48)
    assert calls["head"] - one["head"] == 6 * one["head"]


@pytest.mark.parametrize("patches", [(0,), (4,), (1, 2, 5), (0, 1, 2, 3, 4, 5)])
@pytest.mark.parametrize("sampler", ["euler_maruyama", "heun"])
def test_evaluations_are_counted_beforehand(pipe, start, patches, sampler):
    grid, sampling = Grid(8, 12, 4), Sampling(sampler, 3, 1.0)
    edit = make_edit(start, 0.8, mask_of(*patches), grid, 1, 16)
    asked = []
    branches = branches_of(pipe, grid, "a cat", 1.0)
    generator = torch.Generator().manual_seed(0)
    request = Request(branches, grid, sampling, 1, edit)
    generate(pipe.model, request, generator, "cpu", torch.float32, cancel=lambda: asked.append(1))
    assert len(asked) == request.evaluations()


def test_soft_masks_denoise_less():
    grid = Grid(4, 4, 4)
    mask = torch.tensor([0.0, 0.49, 0.5, 1.0]).expand(1, 4, 4)
    edit = make_edit(torch.zeros(1, 8, 4, 4, dtype=torch.bool), 0.6, mask, grid, 1, 8)
    assert edit.until[0, 0].tolist() == pytest.approx([1, 1, 1 - 0.6 * 0.5, 0.4])


@pytest.mark.parametrize("size", [(2, 2), (8, 8), (64, 64), (100, 37), (3, 200)])
def test_masks_of_any_size_lie_over_the_whole_picture(size):
    grid = Grid(8, 8, 4)
    corner = torch.zeros(1, *size)
    corner[:, 0, 0] = 1
    tokens = token_mask(corner, grid, 1)
    assert tokens.shape == (1, 8, 8) and tokens[0, 0, 0] == 1 and tokens[0, 4:, 4:].sum() == 0
    assert token_mask(torch.ones(1, *size), grid, 1).min() == 1


def test_a_start_beyond_the_grid_leaves_the_closing_step():
    assert make_schedule("euler", 10, start=0.97).times == (0.97,)
    assert (
        make_schedule("euler", 10, start=0.5).times[0] == 0.5 and len(make_schedule("euler", 10, start=0.5).times) == 11
    )
    for shift in (0.5, 3.0):
        schedule = make_schedule("euler", 10, shift, start=0.3)
        assert schedule.times[0] == pytest.approx(0.3) and sum(schedule.lengths) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"denoise": 0.5}, "need bits to start from"),
        ({"mask": torch.ones(1, 8, 8)}, "need bits to start from"),
        ({"denoise": 1.5, "init_bits": True}, "denoise must be a number from 0 to 1, found 1.5"),
        ({"denoise": 0.5, "init_bits": torch.zeros(1, 8, 8, 12, dtype=torch.bool)}, r"expected \[1, 16, 8, 12\]"),
        ({"denoise": 0.5, "init_bits": True, "height": 64}, "init_bits are of 48x32 pixels"),
        ({"init_bits": True, "mask": torch.ones(2, 8, 8)}, "a mask must be"),
        ({"init_bits": torch.zeros(16, 8, 12, dtype=torch.bool)}, r"init_bits must be \(n, C, h, w\)"),
        ({"init_bits": torch.zeros(2, 16, 8, 12, dtype=torch.bool), "num_images": 3}, r"expected \[3, 16, 8, 12\]"),
        ({"guidance_interval": ("a", "b")}, "guidance_interval must be"),
        ({"regions": [(1, torch.ones(1, 8, 8))]}, "regions must be pairs"),
        ({"regions": [("a", torch.ones(2, 8, 8))]}, r"a mask must be \(1, H, W\)"),
        ({"noise_scale": -1.0}, "noise_scale must be"),
        ({"guidance_interval": (0.7, 0.2)}, "guidance_interval must be"),
        ({"time_shift": 0.0}, "time_shift must lie"),
        ({"last_steps": 0}, "last_steps must be"),
        ({"last_guidance": float("nan")}, "last_guidance must be"),
    ],
)
def test_what_cannot_be_is_named(pipe, start, arguments, message):
    arguments = {**SIZE, **arguments}
    if arguments.get("init_bits") is True:
        arguments["init_bits"] = start
    with pytest.raises(BitDanceError, match=message):
        pipe.generate("a cat", **arguments)


def test_every_option_is_exact_where_it_is_neutral(pipe):
    plain = pipe.generate("a cat", seed=3, guidance=2.5, **SIZE).bits
    neutral = {
        "last_steps": 3, "last_guidance": 2.5, "guidance_interval": (0.0, 1.0), "noise_scale": 1.0,
        "time_shift": pipe.config.head.time_shift,
    }  # fmt: skip
    assert pipe.generate("a cat", seed=3, guidance=2.5, **SIZE, **neutral).bits.equal(plain)
    for changed in ({"last_steps": 9}, {"last_guidance": 9.0}, {"noise_scale": 0.5}, {"time_shift": 3.0}):
        assert not pipe.generate("a cat", seed=3, guidance=2.5, **SIZE, **changed).bits.equal(plain)


def test_no_guidance_interval_is_no_guidance(pipe64, monkeypatch):
    """Outside the interval only half of the rows are computed; an interval that no time lies in is guidance 1."""
    rows = []
    predict = pipe64.model.head.predict
    monkeypatch.setattr(pipe64.model.head, "predict", lambda x, *rest: (rows.append(len(x)), predict(x, *rest))[1])
    plain = pipe64.generate("a cat", seed=3, guidance=1.0, **SIZE).bits
    rows.clear()
    never = pipe64.generate("a cat", seed=3, guidance=5.0, guidance_interval=(0.96, 1.0), **SIZE).bits
    assert never.equal(plain) and set(rows) == {1}
    rows.clear()
    pipe64.generate("a cat", seed=3, guidance=5.0, guidance_interval=(0.3, 0.7), **SIZE)
    assert rows == [1, 2, 2, 1] * 6  # times 0, 0.32, 0.63, 0.95


def test_without_noise_the_stochastic_sampler_is_the_flow(pipe):
    """Of one patch: later ones start from other draws. Nearly: the closing step starts from 0.95 itself, not from the
    float32 sum of the steps.
    """
    size = {"height": 16, "width": 16, "steps": 8, "seed": 4, "allow_untrained_size": True}

    def samples(**options):
        return samples_of(engine, lambda: pipe.generate("a cat", **size, **options))

    atol = tolerance(pipe.model.head, lambda: samples(sampler="euler"))
    check_close(samples(noise_scale=0.0), samples(sampler="euler"), atol)


def test_regions_follow_their_own_prompts():
    """Each token's condition is its prompt's; with one prompt for all tokens it is as if there were one. In float64,
    since a branch more is a larger batch.
    """
    pipe = golden.load("t2i_p16", torch.float64).pipe
    grid, sampling = Grid(8, 12, 4), Sampling("euler_maruyama", 3, 2.5)
    cat, dog = (branches_of(pipe, grid, text, 1.0)[0] for text in ("a photo of a red cat", "dog"))
    unconditional = branches_of(pipe, grid, "", 2.5)[1]

    def draw(branches, regions=None):
        generator = torch.Generator().manual_seed(1)
        request = Request(branches, grid, sampling, 2, regions=regions)
        return generate(pipe.model, request, generator, "cpu", torch.float64)

    regions = torch.zeros(6, 16, dtype=torch.long)
    only_cat = draw([cat, unconditional])
    assert draw([cat, dog, unconditional], regions).equal(only_cat)
    assert draw([dog, cat, unconditional], regions + 1).equal(only_cat)
    regions[3:, 8:] = 1
    both = draw([cat, dog, unconditional], regions)
    assert both[:, :, :4].equal(only_cat[:, :, :4]) and not both[:, :, 4:].equal(only_cat[:, :, 4:])


def test_vary_flips_its_share():
    bits = torch.rand(2, 32, 8, 8) > 0.5
    varied = vary(bits, 0.1, torch.Generator().manual_seed(0))
    assert (bits ^ varied).flatten(1).sum(1).tolist() == [205, 205]
    assert not (bits ^ varied)[0].equal((bits ^ varied)[1])
    assert vary(bits, 0.0, torch.Generator()).equal(bits) and vary(bits, 1.0, torch.Generator()).equal(~bits)


def test_pad_blend_and_differing():
    bits = torch.rand(1, 8, 2, 3) > 0.5
    padded = pad(bits, 1, 2, 3, 0)
    assert padded.shape == (1, 8, 4, 7) and padded[:, :, 2:, 1:4].equal(bits)
    assert padded[:, :, 0, 0].equal(bits[:, :, 0, 0])
    mask = torch.zeros(1, 2, 3, dtype=torch.bool)
    mask[0, 1, 2] = True
    mixed = blend(bits, ~bits, mask)
    assert differing(bits, mixed)[0].tolist() == [[0, 0, 0], [0, 0, 1]]
    with pytest.raises(BitDanceError, match="one grid"):
        blend(bits, padded, mask)


@pytest.mark.parametrize("shape", [(1, 32, 8, 8), (2, 5, 4, 12), (1, 1, 1, 1)])
def test_planes_show_every_bit(shape):
    bits = torch.rand(shape) > 0.5
    sheet = planes(bits, scale=1, gap=0)
    assert sheet.shape[0] == shape[0] and int((sheet == 1).sum()) == int(bits.sum())


def test_bars_are_as_high_as_their_shares():
    picture = bars(torch.tensor([0.0, 0.5, 1.0]), 30, 20)
    assert ((picture == 1).sum(0) / 20).tolist() == [0.0] * 10 + [0.5] * 10 + [1.0] * 10


@pytest.mark.parametrize(
    ("size", "rows"), [((5, 5), [1, 2, 3]), ((7, 3), [1, 2]), ((8, 1), [1]), ((16, 16), [0]), ((64, 64), [0])]
)
def test_every_token_that_a_mask_touches_is_redrawn(size, rows):
    """Row 1 of a mask, over 8x8 tokens."""
    mask = torch.zeros(1, *size)
    mask[:, 1] = 1
    assert token_mask(mask, Grid(8, 8, 4), 1)[0].amax(1).nonzero().flatten().tolist() == rows


@pytest.mark.parametrize("step", [4, 8, 16])
@pytest.mark.parametrize("extra", [(0, 0), (1, 0), (0, 3), (3, 2), (15, 15), (7, 9)])
def test_a_mask_of_a_cropped_picture_is_cropped_alike(step, extra):
    """Marked pixels redraw the token that they are encoded to, and no other; cropped ones redraw none."""
    height, width = 3 * step + extra[0] % step, 2 * step + extra[1] % step
    picture = torch.arange(height * width).view(1, height, width)
    kept = crop_to_tokens(picture, step)
    assert kept.shape == (1, 3 * step, 2 * step)
    top, left = height % step // 2, width % step // 2  # as comfy.sd.VAE crops
    assert kept[0, 0, 0] == top * width + left
    grid = Grid(3, 2, 1)
    for row in range(3):
        for column in range(2):
            own = kept[:, row * step : (row + 1) * step, column * step : (column + 1) * step].flatten()
            for pixel in (own[0], own[-1]):
                tokens = token_mask((picture == pixel).float(), grid, 1, step)[0]
                assert tokens.nonzero().tolist() == [[row, column]]
    if kept.numel() < picture.numel():
        outside = torch.isin(picture, kept, invert=True).float()
        assert not token_mask(outside, grid, 1, step).any() and token_mask(outside, grid, 1).any()


def test_a_mask_of_another_size_is_stretched_as_ever():
    mask = torch.rand(1, 29, 31, generator=torch.Generator().manual_seed(0))
    assert token_mask(mask, Grid(8, 8, 4), 1, 4).equal(token_mask(mask, Grid(8, 8, 4), 1))


def test_little_denoise_changes_little():
    """Under another prompt, whose guidance pulls: closer to the bits than any step of a fresh picture too."""
    pipe = BitDancePipeline.from_pretrained("builtin", device="cpu")
    start = pipe.generate("a large red star on a blue background", seed=0).bits.expand(8, -1, -1, -1)
    changed = []
    for denoise in (0.01, 0.03, 0.05, 0.2, 0.5):
        bits = pipe.generate("a small green circle on a white background", init_bits=start, denoise=denoise).bits
        changed.append(int((bits ^ start).sum()))
    assert changed == sorted(changed) and changed[1] < 20 < changed[-1], changed


@pytest.mark.parametrize("sampler", ["euler_maruyama", "euler"])
@pytest.mark.parametrize("time_shift", [0.5, 3.0])
def test_shifted_times_release_their_tokens(pipe, start, sampler, time_shift):
    options = {"init_bits": start, "denoise": 0.04, "steps": 6, "time_shift": time_shift, "sampler": sampler}
    assert not pipe.generate("a cat", **options).bits.equal(start)


def test_regions_by_prompt_and_mask(pipe64):
    lower = torch.zeros(1, 32, 48)
    lower[:, 16:] = 1
    cat, dog = (pipe64.generate(prompt, seed=1, **SIZE).bits for prompt in ("a cat", "a dog"))
    both = pipe64.generate("a cat", regions=[("a dog", lower)], seed=1, **SIZE).bits
    assert both[:, :, :4].equal(cat[:, :, :4]) and not both.equal(cat)
    assert pipe64.generate("a cat", regions=[("a dog", torch.ones(1, 4, 4))], seed=1, **SIZE).bits.equal(dog)


def test_the_cost_of_an_edit_is_counted(capsys):
    """What the README quotes: 25 steps and the closing one, for one patch and for eight."""
    eval_editing.measure_cost(BitDancePipeline.from_pretrained("builtin", device="cpu"), repeats=1)
    assert capsys.readouterr().out.startswith("one of 8 patches: 26 of 208 head evaluations, ")


@pytest.mark.parametrize("kind", eval_editing.KINDS)
def test_random_edits_keep_and_follow(kind):
    results = eval_editing.run(BitDancePipeline.from_pretrained("builtin", device="cpu"), kind, 5, seed=3)
    assert all(result.kept for result in results)
    assert sum(result.follows for result in results) >= 4


@pytest.mark.long
@pytest.mark.parametrize("kind", eval_editing.KINDS)
def test_40_random_edits_keep_and_follow(kind):
    results = eval_editing.run(BitDancePipeline.from_pretrained("builtin", device="cpu"), kind, 40, seed=1)
    assert all(result.kept for result in results)
    assert sum(result.follows for result in results) >= 34
