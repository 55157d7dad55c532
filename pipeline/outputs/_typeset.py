"""Pages of a PDF: words in embedded fonts, pictures, and blocks of both that flow from page to page.

The same blocks give the same bytes. No letter vanishes: one that no font here can draw stands as a box.
"""

import io
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import UsageError
from . import _drawing

PAGE = 595.0, 842.0
"""A4 in points; on US letter a printer shrinks it by a twentieth."""
MARGIN = 40.0
FOOT = 24.0
"""Points of the lines at the end of each page."""
ROOM = PAGE[0] - 2 * MARGIN, PAGE[1] - 2 * MARGIN - FOOT

INK, QUIET, LINE, ALARM = "#14171a", "#5b6570", "#d3d8de", "#a8430a"
"""Dark enough on paper: the alarm has a contrast of 6 to 1."""

SIZE = 8.5
LEADING = 1.4
"""A line's height in sizes of its letters."""

BOX = "\u25a1"
"""Stands for a letter that no font here has."""


# letters


@dataclass(frozen=True, kw_only=True)
class Face:
    """A font that goes into the file, as far as it is used."""

    name: str
    letters: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Fonts:
    """What letters are drawn with: the first face that has one draws it."""

    regular: tuple[Face, ...]
    bold: tuple[Face, ...]

    def runs(self, words: str, bold: bool = False) -> list[tuple[str, str]]:
        """The name of a face and what it draws, from left to right."""
        faces = self.bold if bold else self.regular
        drawn = [self._letter(letter, faces) for letter in visual(plain(words))]
        return [(name, "".join(letter for _, letter in run)) for name, run in groupby(drawn, key=lambda pair: pair[0])]

    def width(self, words: str, size: float, bold: bool = False) -> float:
        """In points."""
        from reportlab.pdfbase.pdfmetrics import stringWidth

        return float(sum(stringWidth(run, name, size) for name, run in self.runs(words, bold)))

    def lacks(self, words: str) -> bool:
        """Whether some of it will stand as boxes."""
        return any(BOX in run for _, run in self.runs(words)) and BOX not in words

    def _letter(self, letter: str, faces: tuple[Face, ...]) -> tuple[str, str]:
        # a joined Arabic letter may be missing where its lone form is there
        for one in (letter, unicodedata.normalize("NFKC", letter), BOX, "?"):
            for face in faces:
                if all(ord(part) in face.letters for part in one):
                    return face.name, one
        raise AssertionError("a font without a question mark")


@cache
def fonts(extra: str = "") -> Fonts:
    """DejaVu (Latin, Greek, Cyrillic, Hebrew, Arabic ...), or reportlab's own Vera; and a font of the user's after it."""
    from reportlab import __file__ as home

    own = Path(home).parent / "fonts"
    regular = _face(_drawing.dejavu(False) or str(own / "Vera.ttf"))
    bold = _face(_drawing.dejavu(True) or str(own / "VeraBd.ttf"))
    more = (_extra(extra),) if extra else ()
    return Fonts(regular=(regular, *more), bold=(bold, *more))


def _face(path: str) -> Face:
    from reportlab.pdfbase.pdfmetrics import registerFont
    from reportlab.pdfbase.ttfonts import TTFont

    # by content: where it lies on a disk shall not show in the file
    name = f"face-{sha256(Path(path).read_bytes()).hexdigest()[:12]}"
    font = TTFont(name, path)
    registerFont(font)
    # beyond the first plane reportlab writes no way back from glyphs to letters, and nothing could be searched
    return Face(name=name, letters=frozenset(code for code in font.face.charToGlyph if code <= 0xFFFF))


def _extra(path: str) -> Face:
    from reportlab.pdfbase.ttfonts import TTFError

    try:
        return _face(path)
    except (OSError, TTFError) as mistake:
        raise UsageError(
            f"The font {path} cannot be used ({mistake}); a TrueType file (.ttf) with its own outlines is needed. "
            "Name another one, or leave `font` out."
        ) from mistake


def plain(words: str) -> str:
    """On one line, without what is no letter."""
    kept = "".join(letter if unicodedata.category(letter) not in ("Cc", "Cs", "Cn") else " " for letter in words)
    return " ".join(unicodedata.normalize("NFC", kept).split())


# Hebrew and Arabic: PDF draws from left to right, and Arabic letters by their place in a word


def visual(words: str) -> str:
    """The letters as they stand from left to right, in a line whose own direction that is (UAX 9, without embeddings)."""
    kinds = [unicodedata.bidirectional(letter) for letter in words]
    turned, at = [], 0
    while at < len(words):
        end = _end_of_run(kinds, at) if kinds[at] in ("R", "AL") else at + 1
        turned.append(_turned(joined(words[at:end])) if kinds[at] in ("R", "AL") else words[at])
        at = end
    return "".join(turned)


