"""The encoder that needs no weights: how much of each stain a tile has, and how it is spread, octave by octave.

    density  = -log10((rgb + 1) / 256)                                           light that did not come through
    stains   = density · inverse of (haematoxylin, eosin, the rest)              Ruifrok & Johnston 2001
    per octave, from 2 x 2 blocks a b / c d:  h = a - b + c - d,  v = a + b - c - d,  x = a - b - c + d   (all halved)

It separates what looks different. It knows nothing of what matters, and is there to try hilum with.
"""

import hashlib

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

OCTAVES = 5
"""Details of 1 to 16 pixels: at 0.5 µm, from chromatin (0.5 µm) to glands (16 µm)."""
BINS = 8
"""Of the histogram of each stain."""
DIMENSIONS = 3 * (2 + BINS) + OCTAVES * (3 * 4 + 2 + 1)
LEAST_PX = 2**OCTAVES
SHA256 = hashlib.sha256(b"hilum_texture 1").hexdigest()
"""The number is raised whenever the same tile would get other features."""

HAEMATOXYLIN, EOSIN = (0.650, 0.704, 0.286), (0.072, 0.990, 0.105)
"""Optical density in red, green, blue; Ruifrok & Johnston 2001."""
MOST = 1.5
"""Upper end of the histograms: densities above it are folds and ink."""
MOST_NUMBER = 8.0
"""No number is larger: a tile of ink must not outweigh a slide of tissue."""
FAINT = 1e-3
"""Added to energies before their logarithm: what a byte's rounding leaves in a blank tile."""


def describe(tiles: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
    """Numbers of about zero mean and unit spread over stained tissue."""
    # a few at a time: what is made of them on the way stays in the processor's cache
    return torch.cat([_of_stains(_stains(some)) for some in tiles.split(8)])


def _stains(tiles: Tensor) -> Tensor:
    """Density of haematoxylin, of eosin and of neither, each [b h w]."""
    density = -torch.log10((tiles.contiguous().float() + 1) / 256)
    return (_unmixing().to(tiles.device).T @ density.flatten(2)).view(density.shape)


def _unmixing() -> Tensor:
    first, second = (torch.nn.functional.normalize(torch.tensor(stain), dim=0) for stain in (HAEMATOXYLIN, EOSIN))
    third = torch.nn.functional.normalize(torch.linalg.cross(first, second), dim=0)
    return torch.linalg.inv(torch.stack([first, second, third]))


def _of_stains(stains: Tensor) -> Tensor:
    found = [(_mean(stains) - 0.3) * 4, _logarithm(_spread(stains))]
    for octave in range(OCTAVES):
        stains, details = _octave(stains)
        found += details + (_histogram(stains) if octave == 0 else [])  # of pixels twice as wide: a quarter of the work
    return torch.cat(found, dim=1).clamp(-MOST_NUMBER, MOST_NUMBER)


def _octave(stains: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The stains at half the resolution, and what was lost on the way there."""
    height, width = (side // 2 * 2 for side in stains.shape[-2:])
    upper, lower = stains[..., 0:height:2, :width], stains[..., 1:height:2, :width]
    both, change = (upper + lower) / 2, (upper - lower) / 2  # rows before columns: rows lie side by side in memory
    across, cross = both[..., 0::2] - both[..., 1::2], change[..., 0::2] - change[..., 1::2]
    coarse, down = (both[..., 0::2] + both[..., 1::2]) / 2, change[..., 0::2] + change[..., 1::2]
    edges = across**2 + down**2  # the same whatever way the tile is turned
    strength = torch.sqrt(edges)
    one_way = torch.hypot(_mean(across**2 - down**2), 2 * _mean(across * down))[:, :2] / (
        _mean(edges)[:, :2] + FAINT**2
    )
    together = _mean(across[:, :2].prod(1, keepdim=True) + down[:, :2].prod(1, keepdim=True))
    either = torch.sqrt(_mean(edges)[:, :1] * _mean(edges)[:, 1:2]) + FAINT**2
    return coarse, [
        _logarithm(_mean(strength)),
        _logarithm(_spread(strength)),
        _logarithm(_mean(cross.abs())),
        _logarithm(_spread(coarse)),
        one_way * 4 - 1,
        together / either * 2,
    ]


def _histogram(stains: Tensor) -> list[Tensor]:
    """Shares of pixels around each density; a pixel between two centres counts for both."""
    step = MOST / (BINS - 1)
    places = (stains / step).clamp(0, BINS - 1)
    return [_mean((1 - (places - centre).abs()).clamp(min=0)) * 4 - 0.5 for centre in range(BINS)]


def _mean(values: Tensor) -> Tensor:
    return values.mean(dim=(-2, -1))


def _spread(values: Tensor) -> Tensor:
    return (_mean(values**2) - _mean(values) ** 2).clamp(min=0).sqrt()


def _logarithm(energies: Tensor) -> Tensor:
    return (torch.log10(energies + FAINT) + 1.5) * 2
