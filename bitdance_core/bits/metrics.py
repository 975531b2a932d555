"""Measure the quality of reconstructions: PSNR, SSIM and bits per pixel.

scikit-image is imported on first use: it is not among ComfyUI's packages, and only this module needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from statistics import fmean
from types import ModuleType

from torch import Tensor

from ..errors import BitDanceError

SSIM_WINDOW = 11  # side of the windows that SSIM compares, in pixels
# windows as in Wang et al. 2004
SSIM_SETTINGS = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}


@dataclass(frozen=True)
class Reconstruction:
    """Metrics of one image: PSNR in dB (inf for equal images), SSIM (at most 1), bits per pixel (0: unknown)."""

    psnr: float
    ssim: float
    bits_per_pixel: float

    def __str__(self) -> str:
        bits = f", {self.bits_per_pixel:.4g} bits per pixel" if self.bits_per_pixel else ""
        return f"PSNR {self.psnr:.2f} dB, SSIM {self.ssim:.4f}{bits}"


def psnr(a: Tensor, b: Tensor) -> list[float]:
    """Compute the peak signal-to-noise ratio in dB of each pair of images, (3, H, W) or (B, 3, H, W) in [0, 1].

    Equal images give inf. Raises BitDanceError for images of different shapes.
    """
    skimage_metrics = _scikit_image()

    def compare(a, b) -> float:
        # scikit-image divides by 0 for equal images
        return float("inf") if (a == b).all() else float(skimage_metrics.peak_signal_noise_ratio(a, b, data_range=1))

    return _each(compare, a, b)


def ssim(a: Tensor, b: Tensor) -> list[float]:
    """Compute the structural similarity (Wang et al. 2004), mean over the channels; images as for `psnr`.

    Raises BitDanceError for images smaller than the window of 11x11 pixels.
    """
    skimage_metrics = _scikit_image()
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise BitDanceError(
            f"SSIM needs images of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, "
            f"found {a.shape[-1]}x{a.shape[-2]} (width x height)"
        )

    def compare(a, b) -> float:
        return float(skimage_metrics.structural_similarity(a, b, data_range=1, channel_axis=0, **SSIM_SETTINGS))

    return _each(compare, a, b)


def bits_per_pixel(channels: int, downscale: float) -> float:
    """Return the bits per pixel of a tokenizer with `channels` bits for `downscale` x `downscale` pixels."""
    return channels / downscale**2


def measure(original: Tensor, result: Tensor, bits: float) -> list[Reconstruction]:
    """Compute the metrics of each image; images as for `psnr`, `bits` per pixel."""
    return [Reconstruction(p, s, bits) for p, s in zip(psnr(original, result), ssim(original, result))]


def mean(parts: Sequence[Reconstruction]) -> Reconstruction:
    """Average each metric over images."""
    return Reconstruction(*map(fmean, zip(*map(astuple, parts))))


def _scikit_image() -> ModuleType:
    try:
        import skimage.metrics
    except ImportError as error:
        raise BitDanceError("measuring needs scikit-image: run `pip install scikit-image` in this Python") from error
    return skimage.metrics


def _each(compare: Callable[..., float], a: Tensor, b: Tensor) -> list[float]:
    """Apply `compare` to each pair of images as float64 arrays: float32 would lose small differences."""
    if a.shape != b.shape or a.ndim not in (3, 4) or a.shape[-3] != 3:
        found = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise BitDanceError(f"images to compare must have the same shape, (3, H, W) or (B, 3, H, W); found {found}")
    pairs = (images.reshape(-1, *images.shape[-3:]).cpu().double().numpy() for images in (a, b))
    return [compare(*pair) for pair in zip(*pairs)]