def _end_of_run(kinds: Sequence[str], start: int) -> int:
    """After the last letter from right to left, and its marks, before one from left to right."""
    end = start
    for at in range(start, len(kinds)):
        if kinds[at] == "L":
            break
        if kinds[at] in ("R", "AL") or (kinds[at] == "NSM" and end == at):
            end = at + 1
    return end


MIRRORED = str.maketrans("()[]{}<>«»", ")(][}{><»«")

CLUSTER = re.compile(r"\d+(?:[.,:/-]\d+)*|.[\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670]*", re.DOTALL)
"""A number, which keeps its direction, or a letter with its marks, which stay behind it."""


def _turned(run: str) -> str:
    return "".join(reversed(CLUSTER.findall(run))).translate(MIRRORED)


def joined(run: str) -> str:
    """Arabic letters in the forms they have beside one another."""
    forms = _forms()
    units = re.findall(r"\u0644[\u0622\u0623\u0625\u0627]|.", run, re.DOTALL)
    letters = [at for at, unit in enumerate(units) if not unicodedata.combining(unit[0])]  # marks do not part letters
    shaped = list(units)
    for place, at in enumerate(letters):
        own = forms.get(units[at], {})
        before = forms.get(units[letters[place - 1]], {}) if place else {}
        after = forms.get(units[letters[place + 1]], {}) if place + 1 < len(letters) else {}
        back, on = "initial" in before and "final" in own, "initial" in own and "final" in after
        shaped[at] = own.get(
            {(0, 0): "isolated", (1, 0): "final", (0, 1): "initial", (1, 1): "medial"}[back, on], units[at]
        )
    return "".join(shaped)


@cache
def _forms() -> dict[str, dict[str, str]]:
    """Of each letter, and of lam with alef, its forms: Unicode's own table, read backwards."""
    tatweel = "\u0640"
    forms = {tatweel: dict.fromkeys(("isolated", "final", "initial", "medial"), tatweel)}
    for code in (*range(0xFB50, 0xFBFF), *range(0xFE80, 0xFEFD)):
        kind, *letters = unicodedata.decomposition(chr(code)).split() or [""]
        base = "".join(chr(int(letter, 16)) for letter in letters)
        if len(base) == 1 or base[:1] == "\u0644":
            forms.setdefault(base, {})[kind.strip("<>")] = chr(code)
    return forms


# blocks


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Something that stays on one page."""

    height: float
    draw: Callable[[Any, float], None]
    """On that canvas, from that height of the page downwards."""
    again: "Block | None" = None
    """What is said once more above it where it begins a page, as the heads of a table are."""


def stacked(*blocks: Block) -> Block:
    """Kept together."""

    def draw(canvas: Any, top: float) -> None:
        for block in blocks:
            block.draw(canvas, top)
            top -= block.height

    return Block(height=sum(block.height for block in blocks), draw=draw)


def beside(*blocks: Block) -> Block:
    """From the same height downwards; each knows its own place across."""

    def draw(canvas: Any, top: float) -> None:
        for block in blocks:
            block.draw(canvas, top)

    return Block(height=max(block.height for block in blocks), draw=draw)


def space(height: float) -> Block:
    """Nothing."""
    return Block(height=height, draw=lambda canvas, top: None)


@dataclass(frozen=True, kw_only=True)
class Style:
    """How words look."""

    size: float = SIZE
    colour: str = INK
    bold: bool = False


def line(words: str, face: Fonts, style: Style, left: float = 0.0, right: float | None = None) -> Block:
    """Words from that far right of the margin; or, with `right`, up to there."""

    def draw(canvas: Any, top: float) -> None:
        start = left if right is None else right - face.width(words, style.size, style.bold)
        text = canvas.beginText(MARGIN + start, top - style.size * (LEADING + 0.6) / 2)
        text.setFillColor(style.colour)
        for name, run in face.runs(words, style.bold):
            text.setFont(name, style.size)
            text.textOut(run)
        canvas.drawText(text)

    return Block(height=style.size * LEADING, draw=draw)


def lines(words: str, face: Fonts, style: Style = Style(), left: float = 0.0, width: float = ROOM[0]) -> list[Block]:
    """On as many lines as it needs."""
    return [line(part, face, style, left) for part in folded(words, face, style, width)]


def folded(words: str, face: Fonts, style: Style, width: float) -> list[str]:
    """At spaces, and within a word where it alone is too long, after a _ or - if it has one; nothing is cut off."""
    made, current = [], ""
    for word in _fitting(plain(words).split(), face, style, width):
        longer = f"{current} {word}".strip()
        if current and face.width(longer, style.size, style.bold) > width:
            made.append(current)
            longer = word
        current = longer
    return [*made, current] if current else made


def _fitting(words: Iterable[str], face: Fonts, style: Style, width: float) -> Iterator[str]:
    for word in words:
        while len(word) > 1 and face.width(word, style.size, style.bold) > width:
            length = max(1, int(len(word) * width / face.width(word, style.size, style.bold)))
            while length > 1 and face.width(word[:length], style.size, style.bold) > width:
                length -= 1
            length = max(word.rfind(mark, 0, length) for mark in "_-/.") + 1 or length
            yield word[:length]
            word = word[length:]
        yield word


def heading(words: str, face: Fonts) -> Block:
    """Above a section, with a hair line over it."""

    def rule(canvas: Any, top: float) -> None:
        canvas.setStrokeColor(LINE)
        canvas.setLineWidth(0.6)
        canvas.line(MARGIN, top, MARGIN + ROOM[0], top)

    return stacked(space(9), Block(height=5, draw=rule), line(words, face, Style(size=10, bold=True)), space(2))


def section(words: str, face: Fonts, blocks: Sequence[Block]) -> list[Block]:
    """A heading that is never the last of its page."""
    return [stacked(heading(words, face), *blocks[:1]), *blocks[1:]]


NAMES = 104.0
"""Points for what something is, before what it is."""


def named(
    name: str, words: str, face: Fonts, left: float = 0.0, width: float = ROOM[0], names: float = NAMES
) -> list[Block]:
    """What something is, and what it is."""
    style = Style(colour=INK if words else QUIET)
    first, *rest = lines(words or "not given", face, style, left + names, width - names) or [space(SIZE * LEADING)]
    return [beside(line(name, face, Style(colour=QUIET), left), first), *rest]


def swatch(colour: tuple[int, int, int], left: float) -> Block:
    """A label's colour, as in the pictures."""

    def draw(canvas: Any, top: float) -> None:
        canvas.setFillColorRGB(*(part / 255 for part in colour))
        canvas.roundRect(MARGIN + left, top - 9.5, 7, 7, 1.6, stroke=0, fill=1)

    return Block(height=SIZE * LEADING, draw=draw)


