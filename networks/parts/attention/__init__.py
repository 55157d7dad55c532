"""Blocks of attention, one file each, and the file's name is the block's name: they take a map and return one of its size,
over planes and over volumes. What a file calls `BLOCK` is its block."""

import difflib
import importlib
from pathlib import Path

from ..attentive import Attentive


class UnknownAttention(LookupError):
    """No file here has that name."""


def available() -> tuple[str, ...]:
    """The names of all blocks, sorted, without importing one."""
    return tuple(sorted(file.stem for file in Path(__file__).parent.glob("*.py") if not file.stem.startswith("_")))


def load(name: str) -> type[Attentive]:
    """The class of one block, imported now."""
    if name not in available():
        nearest = difflib.get_close_matches(name, available(), n=1, cutoff=0.4)
        advice = f"Did you mean {nearest[0]!r}?" if nearest else "Give one of these names."
        raise UnknownAttention(f"There is no attention named {name!r}; there are {', '.join(available())}. {advice}")
    block: type[Attentive] = importlib.import_module(f"{__name__}.{name}").BLOCK
    return block
