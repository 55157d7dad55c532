"""How large a slide's pixels are: as the file says, where that can be believed, or as a person states. Never guessed."""

import csv
import math
from pathlib import Path

from .source import Layout, SlideError

BELIEVABLE = (0.02, 20.0)
"""Microns per pixel a file may claim unasked. Scanners give 0.1 to 4; nothing beyond 20 shows a cell, and what programs
write that know nothing of resolution lies far off: 72 dots per inch are 352.8, 96 are 264.6."""

THREE_WAYS = (
    "State it: --microns_per_pixel NUMBER for all slides, --resolutions FILE.csv with the columns slide and "
    "microns_per_pixel for each, or write it into the file's own resolution tag."
)

LARGEST_UM = 400_000.0
"""A slide is 75 mm long, the glass of a whole organ 200 mm; what is larger than this has another resolution."""

DIFFERS = 0.1
"""Share by which a stated resolution may differ from the file's before it is noted: scanners of one nominal power do."""


def settle(path: Path, layout: Layout, stated: float | None) -> tuple[tuple[float, float], tuple[str, ...]]:
    """Microns per pixel along x and y, and what is to be noted of them; refused where nobody believable says so."""
    said = layout.said
    if stated is not None:
        _refuse_senseless(path.name, stated)
        differs = said is not None and _believable(said) and max(abs(one / stated - 1) for one in said) > DIFFERS
        note = f"{stated:g} um/px was stated and taken; the file says {_words(said)}." if said and differs else ""
        return (stated, stated), (note,) if note else ()
    if said is None:
        raise SlideError(
            f"{path.name} {layout.said_where}; how many microns a pixel is must be known. {THREE_WAYS}", "resolution"
        )
    if not _believable(said):
        raise SlideError(
            f"{path.name} {layout.said_where} {_words(said)}{_hint(said)}; {BELIEVABLE[0]} to {BELIEVABLE[1]:g} is "
            f"believed unasked. {THREE_WAYS}",
            "resolution",
        )
    return said, ()


def refuse_giant(name: str, size_um: tuple[float, float]) -> None:
    """A resolution in the wrong unit makes a slide of metres; so does a damaged size."""
    if max(size_um) > LARGEST_UM:
        width, height = (f"{side / 1e6:.2g}" for side in size_um)
        raise SlideError(
            f"{name} would be {width} × {height} m large; no slide is longer than {LARGEST_UM / 1e6:g} m. Look at its "
            "resolution: 0.25 um/px is usual.",
            "resolution",
        )


def stated_resolutions(table: Path) -> dict[str, float]:
    """Microns per pixel by slide, from a CSV with the columns slide and microns_per_pixel."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SlideError(f"{table} cannot be read ({error}); {_NEEDED}. Look at the file.", "resolution") from error
    if not rows or not {"slide", "microns_per_pixel"} <= set(rows[0]):
        met = f"the columns {', '.join(filter(None, rows[0]))}" if rows else "no rows"
        raise SlideError(f"{table} has {met}; {_NEEDED}. Name them so in the first line.", "resolution")
    found: dict[str, float] = {}
    for row in rows:
        name, number = (row["slide"] or "").strip(), _number(row["microns_per_pixel"])
        if found.setdefault(name, number) != number:
            raise SlideError(
                f"{table} has {name!r} twice, with {found[name]:g} and {number:g}; one is needed. Correct it."
            )
        _refuse_senseless(f"{table}, {name!r}", number)
    return found


_NEEDED = "a CSV with the columns slide and microns_per_pixel is needed"


def _number(words: str | None) -> float:
    try:
        return float(words or "")
    except ValueError:
        return math.nan


def _refuse_senseless(name: str, stated: float) -> None:
    if not (math.isfinite(stated) and stated > 0):
        raise SlideError(
            f"{name}: {stated:g} microns per pixel was stated; a number above 0 is needed, 0.25 for most slides scanned "
            "at 40x. Correct it.",
            "resolution",
        )


def _believable(said: tuple[float, float]) -> bool:
    return all(BELIEVABLE[0] <= one <= BELIEVABLE[1] for one in said)


def _words(said: tuple[float, float]) -> str:
    x, y = (f"{one:.4g}" for one in said)
    return f"{x} um/px" if x == y else f"{x} × {y} um/px"


def _hint(said: tuple[float, float]) -> str:
    """What may lie behind a number that is not believed: one that nobody set is told by its dots per inch."""
    dots = 25400 / said[0]
    usual = next((n for n in (72, 96, 100, 150, 300) if abs(dots / n - 1) < 1e-3), 0)
    if usual:
        return f", which is {usual} dots per inch and was hardly ever measured"
    return ", as of an overview on which no cell is seen" if max(said) > BELIEVABLE[1] else ""
