"""The table kind x reader, in Markdown."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from .kinds import FINE, KINDS, REFUSED, REPAIRED
from .peers import CRASHED, HUNG, WARNED, WRONG
from .readers import PEERS

READERS = ("hilum", *PEERS)
NOT_APPLICABLE = "n/a"
BELIEVED = "cannot be known"
WORDS = (FINE, REPAIRED, REFUSED, WARNED, WRONG, CRASHED, HUNG, BELIEVED, NOT_APPLICABLE)

Cells = Mapping[tuple[str, str], tuple[str, str]]
"""(kind, reader) to (word, detail)."""


def totals(cells: Cells, reader: str) -> Counter[str]:
    return Counter(cells[kind, reader][0] for kind in KINDS)


def markdown(cells: Cells) -> str:
    """Every kind in a row, then how often each word was said. A kind that nobody can know counts as that alone."""
    readers = [r for r in READERS if any(cells[kind, r][0] != NOT_APPLICABLE for kind in KINDS)]
    lines = [f"| kind of damage | {' | '.join(readers)} |", "| --- |" + " --- |" * len(readers)]
    for name in KINDS:
        said = [cells[name, reader][0] for reader in readers]
        lines.append(f"| {name} | {' | '.join(f'**{word}**' if word == WRONG else word for word in said)} |")
    for word in WORDS:
        counted = [totals(cells, reader)[word] for reader in readers]
        if any(counted):
            lines.append(f"| **{word}, of {len(KINDS)}** | {' | '.join(f'**{n}**' for n in counted)} |")
    unknowable = [f"- {kind.name}: {kind.unknowable}." for kind in KINDS.values() if kind.unknowable]
    return "\n".join([*lines, "", "Cannot be known by anybody, and counts for no reader:", "", *unknowable, ""])


def details(cells: Cells) -> str:
    """What stands behind the words: one line per cell that says more."""
    return "\n".join(
        f"{kind} | {reader}: {word}: {' '.join(detail.split())}"
        for (kind, reader), (word, detail) in cells.items()
        if detail
    )


def save(cells: Cells) -> None:
    """To the file that HILUM_MATRIX names, with the details beside it."""
    if path := os.environ.get("HILUM_MATRIX"):
        Path(path).write_text(markdown(cells))
        Path(path).with_suffix(".details.txt").write_text(details(cells))
