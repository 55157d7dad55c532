"""The rows of a sheet: three planes, slices along a finding, its parts one by one, the projection, the bar of colours."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from preprocessing.volume import Geometry

from ..report import Explanation, Result, millilitres
from ._drawing import (
    ALARM,
    GAP,
    INK,
    INNER,
    LINE,
    PANEL,
    QUIET,
    blank_row,
    fitting,
    folded,
    scale_bar,
    side_by_side,
    width_of,
    write,
)
from ._heat import CLEAR_BELOW, colours, opacity
from ._planes import (
    AXIAL,
    CORONAL,
    PLANES,
    SIDES,
    Finding,
    Plane,
    View,
    drawn,
    millimetres,
    panel,
    projected,
    surroundings,
)

GUTTER, LETTER = 26, 15
"""Pixels around each plane, and from its edge to the middle of a letter: nothing is written on the scan itself."""

TILES = 8
"""Small slices in a row."""
TILE_SIDE_MM = 40.0
"""A tile shows at least so much of the patient, that a small lesion keeps its surroundings."""

TITLE = 30
"""Pixels of the line above each plane."""

COLUMN = (INNER - 3 * GAP) // 4
TILE = (INNER - (TILES - 1) * GAP) // TILES
BOX = COLUMN - 2 * GUTTER, COLUMN - 2 * GUTTER

KEY = 90
"""Pixels of the number that matters most: 12 are left of it on a thumbnail 256 wide, which can still be read."""


def header(name: str, key: tuple[str, str, str], lines: Sequence[tuple[str, str]]) -> Image.Image:
    """Whose picture it is, what there is to know, and the number that matters most: its words, what it is of, its colour."""
    number, subject, colour = key
    room = INNER - max(width_of(number, KEY, bold=True), width_of(subject, 20)) - 2 * GAP
    row, draw = blank_row(max(48 + 24 * len(lines), 126))
    write(draw, (0, 18), fitting(name, 32, room, bold=True), 32, INK, "lm", bold=True)
    for place, (line, ink) in enumerate(lines):
        write(draw, (0, 60 + 24 * place), fitting(line, 16, room), 16, ink, "lm")
    write(draw, (INNER, 46), number, KEY, colour, "rm", bold=True)
    write(draw, (INNER, 112), subject, 20, QUIET, "rm")
    return row


def caveats(geometry: Geometry) -> list[str]:
    """How far the patient's axes are from the scan's own."""
    said = []
    if geometry.is_oblique:
        cosines = np.abs(np.diag(geometry.direction)).clip(max=1)
        tilt = np.degrees(np.arccos(cosines.min()))
        said.append(f"oblique scan: planes and letters follow its own axes, up to {tilt:.1f}° from the patient's")
    if geometry.is_sheared:
        said.append("sheared scan: drawn as if its axes met at right angles")
    return said


def titled(words: str, aside: str, row: Image.Image, colour: str = INK) -> Image.Image:
    """A row under its title."""
    whole, draw = blank_row(row.height + 34, row.width)
    write(draw, (0, 14), words, 18, colour, "lm")
    write(
        draw, (width_of(words, 18) + 12, 14), fitting(aside, 16, row.width - width_of(words, 18) - 12), 16, QUIET, "lm"
    )
    whole.paste(row, (0, 34))
    return whole


def planes(view: View, finding: Finding, fill: float, *, bare: bool = False, front: bool = False) -> Image.Image:
    """Axial, coronal and sagittal through the finding, with marks where the other two cut each; and from the front."""
    slices = [panel(view, plane, finding.centre[plane.through], box=BOX, fill=fill, bare=bare) for plane in PLANES]
    flat, window = projected(view, CORONAL) if front else (None, None)
    whole = [] if flat is None or window is None else [drawn(flat, view, window, box=BOX, fill=0.0)]
    size = COLUMN, max(image.height for image, _ in (*slices, *whole)) + 2 * GUTTER + TITLE
    frames = []
    for plane, (image, scale) in zip(PLANES, slices, strict=True):
        place = millimetres(view.geometry.to_world(finding.centre)[plane.through], plane.through)
        frame, spot = _framed(plane, plane.name, place, size, image, scale)
        _marks(ImageDraw.Draw(frame), view, plane, finding, spot)
        frames.append(frame)
    if window is not None:
        frames += [_framed(CORONAL, "projection", f"maximum, to {window.high:.4g}", size, *each)[0] for each in whole]
    return side_by_side(frames, COLUMN)


Spot = tuple[int, int, int, int]
"""Left, top, right and bottom of a slice in its frame."""


def _framed(
    plane: Plane, title: str, aside: str, size: tuple[int, int], image: Image.Image, scale: float
) -> tuple[Image.Image, Spot]:
    """A plane with its name, place, scale and letters."""
    width, height = size
    frame, draw = blank_row(height, width)
    write(draw, (0, 13), title, 18, INK, "lm")
    start = width_of(title, 18) + 12
    write(draw, (start, 13), fitting(aside, 16, width - start - width // 4 - 80), 16, QUIET, "lm")
    scale_bar(draw, (width, 13), scale, width // 4)
    draw.rectangle((0, TITLE, width, height), fill=PANEL)
    left, top = (width - image.width) // 2, TITLE + (height - TITLE - image.height) // 2
    draw.rectangle((left - 1, top - 1, left + image.width, top + image.height), outline=LINE)  # where the scan ends
    frame.paste(image, (left, top))
    spot = left, top, left + image.width, top + image.height
    _letters(draw, plane, spot)
    return frame, spot


def _letters(draw: ImageDraw.ImageDraw, plane: Plane, spot: Spot) -> None:
    left, top, right, bottom = spot
    across, down = SIDES[plane.across], SIDES[plane.down]
    middle = (left + right) // 2, (top + bottom) // 2
    write(draw, (left - LETTER, middle[1]), across[0], 16, INK, "mm")
    write(draw, (right + LETTER, middle[1]), across[1], 16, INK, "mm")
    write(draw, (middle[0], top - LETTER), down[0], 16, INK, "mm")
    write(draw, (middle[0], bottom + LETTER), down[1], 16, INK, "mm")


def _marks(draw: ImageDraw.ImageDraw, view: View, plane: Plane, finding: Finding, spot: Spot) -> None:
    left, top, right, bottom = spot
    shape = view.geometry.shape
    column = left + round((1 - (finding.centre[plane.across] + 0.5) / shape[plane.across]) * (right - left))
    row = top + round((1 - (finding.centre[plane.down] + 0.5) / shape[plane.down]) * (bottom - top))
    for near, far in ((top - 5, top - 2), (bottom + 1, bottom + 4)):
        draw.line((column, near, column, far), fill=QUIET)
    for near, far in ((left - 5, left - 2), (right + 1, right + 4)):
        draw.line((near, row, far, row), fill=QUIET)


def strip(view: View, finding: Finding) -> Image.Image:
    """Axial slices from the lowest to the highest of the finding, close up, contours only."""
    crop = _close_up(view, finding)
    tiles, scale = [], 1.0
    for index in _along(finding.box[2], view.geometry.shape[2]):
        image, scale = panel(view, AXIAL, index, box=(TILE - 2, 260), fill=0.0, crop=crop)
        tiles.append(_tile(image, _height(view, finding, index)))
    words = f"{finding.name}: its slices" if finding.label else "axial slices through the scan"
    whole = titled(words, "inferior to superior", side_by_side(tiles, TILE))
    scale_bar(ImageDraw.Draw(whole), (INNER, 14), scale, TILE)
    return whole


def montage(view: View, found: Sequence[Sequence[Finding]], most: int) -> Image.Image | None:
    """Every part where it is largest, under its number: the first of each label, then the second ...; nothing of one part."""
    every = sum(each[0].of for each in found)
    turns = [parts[n] for n in range(most) for parts in found if n < len(parts)][:most]
    if every < 2 or not turns:
        return None
    order = {id(each): n for n, each in enumerate(part for parts in found for part in parts)}
    tiles = [_part(view, each) for each in sorted(turns, key=lambda each: order[id(each)])]
    rows = [side_by_side(tiles[n : n + TILES], TILE) for n in range(0, len(tiles), TILES)]
    whole, _ = blank_row(sum(row.height for row in rows) + GAP * (len(rows) - 1))
    top = 0
    for row in rows:
        whole.paste(row, (0, top))
        top += row.height + GAP
    aside = "each where it is largest, numbered as in the measurements"
    if every > len(turns):
        aside += f"; {every - len(turns)} more stand there"
    return titled("parts", aside, whole)


def _part(view: View, finding: Finding) -> Image.Image:
    image, scale = panel(view, AXIAL, finding.centre[2], box=(TILE - 2, TILE), fill=0.0, crop=_close_up(view, finding))
    tile = _tile(image, _height(view, finding, finding.centre[2]), under=48)
    draw = ImageDraw.Draw(tile)
    amount = millilitres(finding.ml)
    number = "" if finding.of < 2 else f" {finding.number}"
    room = TILE - width_of(amount, 16) - width_of(number, 16) - 30
    name = fitting(finding.label.name if finding.label else "", 16, room) + number
    colour = finding.label.colour if finding.label else (255, 255, 255)
    draw.rounded_rectangle((0, image.height + 30, 12, image.height + 42), radius=3, fill=tuple(colour))
    write(draw, (18, image.height + 36), name, 16, INK, "lm")
    write(draw, (TILE, image.height + 36), amount, 16, QUIET, "rm")
    scale_bar(draw, (TILE, image.height + 14), scale, TILE // 5)
    return tile


def _tile(image: Image.Image, place: str, under: int = 26) -> Image.Image:
    tile, draw = blank_row(image.height + under, TILE)
    draw.rectangle((0, 0, TILE, image.height), fill=PANEL)
    tile.paste(image, ((TILE - image.width) // 2, 0))
    if under > 26:
        write(draw, (0, image.height + 14), place, 16, QUIET, "lm")
    else:
        write(draw, (TILE // 2, image.height + 15), place, 16, QUIET, "mm")
    return tile


def _height(view: View, finding: Finding, index: int) -> str:
    return millimetres(view.geometry.to_world((finding.centre[0], finding.centre[1], index))[2], 2)


def _close_up(view: View, finding: Finding) -> tuple[tuple[int, int], tuple[int, int]]:
    across, down = (surroundings(finding.box, finding.box[axis], view, axis, TILE_SIDE_MM) for axis in (0, 1))
    return across, down


def _along(extent: tuple[int, int], count: int) -> list[int]:
    """Evenly spaced slices; beyond a finding thinner than the strip, as far as the scan goes."""
    first, last = extent
    while last - first + 1 < min(TILES, count):
        first, last = max(0, first - 1), min(count - 1, last + 1)
    return sorted({int(each) for each in np.linspace(first, last, TILES).round()})


def heat_bar(view: View, explanation: Explanation, outlines: str = "") -> Image.Image:
    """What is explained, how, whether it is to be believed, and what the colours stand for."""
    lines = [(line, INK) for line in folded(_explained(explanation), 16, 2 * COLUMN, 2)]
    lines += [(each, ink) for line, ink in standing_lines(explanation) for each in folded(line, 16, 2 * COLUMN, 3)]
    lines += [(outlines, QUIET)] if outlines else []
    row, draw = blank_row(max(24 * len(lines), 68))
    for place, (line, ink) in enumerate(lines):
        write(draw, (0, 12 + 24 * place), line, 16, ink, "lm")
    if view.heat is not None and view.heat.full > 0:
        _bar(row, view, explanation.unit)
    return row


def _explained(explanation: Explanation) -> str:
    how = "" if explanation.method == "attention" else f" · {explanation.method} at {explanation.layer}"
    return f"heat: {subject(explanation)}{how} · where the network looked, not where disease is"


def subject(explanation: Explanation) -> str:
    """What is explained, in words."""
    if explanation.method == "attention":
        return f"the network's own attention, {explanation.layer}"
    return explanation.label if explanation.part is None else f"{explanation.label} {explanation.part}"


def standing_lines(explanation: Explanation) -> list[tuple[str, str]]:
    """What is known of a map, and in which colour it is said."""
    tests = explanation.faithfulness
    if explanation.blank:
        said = [(f"BLANK, nothing is drawn: {explanation.blank}", ALARM)]
    elif tests is not None and tests.failed:
        said = [(f"FAILED, do not believe it: {'; '.join(tests.failed)}", ALARM)]
    else:
        said = [(f"tests: {explanation.standing}", QUIET)]
    said += [(warning, ALARM) for warning in explanation.warnings]
    return said + [(note, QUIET) for note in (tests.noted if tests else ())]


def _bar(row: Image.Image, view: View, unit: str) -> None:
    """Colours as they look over a mid grey, from full scale against (if there is such) to full scale for."""
    assert view.heat is not None
    left, width = 2 * (COLUMN + GAP), COLUMN
    levels = np.linspace(-1 if view.heat.is_signed else 0, 1, width)
    alpha = opacity(levels, view.heat.is_signed)[:, None]
    shown = colours(levels, view.heat.is_signed) * alpha + 96 * (1 - alpha)
    strip = np.repeat(np.rint(shown).astype(np.uint8)[None], 16, axis=0)
    row.paste(Image.fromarray(strip), (left, 4))
    draw = ImageDraw.Draw(row)
    ends = [(1.0, width - 1, "rm"), (0.0, width // 2, "mm") if view.heat.is_signed else (0.0, 0, "lm")]
    ends += [(-1.0, 0, "lm")] if view.heat.is_signed else []
    for level, at, anchor in ends:
        draw.line((left + at, 2, left + at, 22), fill=INK)
        write(draw, (left + at, 34), f"{level * view.heat.full:.2g}", 16, INK, anchor)
    words = f"{unit}; clear below {CLEAR_BELOW:.0%}"
    write(draw, (left, 56), fitting(words, 16, width), 16, QUIET, "lm")


def footer(result: Result, caution: str = "") -> Image.Image:
    """What made it, and what it is not for."""
    row, draw = blank_row(26)
    draw.line((0, 0, row.width, 0), fill=LINE)
    left = f"hilum · {result.package_name} · {result.package_id[:12]}"
    right = f"{caution}{' · ' if caution else ''}for research, not for diagnosis"
    write(draw, (0, 15), fitting(left, 15, row.width - width_of(right, 15) - GAP), 15, QUIET, "lm")
    write(draw, (row.width, 15), right, 15, QUIET, "rm")
    return row


def without_heat(view: View) -> View:
    """The same scan and labels."""
    return replace(view, heat=None)
