"""What every picture is made of: its colours, words that fit, bars of millimetres, rows stacked to a sheet."""

import io
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, MARGIN, GAP = 1920, 24, 16
INNER = WIDTH - 2 * MARGIN

PAGE, PANEL, LINE, INK, QUIET, ALARM = "#0c0e11", "#000000", "#2a2f36", "#f2f4f6", "#9aa3ad", "#f0b429"

LENGTHS = (200, 100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1)
"""Millimetres that a scale bar may stand for."""


def png(image: Image.Image) -> bytes:
    """Bytes without a date in them."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=7)
    return buffer.getvalue()


def blank_row(height: int, width: int = INNER) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A row of the page to draw on."""
    row = Image.new("RGB", (width, max(1, height)), PAGE)
    return row, ImageDraw.Draw(row)


def stacked(rows: Sequence[Image.Image]) -> Image.Image:
    """The whole sheet."""
    sheet = Image.new("RGB", (WIDTH, sum(row.height for row in rows) + GAP * (len(rows) - 1) + 2 * MARGIN), PAGE)
    top = MARGIN
    for row in rows:
        sheet.paste(row, (MARGIN, top))
        top += row.height + GAP
    return sheet


def side_by_side(images: Sequence[Image.Image], width: int) -> Image.Image:
    """Columns of one width."""
    row, _ = blank_row(max(image.height for image in images))
    for place, image in enumerate(images):
        row.paste(image, (place * (width + GAP), 0))
    return row


def scale_bar(
    draw: ImageDraw.ImageDraw, end: tuple[int, int], scale: float, most: int, unit: str = "mm",
    lengths: Sequence[float] = LENGTHS,
) -> None:  # fmt: skip
    """A round number of millimetres, or of another unit, right-aligned. `scale`: pixels of one; `most`: pixels of the bar."""
    length = next((one for one in lengths if one * scale <= most), lengths[-1])
    words = f"{length:g} {unit}"
    right, middle = end[0] - 1, end[1]
    write(draw, (right, middle), words, 16, QUIET, "rm")
    right -= width_of(words, 16) + 8
    left = right - round(length * scale)
    draw.line((left, middle, right, middle), fill=INK, width=2)
    for tip in (left, right):
        draw.line((tip, middle - 4, tip, middle + 4), fill=INK, width=2)


def write(draw: Any, at: tuple[int, int], words: str, size: int, fill: str, anchor: str, bold: bool = False) -> None:
    """Words on one line."""
    draw.text(at, _writable(words), fill=fill, font=_font(size, bold), anchor=anchor)


def width_of(words: str, size: int, bold: bool = False) -> int:
    """In pixels."""
    return int(_font(size, bold).getlength(_writable(words)) + 0.999)


def fitting(words: str, size: int, width: int, bold: bool = False) -> str:
    """Cut at the end, with three dots, where it is too long."""
    if width_of(words, size, bold) <= width:
        return words
    while words and width_of(words + "...", size, bold) > width:
        words = words[:-1]
    return words + "..."


def folded(words: str, size: int, width: int, most: int) -> list[str]:
    """On as many lines as it needs, but no more than `most`; the last is cut."""
    lines: list[str] = []
    rest = words.split()
    while rest and len(lines) < most - 1:
        count = len(rest)
        while count > 1 and width_of(" ".join(rest[:count]), size) > width:
            count -= 1
        lines.append(fitting(" ".join(rest[:count]), size, width))
        rest = rest[count:]
    return [*lines, fitting(" ".join(rest), size, width)] if rest else lines


@cache
def _font(size: int, bold: bool = False) -> Any:
    """DejaVu, which knows accents, Greek and Cyrillic and comes with matplotlib (MLflow brings it); or Pillow's own."""
    path = dejavu(bold)
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


@cache
def dejavu(bold: bool) -> str | None:
    """Its file; None where matplotlib is not installed."""
    home = find_spec("matplotlib")  # finds, does not import: matplotlib is heavy
    if home is None or home.origin is None:
        return None
    path = Path(home.origin).parent / "mpl-data" / "fonts" / "ttf" / f"DejaVuSans{'-Bold' if bold else ''}.ttf"
    return str(path) if path.is_file() else None


def _writable(words: str) -> str:
    """On one line; in ASCII where Pillow's own font, which knows no more, has to do."""
    words = " ".join(words.split())
    if dejavu(False):
        return words
    return words.replace("×", "x").replace("·", "|").replace("°", " deg").encode("ascii", "replace").decode()
