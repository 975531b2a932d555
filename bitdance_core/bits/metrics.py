"""How much of an image a reconstruction keeps: PSNR, SSIM, and the bits that it takes.

scikit-image is imported where it is used: ComfyUI does not bring it, and nothing else needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from statistics import fmean
from types import ModuleType

from torch import Tensor

from ..errors import BitDanceError

SSIM_WINDOW = 11  # pixels: the side of the windows that SSIM compares
# windows as in Wang et al. 2004
SSIM_SETTINGS = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}


@dataclass(frozen=True)
class Reconstruction:
    """One image's figures: PSNR in dB, infinite where nothing differs; SSIM up to 1; bits a pixel, 0: not known."""

    psnr: float
    ssim: float
    bits_per_pixel: float

    def __str__(self) -> str:
        bits = f", {self.bits_per_pixel:.4g} bits per pixel" if self.bits_per_pixel else ""
        return f"PSNR {self.psnr:.2f} dB, SSIM {self.ssim:.4f}{bits}"


def psnr(a: Tensor, b: Tensor) -> list[float]:
    """Peak signal-to-noise ratio in dB of images (3, H, W) or (B, 3, H, W) in [0, 1], for each; inf: they are equal."""
    theirs = _scikit_image()

    def compare(a, b) -> float:
        # theirs divides by 0 for equal images
        return float("inf") if (a == b).all() else float(theirs.peak_signal_noise_ratio(a, b, data_range=1))

    return _each(compare, a, b)


def ssim(a: Tensor, b: Tensor) -> list[float]:
    """Structural similarity (Wang et al. 2004), the mean over red, green and blue, of images as for `psnr`."""
    theirs = _scikit_image()
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise BitDanceError(
            f"SSIM needs images of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, found {a.shape[-1]}x{a.shape[-2]}"
        )

    def compare(a, b) -> float:
        return float(theirs.structural_similarity(a, b, data_range=1, channel_axis=0, **SSIM_SETTINGS))

    return _each(compare, a, b)


def bits_per_pixel(channels: int, downscale: float) -> float:
    """Of a tokenizer with `channels` bits for `downscale` x `downscale` pixels."""
    return channels / downscale**2


def measure(original: Tensor, result: Tensor, bits: float) -> list[Reconstruction]:
    """Each image's figures; images as for `psnr`, `bits` for each pixel."""
    return [Reconstruction(p, s, bits) for p, s in zip(psnr(original, result), ssim(original, result))]


def mean(parts: Sequence[Reconstruction]) -> Reconstruction:
    """Every figure's mean over images."""
    return Reconstruction(*map(fmean, zip(*map(astuple, parts))))


def _scikit_image() -> ModuleType:
    try:
        import skimage.metrics
    except ImportError as error:
        raise BitDanceError("measuring needs scikit-image: `pip install scikit-image` into this Python") from error
    return skimage.metrics


def _each(compare: Callable[..., float], a: Tensor, b: Tensor) -> list[float]:
    """What `compare` says of each pair of images, given as float64 arrays: float32 would lose small differences."""
    if a.shape != b.shape or a.ndim not in (3, 4) or a.shape[-3] != 3:
        found = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise BitDanceError(f"only images of one size can be compared, (3, H, W) or (B, 3, H, W); found {found}")
    pairs = (images.reshape(-1, *images.shape[-3:]).cpu().double().numpy() for images in (a, b))
    return [compare(*pair) for pair in zip(*pairs)]
