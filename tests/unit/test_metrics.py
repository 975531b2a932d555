"""PSNR, SSIM and bits per pixel against their formulas, written out."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from bitdance_core.bits.metrics import Reconstruction, bits_per_pixel, mean, measure, psnr, ssim
from bitdance_core.errors import BitDanceError
from paths import ROOT


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def direct_ssim(a, b):
    """Equation 13 of Wang et al. 2004 in every 11x11 window that lies inside, Gaussian weights of deviation 1.5."""
    weights = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = np.outer(weights, weights)
    weights /= weights.sum()
    windows = [np.lib.stride_tricks.sliding_window_view(x.double().numpy(), (11, 11), axis=(1, 2)) for x in (a, b)]

    def average(x):
        return (x * weights).sum((-2, -1))

    (mean_a, mean_b), (var_a, var_b) = zip(*((average(x), average(x**2) - average(x) ** 2) for x in windows))
    covariance = average(windows[0] * windows[1]) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean()


def test_psnr_of_a_known_offset():
    a = images(2, 3, 16, 20) * 0.5
    b = a + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    assert psnr(a, b) == pytest.approx([20, 40], abs=1e-3)
    assert psnr(torch.zeros(3, 1, 1), torch.ones(3, 1, 1)) == [0]


def test_psnr_of_random_images():
    a, b = images(3, 12, 13), images(3, 12, 13, seed=1)
    assert psnr(a, b) == pytest.approx([-10 * math.log10((a - b).square().mean().item())], abs=1e-5)


def test_equal_images():
    a = images(2, 3, 16, 20)
    assert psnr(a, a.clone()) == [math.inf, math.inf] and ssim(a, a.clone()) == pytest.approx([1, 1])


@pytest.mark.parametrize("size", [(11, 11), (24, 17)])
def test_ssim_is_the_papers(size):
    a = images(2, 3, *size)
    b = (0.7 * a + 0.3 * images(2, 3, *size, seed=1)).clamp(0, 1)
    expected = [direct_ssim(*pair) for pair in zip(a, b)]
    assert ssim(a, b) == pytest.approx(expected, abs=1e-9) and 0.5 < expected[0] < 0.98
    assert ssim(a[0], b[0]) == pytest.approx(expected[:1], abs=1e-9)


def test_other_precisions_are_taken():
    a, b = images(3, 16, 16), images(3, 16, 16, seed=1)
    for dtype in (torch.float16, torch.bfloat16):
        assert psnr(a.to(dtype), b.to(dtype)) == pytest.approx(psnr(a, b), abs=0.05)
        assert ssim(a.to(dtype), b.to(dtype)) == pytest.approx(ssim(a, b), abs=0.01)


@pytest.mark.parametrize(("channels", "downscale", "expected"), [(32, 16, 0.125), (32, 8, 0.5), (256, 32, 0.25)])
def test_bits_per_pixel(channels, downscale, expected):
    assert bits_per_pixel(channels, downscale) == expected


def test_figures_and_their_means():
    a = images(2, 3, 16, 16) * 0.5
    b = a + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    parts = measure(a, b, 0.5)
    assert [part.psnr for part in parts] == psnr(a, b) and [part.ssim for part in parts] == ssim(a, b)
    both = mean(parts)
    assert both.psnr == pytest.approx(30, abs=1e-3) and both.bits_per_pixel == 0.5
    assert str(Reconstruction(24.9, 0.72, 0.125)) == "PSNR 24.90 dB, SSIM 0.7200, 0.125 bits per pixel"
    assert str(Reconstruction(math.inf, 1.0, 0.0)) == "PSNR inf dB, SSIM 1.0000"


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ((3, 10, 30), (3, 10, 30), r"11x11 pixels, found 30x10 \(width x height\)"),
        ((3, 16, 16), (3, 16, 17), r"found \("),
        ((1, 16, 16), (1, 16, 16), r"found \("),
        ((2, 3, 16, 16), (1, 3, 16, 16), r"found \("),
        ((16, 16), (16, 16), r"found \("),
    ],
)
def test_what_cannot_be_compared(a, b, words):
    with pytest.raises(BitDanceError, match=words):
        ssim(torch.zeros(a), torch.zeros(b))


def test_scikit_image_is_imported_only_to_measure():
    code = "import bitdance_core.bits.metrics, bitdance_core.cli, sys; sys.exit('skimage' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_scikit_image_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(BitDanceError, match="pip install scikit-image"):
        psnr(torch.zeros(3, 16, 16), torch.zeros(3, 16, 16))
