"""The training loss: equal to a plain reference on the golden models, gradients too, and what sampling sees."""

import copy
import itertools
import math
from contextlib import contextmanager

import pytest
import torch

import golden
import golden_classes
import reference
from bitdance_core.model.grid import Grid
from bitdance_core.training.loss import Corruption, Draws, Kept, block_causal_mask, hidden_states, velocity_loss

TEXTS = ["a red star", "two small circles on a very large field", ""]
KINDS = ["t2i_p16", "t2i_p64", "tiny_1x", "tiny_4x", "tiny_16x"]


@pytest.fixture(autouse=True)
def gradients():
    with torch.inference_mode(False), torch.enable_grad():
        yield


def load(name, dtype=torch.float64):
    """A golden model of our own, its grid, three conditions and the unconditional one."""
    if name.startswith("tiny"):
        model = copy.deepcopy(golden_classes.load(name, dtype)[0].model)
        return model.requires_grad_(True), model.grid, [2, 0, 1], model.config.null_class
    pipe = golden.load(name, dtype).pipe
    side = 2 * pipe.config.patch_size
    grid = Grid(side, side, pipe.config.patch_size)
    opening = pipe.prompts.opening(side, side, grid.tokens_per_patch)
    rows = [pipe.prompts.conditional(text) + opening for text in TEXTS]
    return copy.deepcopy(pipe.model).requires_grad_(True), grid, rows, pipe.prompts.unconditional() + opening


def random_tokens(grid, bits, count=3, dtype=torch.float64):
    shape = (count, grid.num_patches, grid.tokens_per_patch, bits)
    return torch.where(torch.rand(shape, generator=torch.Generator().manual_seed(5)) > 0.5, 1.0, -1.0).to(dtype)


def draw(tokens, corruption, shift=1.0, seed=7):
    return Draws.make(tokens.shape, corruption, shift, torch.Generator().manual_seed(seed))


def plain_loss(model, conditions, unconditional, tokens, grid, draws, others=None, before=None):
    """One picture, one patch and one time after another; the sequence is read again for each patch.

    With `others` and the model as it was `before`, kept pictures are to be predicted as it did.
    """

    def predict(model, condition, b, k, z, t):
        read = reference.hidden_states_of_class if isinstance(unconditional, int) else reference.hidden_states
        context = tokens[b] * (1 - 2 * draws.flipped[b].to(tokens))
        hidden = read(model, condition, context[:k], grid) + reference.positions_of(model, grid)[k]
        cond = model.head.cond_embed(hidden[None])
        return model.head(z[None], model.head.time_embed(t[None], tokens.dtype)[:, None], cond)[0]

    errors = []
    for b, k, s in itertools.product(range(len(conditions)), range(grid.num_patches), range(len(draws.t))):
        condition = unconditional if draws.dropped[b] else conditions[b]
        is_kept = others is not None and draws.kept[b]
        condition = others[b] if is_kept else condition
        t, noise, x = draws.t[s, b, k].double(), draws.noise[s, b, k].double(), tokens[b, k]
        z = (1 - t) * noise + t * x
        target = predict(before, condition, b, k, z, t).detach() if is_kept else x
        left = max(1 - float(t), 0.05)
        errors.append(((target - z) / left - (predict(model, condition, b, k, z, t) - z) / left) ** 2)
    return torch.stack(errors).mean()


@pytest.mark.parametrize("name", KINDS)
def test_loss_and_gradients_equal_the_plain_reference(name):
    model, grid, conditions, unconditional = load(name)
    tokens = random_tokens(grid, model.config.head.bits)
    draws = draw(tokens, Corruption(drop=0.5, times=2), seed=1)
    assert 0 < draws.dropped.sum() < 3 and draws.flipped.any()
    plain = plain_loss(model, conditions, unconditional, tokens, grid, draws)
    expected = torch.autograd.grad(plain, list(model.parameters()), allow_unused=True)
    loss, _ = velocity_loss(model, conditions, unconditional, tokens, grid, draws)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), plain, rtol=1e-5, atol=0)
    loss.backward()
    for (where, parameter), gradient in zip(model.named_parameters(), expected):
        assert (parameter.grad is None) == (gradient is None), where
        if gradient is not None:
            atol = 1e-5 * float(gradient.abs().max()) + 1e-9
            torch.testing.assert_close(
                parameter.grad, gradient, rtol=1e-4, atol=atol, msg=lambda m, w=where: f"{w}: {m}"
            )


