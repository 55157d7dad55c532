"""Verdicts as people and programs read them: a table on a terminal, records for JSON."""

import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from preprocessing.verdict import WORDS, Verdict

from .report import grid

CASE_WIDTH = 36
"""A longer name stands on a line of its own."""

EXAMPLES = 3
"""So many files are named for each reason to leave files alone, unless all are asked for."""


def record(verdict: Verdict) -> dict[str, Any]:
    """Everything that is said of one scan, as plain values; its grid under one key, None where it is not known."""
    return {
        "word": verdict.word,
        "reason": verdict.reason,
        "message": verdict.message,
        "repairs": list(verdict.repairs),
        "notes": list(verdict.notes),
        "modality": verdict.modality,
        "encoding": verdict.encoding,
        "channels": list(verdict.channels),
        "slices": verdict.geometry.shape[2] if verdict.geometry else None,
        "grid": grid(verdict.geometry) if verdict.geometry else None,
        "sources": list(verdict.sources),
        "files": list(verdict.files),
    }


def counted(said: Sequence[str]) -> str:
    """'4 cases: 2 fine, 1 repaired, 1 refused'."""
    count = Counter(said)
    return f"{len(said)} case{'' if len(said) == 1 else 's'}: {', '.join(f'{count[word]} {word}' for word in WORDS)}"


def table(verdicts: Mapping[str, Verdict], columns: int = 100) -> str:
    """A line for each case, what was wrong with it or is worth knowing below it."""
    shown = {case: printable(case) for case in verdicts}
    width = max((len(name) for name in shown.values() if len(name) <= CASE_WIDTH), default=0)
    return "\n".join(
        line for case, verdict in verdicts.items() for line in _lines(shown[case], verdict, width, columns)
    )


def _lines(case: str, verdict: Verdict, width: int, columns: int) -> Iterator[str]:
    head = f"{case:<{width}}  {verdict.word:<8}  "
    if len(case) > width:
        yield case
        head = f"{'':<{width}}  {verdict.word:<8}  "
    what = printable(verdict.what)
    yield from textwrap.wrap(f"{head}{what}", columns, subsequent_indent=" " * (width + 12), **WHOLE)
    if verdict.message:
        yield from _told(f"{verdict.reason}: {verdict.message}" if verdict.reason else verdict.message, columns)
    for repair in verdict.repairs:
        yield from _told(f"repaired: {repair}", columns)
    for note in verdict.notes:
        yield from _told(f"note: {note}", columns)


WHOLE: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "drop_whitespace": True}
"""A path or a UID that is cut in two cannot be copied."""


def _told(sentence: str, columns: int) -> list[str]:
    return textwrap.wrap(
        printable(sentence), columns, initial_indent=" " * 4, subsequent_indent=" " * 6, **WHOLE
    )  # fmt: skip


def left_alone(files: Mapping[str, str], root: Path, everything: bool = False) -> str:
    """The files that are no scans, by reason, as they lie below `root`; a few of each, or all of them."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for file, reason in files.items():
        inner = Path(file).is_relative_to(root) and file != str(root)
        by_reason[reason].append(printable(str(Path(file).relative_to(root)) if inner else file))
    lines = [f"left alone: {len(files)} file{'' if len(files) == 1 else 's'}"] if files else []
    for reason, those in sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0])):
        lines.append(f"{len(those):>6}  {printable(reason)}")
        named = those if everything or len(those) == EXAMPLES + 1 else those[:EXAMPLES]
        lines += [f"        {file}" for file in named]
        lines += [f"        ... and {len(those) - len(named)} more"] if len(those) > len(named) else []
    return "\n".join(lines)


def printable(text: str) -> str:
    """Names and headers may hold what a terminal would obey, or no Unicode at all; neither is passed on."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))
