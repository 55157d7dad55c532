"""A slide that was answered, without network or file: an ellipse of tissue, a lesion in it, shares that know where it lies."""

import numpy as np
from PIL import Image, ImageDraw

from pipeline.slides import deletion
from pipeline.slides.result import Frame, Origin, SlideResult, TopTile, ranked

LESION_UM = (3300.0, 1500.0, 420.0)
"""x, y and radius."""


def a_result(
    size_um: tuple[float, float] = (5000.0, 3100.0),
    step_um: float = 112.0,
    tile_um: float = 112.0,
    lesion_um: tuple[float, float, float] = LESION_UM,
    **more: object,
) -> SlideResult:
    """Sums are as they must be; every number is known."""
    picture, tissue = _drawn(size_um, lesion_um)
    columns, rows = (int((side - tile_um) // step_um) + 1 for side in size_um)
    grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2)
    middle = (grid * step_um + tile_um / 2) / size_um - 0.5
    grid = grid[(middle**2).sum(axis=1) < 0.19]
    positions = grid * step_um
    away = np.hypot(*(positions + tile_um / 2 - lesion_um[:2]).T)
    rng = np.random.default_rng(3)
    tumour = np.where(away < lesion_um[2], 0.12 * np.exp(-((away / lesion_um[2]) ** 2)), -0.0012)
    tumour = tumour + rng.normal(0, 0.0006, len(grid))
    shares = np.stack([-0.8 * tumour, tumour], axis=1)
    rest = np.array([0.25, -0.4])
    logits = rest + shares.sum(axis=0)
    attention = np.exp(20 * tumour) / np.exp(20 * tumour).sum()
    temperature = 1.3
    calibrated = logits / temperature
    first, last = ranked(shares[:, 1], 12)
    made: dict = {
        "frame": Frame(
            slide_id="slide_07", size_um=size_um, size_px=(round(size_um[0] * 4), round(size_um[1] * 4)),
            microns_per_pixel=(0.25, 0.25), resolution_from="file", sha256="cd" * 32,
        ),
        "origin": Origin(
            package_name="phantoms", package_id="ab" * 32, network="mil_acmil", members=5, temperature=temperature,
            encoder="hilum_texture", encoder_sha256="ef" * 32, tile_px=224, scores={"macro AUROC": "0.950 (0.881 to 0.990)"},
        ),
        "overview": picture, "tissue": tissue, "tissue_um": 8.0, "tile_um": tile_um, "step_um": step_um,
        "positions_um": positions.astype(float),
        "grid": grid, "tissue_share": rng.uniform(0.5, 1, len(grid)).astype(np.float32), "classes": ("normal", "tumour"),
        "predicted": 1, "logits": logits, "probabilities": np.exp(calibrated) / np.exp(calibrated).sum(), "shares": shares,
        "rest": rest, "attention": attention, "entropy": 0.8,
        "deletion": deletion.judge(
            shares[:, 1], lambda kept: (rest + shares[kept].sum(axis=0)) / temperature, predicted=1, seed=0
        ),
    }  # fmt: skip
    made |= more
    made.setdefault("top", tuple(_tile(n, i, picture, positions[i], size_um, tile_um) for n, i in enumerate(first, 1)))
    made.setdefault(
        "against", tuple(_tile(n, i, picture, positions[i], size_um, tile_um) for n, i in enumerate(last[:6], 1))
    )
    return SlideResult(**made)


def _drawn(size_um: tuple[float, float], lesion_um: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Eight micrometres to a pixel."""
    size = tuple(max(1, round(side / 8)) for side in size_um)
    tissue = Image.new("L", size)
    ImageDraw.Draw(tissue).ellipse((0.03 * size[0], 0.03 * size[1], 0.97 * size[0], 0.97 * size[1]), fill=255)
    slide = Image.new("RGB", size, (244, 242, 245))
    slide.paste((226, 168, 202), mask=tissue)
    x, y, radius = lesion_um
    ImageDraw.Draw(slide).ellipse(
        [(x - radius) / 8, (y - radius) / 8, (x + radius) / 8, (y + radius) / 8], (128, 78, 150)
    )
    noise = np.random.default_rng(1).normal(0, 9, (size[1], size[0], 3))
    return np.clip(np.asarray(slide) + noise, 0, 255).astype(np.uint8), np.asarray(tissue) > 0


def _tile(
    rank: int, index: int, picture: np.ndarray, at: np.ndarray, size_um: tuple[float, float], tile_um: float
) -> TopTile:
    whole = Image.fromarray(picture)
    x, y = at / size_um * whole.size
    wide, high = tile_um / np.array(size_um) * whole.size
    cut = whole.resize(
        (224, 224), Image.Resampling.BILINEAR, box=(x, y, min(whole.width, x + wide), min(whole.height, y + high))
    )
    return TopTile(rank=rank, index=int(index), picture=np.asarray(cut))