@pytest.mark.parametrize("name", ["t2i_p16", "tiny_4x"])
def test_what_is_kept_is_predicted_as_before(name):
    model, grid, conditions, unconditional = load(name)
    tokens = random_tokens(grid, model.config.head.bits)
    draws = draw(tokens, Corruption(drop=0.5, keep=0.5, times=2), seed=7)
    assert 0 < draws.kept.sum() < 3
    before, layer = copy.deepcopy(model), model.head.res_blocks[0]
    layer.load_state_dict({name: 1.1 * weight for name, weight in layer.state_dict().items()})
    others = conditions[1:] + conditions[:1]

    @contextmanager
    def untouched():
        model.head.res_blocks[0] = before.head.res_blocks[0]
        yield
        model.head.res_blocks[0] = layer

    plain = plain_loss(model, conditions, unconditional, tokens, grid, draws, others, before)
    expected = torch.autograd.grad(plain, list(layer.parameters()))
    loss, _ = velocity_loss(model, conditions, unconditional, tokens, grid, draws, Kept(others, untouched))
    torch.testing.assert_close(loss.double(), plain, rtol=1e-5, atol=0)
    for found, gradient in zip(torch.autograd.grad(loss, list(layer.parameters())), expected):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_a_pass_that_keeps_nothing_runs_the_untouched_model_where_others_may():
    """Processes that hold parts of the weights run it together; without a kept picture the loss is the same."""
    model, grid, conditions, unconditional = load("t2i_p16")
    tokens = random_tokens(grid, model.config.head.bits)
    draws = Draws.make(tokens.shape, Corruption(keep=0.0), 1.0, torch.Generator().manual_seed(3))
    runs = []

    @contextmanager
    def untouched():
        runs.append(1)
        yield

    plain, apart, in_step = (
        velocity_loss(model, conditions, unconditional, tokens, grid, draws, keeping)[0]
        for keeping in (None, Kept(conditions, untouched), Kept(conditions, untouched, in_step=True))
    )
    assert len(runs) == 1 and plain == apart == in_step


@pytest.mark.parametrize("name", KINDS)
def test_training_sees_what_sampling_sees(name):
    """One pass over whole pictures gives the conditioning that the engine computes patch by patch."""
    model, grid, conditions, _ = load(name)
    tokens = random_tokens(grid, model.config.head.bits)
    at_once = hidden_states(model, conditions, tokens, grid)
    for row, condition in enumerate(conditions):
        branch = [condition] if isinstance(condition, int) else condition
        reader = model.reader([branch], 1, grid, grid.num_patches, "cpu", torch.float64)
        with torch.no_grad():
            hidden = [reader.prefill()]
            for i in range(grid.num_patches - 1):
                hidden.append(reader.read(tokens[row : row + 1, i : i + 1], i))
            patch_by_patch = torch.stack(hidden, dim=1)[0] + reader.positions
        torch.testing.assert_close(at_once[row], patch_by_patch, rtol=0, atol=1e-9)


def test_no_patch_sees_itself_or_a_later_one():
    model, grid, conditions, _ = load("t2i_p16")
    tokens = random_tokens(grid, model.config.head.bits)
    changed = tokens.clone()
    changed[:, 2] *= -1
    before, after = hidden_states(model, conditions, tokens, grid), hidden_states(model, conditions, changed, grid)
    assert torch.equal(before[:, :3], after[:, :3]) and not torch.equal(before[:, 3], after[:, 3])


def test_the_mask_of_padded_rows():
    mask = block_causal_mask(7, 3, 2, torch.tensor([[0], [2]]), "cpu")
    expected = ["1000000", "1100000", "1110000", "1111100", "1111100", "1111111", "1111111"]
    assert ["".join(str(int(x)) for x in row) for row in mask[0, 0]] == expected
    padded = ["1000000", "0100000", "0010000", "0011100", "0011100", "0011111", "0011111"]
    assert ["".join(str(int(x)) for x in row) for row in mask[1, 0]] == padded


def test_the_share_of_disturbed_bits_and_conditions():
    draws = draw(torch.zeros(4000, 1, 8, 16), Corruption())
    assert abs(float(draws.flipped.float().mean()) - 0.05) < 0.002
    assert abs(float(draws.dropped.float().mean()) - 0.1) < 0.02
    logit = torch.logit(draws.t)
    assert abs(float(logit.mean()) + 0.8) < 0.05 and abs(float(logit.std()) - 0.8) < 0.05
    assert abs(float(draws.noise.std()) - 1) < 0.01 and abs(float(draws.noise.mean())) < 0.01


def test_times_are_shifted_as_in_the_sampler():
    plain, shifted = (draw(torch.zeros(4, 2, 3, 5), Corruption(), shift).t for shift in (1.0, 3.0))
    torch.testing.assert_close(torch.logit(shifted), torch.logit(plain) - math.log(3), rtol=1e-4, atol=1e-4)


def test_parts_of_the_draws_give_the_mean():
    model, grid, conditions, unconditional = load("t2i_p64")
    tokens = random_tokens(grid, model.config.head.bits, 2)
    draws = draw(tokens, Corruption())
    whole, _ = velocity_loss(model, conditions[:2], unconditional, tokens, grid, draws)
    parts = [
        velocity_loss(model, conditions[i : i + 1], unconditional, tokens[i : i + 1], grid, draws.rows(slice(i, i + 1)))
        for i in range(2)
    ]
    torch.testing.assert_close(sum(loss for loss, _ in parts) / 2, whole, rtol=1e-5, atol=0)
