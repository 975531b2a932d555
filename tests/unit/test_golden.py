"""Every stored value of the official float32 CPU pipeline is reproduced; bits exactly.

Values of one pass through a network agree within 1e-4. A whole patch amplifies rounding, so its tolerance follows from
guidance and steps (closeness.py).
"""

import pytest
import torch

import golden
from bitdance_core.model.grid import Grid
from bitdance_core.sampling.flow import make_schedule, plan_noise, sample_patch
from bitdance_core.sampling.sizes import make_grid
from closeness import check_sample

models = pytest.mark.parametrize("name", golden.MODELS)
cases = pytest.mark.parametrize(("name", "number"), golden.all_cases())


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@cases
def test_token_ids(name, number):
    gold = golden.load(name)
    case = gold.cases[number]
    assert gold.pipe.prompts.conditional(case["prompt"]) == case["cond_ids"]
    assert gold.pipe.prompts.unconditional() == case["uncond_ids"]


@models
def test_positions(name):
    gold = golden.load(name)
    positions = Grid(16, 32, gold.pipe.config.patch_size).positions(64)
    close(positions.flatten(0, 1), gold.values["pos.16x32"])


@models
def test_one_head_evaluation(name):
    gold = golden.load(name)
    head, values = gold.pipe.model.head, gold.values
    time = head.time_embed(values["head.t"], torch.float32)[:, None]
    close(head(values["head.x"], time, head.cond_embed(values["head.c"])), values["head.out"])


@models
@pytest.mark.parametrize(
    ("key", "steps", "guidance"), [("head.sample_cfg3_10", 10, 3.0), ("head.sample_nocfg_6", 6, 1.0)]
)
def test_head_samples(name, key, steps, guidance):
    gold = golden.load(name)
    head, expected = gold.pipe.model.head, gold.values[key]
    schedule = make_schedule("euler_maruyama", steps)
    rows = gold.values["head.c"][: 2 if guidance > 1 else None]
    branches = 2 if guidance > 1 else 1
    cond, time = head.cond_embed(rows), head.time_embed(torch.tensor(schedule.times), torch.float32)
    images = len(rows) // branches
    noise = plan_noise((images, *expected.shape[1:]), schedule.noise_draws, torch.Generator().manual_seed(7))

    def sample():
        patch = sample_patch(lambda x, i: head(x.repeat(branches, 1, 1), time[i], cond), noise, schedule, guidance)
        return patch.repeat(branches, 1, 1)

    check_sample(head, sample, expected)


@cases
def test_conditioning_and_sample_of_the_first_patch(name, number):
    gold = golden.load(name)
    case, pipe = gold.cases[number], gold.pipe
    grid = make_grid(pipe.config, pipe.prompts, case["height"], case["width"])
    opening = pipe.prompts.opening(grid.height, grid.width, grid.tokens_per_patch)
    texts = [case["cond_ids"], case["uncond_ids"]][: 2 if case["cfg"] > 1 else 1]
    images = case.get("n", 1)
    reader = pipe.model.reader([ids + opening for ids in texts], images, grid, 1, "cpu", torch.float32)
    conditioning = reader.prefill() + reader.positions[0]
    close(conditioning, gold.values[f"case{number}.cond0"])

    head, schedule = pipe.model.head, make_schedule("euler_maruyama", case["steps"])
    cond, time = head.cond_embed(conditioning), head.time_embed(torch.tensor(schedule.times), torch.float32)
    noise = plan_noise(
        (images, grid.tokens_per_patch, head.config.bits),
        schedule.noise_draws,
        torch.Generator().manual_seed(case["seed"]),
    )

    def sample():
        patch = sample_patch(lambda x, i: head(x.repeat(len(texts), 1, 1), time[i], cond), noise, schedule, case["cfg"])
        return patch.repeat(len(texts), 1, 1)

    check_sample(head, sample, gold.values[f"case{number}.sample0"])


@cases
def test_bits_exactly_and_pixels(name, number):
    gold = golden.load(name)
    case, pipe = gold.cases[number], gold.pipe
    output = pipe.generate(
        case["prompt"],
        height=case["height"],
        width=case["width"],
        steps=case["steps"],
        guidance=case["cfg"],
        seed=case["seed"],
        num_images=case.get("n", 1),
    )
    grid = make_grid(pipe.config, pipe.prompts, case["height"], case["width"])
    sequence = grid.patchify(output.bits).flatten(1, 2)
    assert torch.equal(sequence, gold.values[f"case{number}.bits"].bool())
    close(pipe.tokenizer.decode(output.bits), gold.values[f"case{number}.image"])


@models
def test_tokenizer(name):
    gold = golden.load(name)
    tokenizer, values = gold.pipe.tokenizer, gold.values
    close(tokenizer.autoencoder.encoder(values["ae.image"]), values["ae.encoder_out"])
    bits = tokenizer.encode(values["ae.image"])
    assert torch.equal(bits > 0, values["ae.bits"].bool())
    close(tokenizer.decode(bits), values["ae.decoded"])
