"""Read a picture of drawings back: which ground, which things, how large and where. Sees pixels and drawings alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from builtin.scenes.compose import SIDE
from builtin.scenes.grounds import ALL_GROUNDS, Ground, paint_ground

READ_SIDE = 64  # pictures are read at this many pixels of their shorter side
SIDES = (25, 27, 29, 46, 49, 52)  # of a thing, at READ_SIDE
LARGE = 37  # from this side on a thing is large
MOST = 6  # things of a picture
LEAST = 0.5  # of a drawing's strength: what is paler than that is not there
FAINT = 3.0  # squared difference, summed, below which a drawing cannot be seen
NEEDED = 13.0, 0.2  # what a drawing alone must explain: so much, and a share of its difference from the ground
NEAR = 11  # pixels at READ_SIDE: closer, two middles are one thing's
RING = 4  # pixels of the margin that the ground is read from
FAR = 0.03  # squared distance of a colour from which it is another one


@dataclass(frozen=True)
class Found:
    """A thing with its middle (x, y) in shares of the picture's width and height."""

    name: str
    x: float
    y: float
    is_large: bool


@dataclass(frozen=True)
class Match:
    """A template with its upper left corner, in pixels at READ_SIDE, and how strongly it shows, in (0, 1]."""

    template: int
    x: int
    y: int
    strength: float


@dataclass(frozen=True)
class Reading:
    ground: Ground
    found: tuple[Found, ...]

    def count(self, name: str) -> int:
        return sum(thing.name == name for thing in self.found)


