"""Verdicts as people and programs read them: a table on a terminal, records for JSON."""

import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from preprocessing.reading import REPAIRS
from preprocessing.verdict import WORDS, Verdict

from .report import grid

CASE_WIDTH = 36
"""A longer name has its line for itself."""

EXAMPLES = 3
"""So many files are named for each reason to leave files alone, and so many cases for each note, unless all are asked for."""


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


def why_refused(reasons: Iterable[str]) -> str:
    """'refused: 12 too_few_slices, 3 damaged', the commonest reason first; nothing where none is."""
    count = sorted(Counter(filter(None, reasons)).items(), key=lambda item: (-item[1], item[0]))
    return f"refused: {', '.join(f'{number} {reason}' for reason, number in count)}" if count else ""


def what_would_help(messages: Iterable[str]) -> str:
    """The repairs that refusals speak of, as they are given on the command line; nothing where there are none."""
    met = " ".join(messages)
    words = [word for word in REPAIRS if f"allow {word}" in met]
    return f"--allow {','.join(words)} would repair some of them." if words else ""


def table(verdicts: Mapping[str, Verdict], columns: int = 100, everything: bool = False) -> str:
    """A line for each case, what was wrong with it below; the refused last, where a person at a terminal looks first.

    What is worth knowing of many cases is told once, below them all, unless everything is asked for.
    """
    shown = {case: printable(case) for case in verdicts}
    width = max((len(name) for name in shown.values() if len(name) <= CASE_WIDTH), default=0)
    often = {} if everything else _said_often(verdicts)
    ordered = sorted(verdicts.items(), key=lambda item: WORDS.index(item[1].word))
    lines = [line for case, verdict in ordered for line in _lines(shown[case], verdict, width, columns, often)]
    told = {note: [shown[case] for case in cases] for note, cases in often.items()}
    return "\n".join([*lines, *(["", "notes on many cases", *_listed(told)] if told else [])])


INDENT = len("repaired") + 2
"""What is said of a case stands below its name."""


def _said_often(verdicts: Mapping[str, Verdict]) -> dict[str, list[str]]:
    """Notes that only differ in their numbers, if they are said of many cases; and of which."""
    cases: dict[str, list[str]] = defaultdict(list)
    for case, verdict in verdicts.items():
        for note in {_numberless(note): None for note in verdict.notes}:
            cases[note].append(case)
    return {note: those for note, those in cases.items() if len(those) > EXAMPLES}


def _numberless(note: str) -> str:
    return re.sub(r"\d+(\.\d+)?", "\N{HORIZONTAL ELLIPSIS}", note)


def _lines(case: str, verdict: Verdict, width: int, columns: int, often: Collection[str]) -> Iterator[str]:
    head, what = f"{verdict.word:<{INDENT}}{case:<{width}}", printable(verdict.brief)
    if len(case) > width or len(f"{head}  {what}") > columns:
        yield head.rstrip()
        yield from _wrapped(what, columns, INDENT)
    else:
        yield f"{head}  {what}".rstrip()
    folders = _folders(verdict)
    if (
        len(folders) > 1 and len(verdict.channels) < 2
    ):  # a series over several folders, called as the one above them all
        yield from _wrapped(f"from {', '.join(folders)}", columns, INDENT)
    if verdict.message:
        yield from _wrapped(
            f"{verdict.reason}: {verdict.message}" if verdict.reason else verdict.message, columns, INDENT
        )
    for repair in verdict.repairs:
        yield from _wrapped(f"repaired: {repair}", columns, INDENT)
    for note in verdict.notes:
        if _numberless(note) not in often:
            yield from _wrapped(f"note: {note}", columns, INDENT)


def _folders(verdict: Verdict) -> list[str]:
    """Where the files lie that a scan was read from; of one that was not read, those of a series."""
    seen = verdict.sources or (verdict.files if verdict.modality else ())
    return sorted({str(Path(file).parent) for file in seen})


WHOLE: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "drop_whitespace": True}
"""A path or a UID that is cut in two cannot be copied."""


def _wrapped(sentence: str, columns: int, indent: int) -> list[str]:
    return textwrap.wrap(
        printable(sentence), columns, initial_indent=" " * indent, subsequent_indent=" " * (indent + 2), **WHOLE
    )  # fmt: skip


def left_alone(files: Mapping[str, str], root: Path, everything: bool = False) -> str:
    """The files that are no scans, by reason, as they lie below `root`; a few of each, or all of them."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for file, reason in files.items():
        inner = Path(file).is_relative_to(root) and file != str(root)
        by_reason[reason].append(printable(str(Path(file).relative_to(root)) if inner else file))
    heading = [f"left alone: {len(files)} file{'' if len(files) == 1 else 's'}"] if files else []
    return "\n".join([*heading, *_listed(by_reason, everything)])


def _listed(told: Mapping[str, Sequence[str]], everything: bool = False) -> Iterator[str]:
    """Each sentence with the names it is said of, the commonest first; a few of the names, or all of them."""
    for sentence, names in sorted(told.items(), key=lambda item: (-len(item[1]), item[0])):
        yield f"{len(names):>6}  {printable(sentence)}"
        named = names if everything or len(names) == EXAMPLES + 1 else names[:EXAMPLES]
        yield from (f"        {name}" for name in named)
        if len(names) > len(named):
            yield f"        ... and {len(names) - len(named)} more"


def printable(text: str) -> str:
    """Names and headers may hold what a terminal would obey, or no Unicode at all; neither is passed on."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))
