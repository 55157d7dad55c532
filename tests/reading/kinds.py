"""What a kind of damage is: how it is made, what is true of it, and which words about it are right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .phantom import Seen

FINE, REPAIRED, REFUSED = "fine", "repaired", "refused"


@dataclass(frozen=True, eq=False)
class Made:
    """One damaged scan on disk."""

    path: Path
    """The file, or the folder of a series, that a reader is given."""
    truths: tuple[Seen, ...] = ()
    """The volumes that may rightly be returned; none where nothing can be right but to refuse."""


@dataclass(frozen=True)
class Kind:
    name: str
    family: str
    words: tuple[str, ...]
    """The words hilum may say of it."""
    reasons: tuple[str, ...]
    """Why it may be refused; empty where any reason will do."""
    scans: tuple[str, ...] | None
    """For several scans in one folder: the words of those found there, in any order."""
    unknowable: str
    """Why nobody can see that it is wrong. Such a kind is shown, and counts for no reader."""
    make: Callable[[Path], Made]


KINDS: dict[str, Kind] = {}


def kind(
    family: str,
    *words: str,
    reasons: Sequence[str] = (),
    scans: Sequence[str] | None = None,
    unknowable: str = "",
) -> Callable[[Callable[[Path], Made]], Callable[[Path], Made]]:
    """Enters a maker under its own name: two_series_in_a_folder becomes 'two series in a folder'."""

    def entered(make: Callable[[Path], Made]) -> Callable[[Path], Made]:
        name = f"{family}: {make.__name__.strip('_').replace('_', ' ')}"
        assert name not in KINDS, name
        KINDS[name] = Kind(
            name, family, words, tuple(reasons), tuple(scans) if scans is not None else None, unknowable, make
        )
        return make

    return entered