def shrink(pixels: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> float32 [3, h, w] in [0, 1], the shorter side READ_SIDE."""
    height, width = pixels.shape[:2]
    scale = READ_SIDE / min(height, width)
    small = Image.fromarray(pixels).resize((round(width * scale), round(height * scale)), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).float() / 255


class Reader:
    """Finds drawings one after the other, each time the one that explains most of what is not explained yet."""

    def __init__(self, art: dict[str, Image.Image]) -> None:
        self.templates = [(name, side, self._drawing(art[name], side)) for name in art for side in SIDES]
        self.of_side = {side: torch.tensor([own == side for _, own, _ in self.templates]) for side in SIDES}
        self.spectra = lru_cache(maxsize=3)(self._spectra)
        self.grounds = lru_cache(maxsize=3)(self._grounds)

    @staticmethod
    def _drawing(drawing: Image.Image, side: int) -> Tensor:
        """[4, side, side] in [0, 1]: colours and opacity."""
        small = drawing.resize((2 * side, 2 * side), Image.Resampling.LANCZOS).reduce(2)
        return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).float() / 255

    def _spectra(self, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of all templates: kernels' conjugate spectra [N, 8, h, w'], sums of squares [N], corners inside [N, h, w]."""
        kernels = torch.zeros(len(self.templates), 8, height, width)
        squares = torch.zeros(len(self.templates))
        allowed = torch.zeros(len(self.templates), height, width, dtype=torch.bool)
        for index, (_, side, drawing) in enumerate(self.templates):
            colour, alpha = drawing[:3], drawing[3:]
            # of sum |a (T - G)|^2 and 2 a (T - G) D; T colours, a opacity, G what is behind, D what is not explained
            parts = torch.cat((alpha * colour, alpha, alpha**2 * colour, alpha**2))
            kernels[index, :, :side, :side] = parts
            squares[index] = (alpha * colour).square().sum()
            allowed[index, : height - side + 1, : width - side + 1] = True
        return torch.fft.rfft2(kernels).conj(), squares, allowed

    def _forbid(self, allowed: Tensor, x: float, y: float) -> None:
        """No further drawing may have its middle near (x, y)."""
        rows, columns = torch.arange(allowed.shape[1])[:, None], torch.arange(allowed.shape[2])
        for side in SIDES:
            near = (rows + side / 2 - y) ** 2 + (columns + side / 2 - x) ** 2 < NEAR**2
            allowed[self.of_side[side]] &= ~near

    def _grounds(self, height: int, width: int) -> Tensor:
        scale = SIDE // READ_SIDE
        return torch.stack([shrink(paint_ground(g, height * scale, width * scale)) for g in ALL_GROUNDS])

    def read_ground(self, picture: Tensor) -> int:
        """The index of the nearest of ALL_GROUNDS along the margin, whatever covers parts of it."""
        difference = (self.grounds(*picture.shape[1:]) - picture).square().sum(1)  # [grounds, h, w]
        inside = torch.zeros(picture.shape[1:], dtype=torch.bool)
        inside[RING:-RING, RING:-RING] = True
        return int(difference[:, ~inside].clamp_max(FAR).mean(1).argmin())

    def read(self, pixels: np.ndarray) -> Reading:
        """uint8 [H, W, 3] -> what it shows."""
        picture = shrink(pixels)
        height, width = picture.shape[1:]
        spectra, squares, allowed = self.spectra(height, width)
        index = self.read_ground(picture)
        behind = self.grounds(height, width)[index].clone()
        ground, found, allowed = behind.clone(), [], allowed.clone()
        while len(found) < MOST:
            rest = picture - behind
            maps = torch.cat((2 * rest, -2 * (behind * rest).sum(0, keepdim=True),
                              2 * behind, -behind.square().sum(0, keepdim=True)))  # fmt: skip
            transformed = torch.fft.rfft2(maps)
            visible = torch.fft.irfft2((spectra[:, 4:] * transformed[4:]).sum(1), s=(height, width))
            energy = squares[:, None, None] - visible  # sum |a (T - G)|^2
            likeness = torch.fft.irfft2((spectra[:, :4] * transformed[:4]).sum(1), s=(height, width)) / 2
            strength = (likeness / energy.clamp_min(FAINT)).clamp(0, 1)
            gain = strength * (2 * likeness - strength * energy)  # what it explains at this strength
            gain[~allowed | (strength < LEAST) | (energy < FAINT)] = -1
            best = int((gain * strength.square()).argmax())  # much, and most of its own
            if gain.flatten()[best] <= 0:
                break
            template, corner = divmod(best, height * width)
            y, x = divmod(corner, width)
            side = self.templates[template][1]
            self._forbid(allowed, x + side / 2, y + side / 2)
            found.append(Match(template, x, y, strength.flatten()[best].item()))
            self._paint(behind, found[-1])
        needed = self._needed(picture, ground, found)
        return Reading(ALL_GROUNDS[index], tuple(self._place(match, height, width) for match in needed))

    def _paint(self, behind: Tensor, match: Match) -> None:
        _, side, drawing = self.templates[match.template]
        window = behind[:, match.y : match.y + side, match.x : match.x + side]
        window += match.strength * drawing[3:] * (drawing[:3] - window)

    def _needed(self, picture: Tensor, ground: Tensor, found: list[Match]) -> list[Match]:
        """Those without which the whole explains the picture clearly less: a large drawing may have hidden several
        small ones until these were found, and a stripe of a tiger may look like lightning.
        """

        def error(matches: list[Match]) -> float:
            painted = ground.clone()
            for match in matches:
                self._paint(painted, match)
            return (picture - painted).square().sum().item()

        for match in list(found):
            others = [other for other in found if other is not match]
            if error(others) < error(found) + max(NEEDED[0], NEEDED[1] * self._difference(ground, match)):
                found = others
        return found

    def _difference(self, ground: Tensor, match: Match) -> float:
        """The squared difference that a drawing makes on the bare ground, summed."""
        _, side, drawing = self.templates[match.template]
        window = ground[:, match.y : match.y + side, match.x : match.x + side]
        return (drawing[3:] * (drawing[:3] - window)).square().sum().item()

    def _place(self, match: Match, height: int, width: int) -> Found:
        name, side, _ = self.templates[match.template]
        return Found(name, (match.x + side / 2) / width, (match.y + side / 2) / height, side >= LARGE)
