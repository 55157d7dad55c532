"""heatmap.png: the slide as it is, and beside it what every tile adds to the prediction, with words for both. And the top tiles."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from scipy import ndimage

from ..outputs import _rows
from ..outputs._drawing import (
    ALARM,
    GAP,
    INK,
    INNER,
    LINE,
    QUIET,
    blank_row,
    fitting,
    folded,
    scale_bar,
    side_by_side,
    stacked,
    width_of,
    write,
)
from ..outputs._heat import CLEAR_BELOW, opacity
from ..report import hilum_version
from .deletion import FAILED, UNTESTED
from .heatmap import HeatMap, colours, grey, resized, shown_on
from .result import Seen, SlideResult, TopTile, probability

PICTURE = "heatmap.png"
SHEET = "top-tiles.png"

LENGTHS_UM = (1000, 500, 200, 100, 50, 20, 10, 5, 2, 1)
"""What a bar may stand for where millimetres are too long."""

COLUMN = (INNER - GAP) // 2
TALLEST = 1100
"""Pixels of a panel: a slide that stands upright still fits a screen."""
TITLE = 34
"""Pixels of the line above a panel."""
ACROSS = 6
"""Top tiles in a row of their sheet."""
OUTLINE = (70, 70, 70)
PAPER = 190
"""Grey of the strip under the colours: about that of stained tissue."""


def picture(result: SlideResult, found: HeatMap) -> Image.Image:
    """The whole sheet; the same result gives the same pixels."""
    rows = [
        _header(result),
        side_by_side([untouched(result), _heated(result, found)], COLUMN),
        legend(result),
        *_sentences(result),
        footer(result),
    ]
    return stacked(rows)


def _header(result: SlideResult) -> Image.Image:
    others = sorted(
        (name for name in result.classes if name != result.name),
        key=lambda name: -result.probabilities[result.classes.index(name)],
    )
    said = ", ".join(f"{name} {probability(result.probabilities[result.classes.index(name)])}" for name in others)
    lines = [
        (f"predicted: {result.answer}  ({said})", INK),
        (facts(result), QUIET),
    ]
    number = probability(result.probabilities[result.predicted])
    return _rows.header(result.frame.slide_id, (number, f"calibrated probability of {result.name}", INK), lines)


def facts(seen: Seen) -> str:
    """The slide in one line."""
    width, height = (side / 1000 for side in seen.frame.size_um)
    x, y = seen.frame.microns_per_pixel
    fine = f"{x:.4g}" if abs(x - y) < 1e-4 * x else f"{x:.4g} × {y:.4g}"
    given = "as its file says" if seen.frame.resolution_from == "file" else "as was stated"
    tiles = f"{len(seen.positions_um):,} tile{'s' * (len(seen.positions_um) != 1)} of {seen.tile_um:g} µm"
    return f"{width:.1f} × {height:.1f} mm · {fine} µm per pixel, {given} · {tiles}"


def size(seen: Seen) -> tuple[int, int]:
    """Of a panel that holds the whole slide in its own proportions."""
    width, height = seen.frame.size_um
    scale = min(COLUMN / width, TALLEST / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def untouched(seen: Seen) -> Image.Image:
    return panel(resized(seen.overview, size(seen)), seen, "slide", "")


def _heated(result: SlideResult, found: HeatMap) -> Image.Image:
    shown = shown_on(grey(resized(result.overview, size(result))), found, result.full).copy()
    shown[outline(result, size(result))] = OUTLINE
    words = f"what each tile adds to “{result.name}”"
    return panel(shown, result, words, "tissue outlined")


def outline(seen: Seen, size: tuple[int, int]) -> np.ndarray:
    """The border of the tissue, a pixel wide on so many across and down."""
    width, height = (side / seen.tissue_um for side in seen.frame.size_um)
    mask = Image.fromarray(seen.tissue.astype(np.uint8) * 255)
    # the last row and column of the mask may lie partly beyond the slide
    mask = mask.resize(size, Image.Resampling.BILINEAR, box=(0, 0, min(width, mask.width), min(height, mask.height)))
    inside = ndimage.binary_fill_holes(np.asarray(mask) > 127)  # glands and vessels need no outline
    return inside & ~ndimage.binary_erosion(inside, border_value=1)


def panel(shown: UInt8[np.ndarray, "h w 3"], seen: Seen, words: str, aside: str) -> Image.Image:
    """Centred under its title, a bar of millimetres at the right."""
    height, width = shown.shape[:2]
    row, draw = blank_row(height + TITLE, COLUMN)
    write(draw, (0, 14), fitting(words, 18, COLUMN - 260), 18, INK, "lm")
    start = width_of(fitting(words, 18, COLUMN - 260), 18) + 12
    write(draw, (start, 14), fitting(aside, 16, max(0, COLUMN - 200 - start)) if aside else "", 16, QUIET, "lm")
    scale_bar(draw, (COLUMN, 14), width / (seen.frame.size_um[0] / 1000), 120)
    row.paste(Image.fromarray(shown), ((COLUMN - width) // 2, TITLE))
    return row


BAR = 520, 18
"""Pixels of the bar of colours."""


def legend(result: SlideResult) -> Image.Image:
    """The colours with their numbers, and how the shares sum to the logit."""
    row, draw = blank_row(64)
    wide, high = BAR
    levels = np.linspace(-1, 1, wide)
    alpha = opacity(levels, True)[:, None]
    strip = np.rint((1 - alpha) * PAPER + alpha * colours(levels)).astype(np.uint8)
    row.paste(Image.fromarray(np.broadcast_to(strip, (high, wide, 3)).copy()), (0, 4))
    for at, anchor, number in ((0, "lm", -result.full), (wide // 2, "mm", 0.0), (wide, "rm", result.full)):
        write(draw, (at, 38), f"{number:+.3g}" if number else "0", 16, INK, anchor)
    write(draw, (wide + 28, 13), f"logits that a tile adds to “{result.name}”", 16, INK, "lm")
    clear = f"blue speaks against it, orange for it; bare where it is under {CLEAR_BELOW * result.full:.2g}, and outside the tiles"
    write(draw, (wide + 28, 38), fitting(clear, 16, INNER - wide - 28), 16, QUIET, "lm")
    return row


def sum_of(result: SlideResult) -> str:
    """How the parts become the probability."""
    c = result.predicted
    return (
        f"all tiles {result.values.sum():+.4g}, the rest {result.rest[c]:+.4g}: together the logit {result.logits[c]:.4g} of "
        f"“{result.name}”, calibrated with temperature {result.origin.temperature:.3g}"
    )


def _sentences(result: SlideResult) -> list[Image.Image]:
    verdict = result.deletion.verdict
    said = [
        (sum_of(result), QUIET),
        (f"deletion test {result.deletion.words}", ALARM if verdict in (FAILED, UNTESTED) else QUIET),
        *((warning, ALARM) for warning in result.warnings),
    ]
    lines = [(line, ink) for words, ink in said for line in folded(words, 16, INNER, 3)]
    row, draw = blank_row(24 * len(lines))
    for place, (line, ink) in enumerate(lines):
        write(draw, (0, 12 + 24 * place), line, 16, ink, "lm")
    return [row]


def footer(seen: Seen, words: str = "where the model looked, not where disease is") -> Image.Image:
    """What made it, and what must not be forgotten."""
    row, draw = blank_row(34)
    draw.line((0, 4, INNER, 4), fill=LINE)
    made = f"hilum {hilum_version()} · {seen.origin.package_name} · {seen.origin.package_id[:12]}"
    write(draw, (0, 22), made, 16, QUIET, "lm")
    write(draw, (INNER, 22), f"{words} · for research, not for diagnosis", 16, QUIET, "rm")
    return row


def sheet(result: SlideResult) -> Image.Image:
    """The top tiles, ranked; below them those that speak most against the prediction."""
    rows = []
    for tiles, words in ((result.top, "add most to"), (result.against, "speak most against")):
        if tiles:
            rows.append(_titled(result, f"{_counted(tiles)} {words} “{result.name}”"))
            rows += [_row(result, tiles[first : first + ACROSS]) for first in range(0, len(tiles), ACROSS)]
    return stacked([*rows, footer(result)])


def _counted(tiles: Sequence[TopTile]) -> str:
    return f"the {len(tiles)} tiles that" if len(tiles) > 1 else "the tile that"


def _titled(result: SlideResult, words: str) -> Image.Image:
    row, draw = blank_row(30)
    write(draw, (0, 14), fitting(words, 18, INNER - 400), 18, INK, "lm")
    side = (INNER - (ACROSS - 1) * GAP) // ACROSS
    scale_bar(draw, (INNER, 14), side / result.tile_um, side // 2, "µm", LENGTHS_UM)
    return row


def _row(result: SlideResult, tiles: Sequence[TopTile]) -> Image.Image:
    side = (INNER - (ACROSS - 1) * GAP) // ACROSS
    row, draw = blank_row(side + 54)
    for place, tile in enumerate(tiles):
        left = place * (side + GAP)
        shown = Image.fromarray(tile.picture).resize((side, side), Image.Resampling.LANCZOS)
        row.paste(shown, (left, 0))
        share, (x, y) = result.values[tile.index], result.middle_um[tile.index] / 1000
        write(draw, (left, side + 14), f"{tile.rank}", 18, INK, "lm", bold=True)
        write(draw, (left + 34, side + 14), f"{share:+.3g} logits", 16, INK, "lm")
        write(draw, (left, side + 38), f"x {x:.2f}, y {y:.2f} mm", 16, QUIET, "lm")
    return row
