import torch
from hypothesis import given
from hypothesis import strategies as st

from bitdance_core.model.binarize import binarize, pack, unpack
from bitdance_core.model.grid import Grid

grids = st.builds(
    lambda rows, columns, p: Grid(rows * p, columns * p, p), st.integers(1, 5), st.integers(1, 5), st.integers(1, 8)
)


def random_bits(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5


def test_zero_is_minus_one():
    assert binarize(torch.tensor([-2.0, -0.0, 0.0, 1e-30, 3.0])).tolist() == [-1, -1, -1, 1, 1]
    assert binarize(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.bfloat16


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))
def test_pack_round_trip(n, channels, height, width, seed):
    bits = random_bits((n, channels, height, width), seed)
    packed = pack(bits)
    assert packed.dtype == torch.uint8 and packed.shape == (n, -(-channels * height * width // 8))
    assert torch.equal(unpack(packed, (channels, height, width)), bits)


def test_a_megapixel_is_16_kib():
    assert pack(random_bits((1, 32, 64, 64), 0)).numel() == 16 * 1024


@given(grids, st.integers(1, 3), st.integers(1, 5))
def test_patch_order_round_trip(grid, batch, channels):
    x = torch.arange(batch * channels * grid.height * grid.width).view(batch, channels, grid.height, grid.width)
    patches = grid.patchify(x)
    assert patches.shape == (batch, grid.num_patches, grid.tokens_per_patch, channels)
    assert torch.equal(grid.unpatchify(patches), x)
    for i in range(grid.num_patches):
        assert torch.equal(patches[:, i], x[:, :, *grid.window(i)].flatten(2).transpose(1, 2))


def test_patch_order_is_raster_in_raster():
    x = torch.arange(4 * 6).view(1, 1, 4, 6)
    assert Grid(4, 6, 2).patchify(x)[0, :2, :, 0].tolist() == [[0, 1, 6, 7], [2, 3, 8, 9]]


@given(grids)
def test_positions_hold_the_column_first(grid):
    positions = grid.unpatchify(grid.positions(8)[None])[0]  # [8, h, w]
    rows, columns = torch.arange(grid.height).float(), torch.arange(grid.width).float()
    torch.testing.assert_close(positions[0], columns.sin().expand(grid.height, -1))
    torch.testing.assert_close(positions[4], rows.sin()[:, None].expand(-1, grid.width))