def picture(image: Image.Image, most: float = ROOM[1]) -> Block:
    """As wide as the page, or as high as it may be."""
    scale = min(ROOM[0] / image.width, most / image.height)
    width, height = image.width * scale, image.height * scale

    def draw(canvas: Any, top: float) -> None:
        from reportlab.lib.utils import ImageReader

        left = MARGIN + (ROOM[0] - width) / 2
        canvas.drawImage(ImageReader(image), left, top - height, width, height)

    return Block(height=height, draw=draw)


# pages


def paged(blocks: Iterable[Block], room: float = ROOM[1]) -> list[list[Block]]:
    """Each block on the page where it fits."""
    pages: list[list[Block]] = [[]]
    left = room
    for block in blocks:
        if block.height > left and pages[-1]:
            pages.append([block.again] if block.again else [])
            left = room - (block.again.height if block.again else 0)
        pages[-1].append(block)
        left -= block.height
    return pages


def pdf(blocks: Iterable[Block], foot: tuple[str, str], title: str, face: Fonts) -> bytes:
    """With these two lines at the end of every page.

    An even number of bytes: DICOM pads an odd one, and who takes the file out again shall have the same.
    """
    from reportlab import rl_config
    from reportlab.pdfgen.canvas import Canvas

    rl_config.useA85 = 0  # streams need not be letters: a quarter smaller
    content = io.BytesIO()
    canvas = Canvas(  # invariant: without a date; a first font of ours, as its own would not be embedded
        content, pagesize=PAGE, invariant=1, pageCompression=1, initialFontName=face.regular[0].name
    )
    canvas.setTitle(plain(title))
    canvas.setAuthor("hilum")
    pages = paged(blocks)
    for number, page in enumerate(pages, start=1):
        stacked(*page).draw(canvas, PAGE[1] - MARGIN)
        _foot(foot, f"page {number} of {len(pages)}", face).draw(canvas, MARGIN + 14)
        canvas.showPage()
    canvas.save()
    data = content.getvalue()
    return data if len(data) % 2 == 0 else data + b"\n"


def _foot(words: tuple[str, str], number: str, face: Fonts) -> Block:
    """Two lines, each cut where the page's number begins: what they say stands whole on the first page."""
    style = Style(size=7, colour=QUIET)
    cut = [folded(part, face, style, ROOM[0] - 60) for part in words]
    shown = [f"{part[0]} ..." if len(part) > 1 else "".join(part) for part in cut]
    return beside(
        stacked(*(line(part, face, style) for part in shown)),
        stacked(space(style.size * LEADING), line(number, face, style, right=ROOM[0])),
    )
