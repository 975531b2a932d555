"""The noise of a batch: one stream in golden order, or one for each image's index, which its batch does not change."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import golden
from bitdance_core.bits.edits import vary
from bitdance_core.model.grid import Grid
from bitdance_core.sampling.flow import plan_noise
from bitdance_core.sampling.generate import generate
from bitdance_core.sampling.noise import NoiseSource, indexed_seed
from bitdance_core.sampling.plan import Request
from bitdance_core.sampling.settings import Sampling
from requests_of import branches_of


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def drawn(indices, rows=None, seed=7, patches=3):
    """Three patches' noise, each [draws, rows, P, C]."""
    source = NoiseSource(seeded(seed), indices)
    return [source.draw((rows or len(indices), 4, 8), draws=2 + patch) for patch in range(patches)]


def test_an_ordinary_batch_keeps_the_golden_order():
    source, generator = NoiseSource(seeded()), seeded()
    for draws in (3, 1, 2):
        assert source.draw((4, 16, 8), draws).equal(plan_noise((4, 16, 8), draws, generator))


@given(indices=st.lists(st.integers(0, 2**40), min_size=1, max_size=6), seed=st.integers(0, 2**64 - 1))
def test_an_images_noise_is_the_same_in_any_batch(indices, seed):
    batch = drawn(indices, seed=seed)
    for row, index in enumerate(indices):
        for part, alone in zip(batch, drawn([index], seed=seed)):
            assert part[:, row : row + 1].equal(alone)


def test_different_indices_and_seeds_have_different_noise():
    (first, *_), (other, *_) = drawn(range(64), patches=1), drawn(range(64), seed=8, patches=1)
    flat = torch.cat((first, other), dim=1).movedim(1, 0).flatten(1)
    assert len(flat.unique(dim=0)) == 128
    assert len({indexed_seed(seed, index) for seed in range(50) for index in range(50)}) == 2500


def test_index_0_is_the_image_that_is_drawn_alone():
    alone, generator = drawn([0]), seeded()
    for part, draws in zip(alone, (2, 3, 4)):
        assert part.equal(plan_noise((1, 4, 8), draws, generator))


def test_branches_that_draw_for_themselves_have_an_images_noise_each():
    """Rows are both images of one branch, then both of the other."""
    both = drawn([3, 5], rows=4)
    for column, index in enumerate((3, 5)):
        for part, alone in zip(both, drawn([index], rows=2)):
            assert part[:, [column, column + 2]].equal(alone)


@pytest.fixture(scope="module")
def pipe64():
    """In float64, where batches of other sizes round differently too, but never enough to turn a bit."""
    return golden.load("t2i_p16", torch.float64).pipe


@pytest.mark.parametrize("sampling", [Sampling("euler_maruyama", 2, 3.0), Sampling("euler", 2, 1.0)])
def test_a_picture_of_a_batch_can_be_drawn_alone(pipe64, sampling):
    grid = Grid(8, 12, 4)
    branches = branches_of(pipe64, grid, "a cat", sampling.guidance)

    def draw(*indices):
        request = Request(branches, grid, sampling, len(indices), indices=indices)
        return generate(pipe64.model, request, seeded(), "cpu", torch.float64)

    batch = draw(0, 1, 2, 3)
    assert len({picture.numpy().tobytes() for picture in batch}) == 4
    assert draw(2).equal(batch[2:3]) and draw(3, 1).equal(batch[[3, 1]])
    assert draw(1, 1, 1).equal(batch[[1, 1, 1]])
    alone = generate(pipe64.model, Request(branches, grid, sampling, 1), seeded(), "cpu", torch.float64)
    assert alone.equal(batch[:1])


def test_a_picture_of_a_batch_is_varied_alike_alone():
    bits = torch.rand(4, 8, 6, 6, generator=seeded()) > 0.5
    batch = vary(bits, 0.3, seeded())
    for indices in ([2], [3, 1], [0, 1, 2, 3]):
        assert vary(bits[indices], 0.3, seeded(), indices).equal(batch[indices])
    same = vary(bits[:1].expand(3, -1, -1, -1), 0.3, seeded(), [5, 5, 5])
    assert same[0].equal(same[1]) and same[0].equal(same[2]) and not same[0].equal(bits[0])
