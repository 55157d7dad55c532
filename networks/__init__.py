"""Tensors in, logits out: each file here is a network, and the file's name is the network's name.

A network's module has `PAPER`, `GOOD_FOR`, `Config`, `fit`, `divisor`, `build` and `explained`; nothing else makes it one.
"""

import difflib
import importlib
from pathlib import Path
from types import ModuleType


class UnknownNetwork(LookupError):
    """No file here has that name."""


def available() -> tuple[str, ...]:
    """The names of all networks, sorted, without importing one. `parts` is a folder and no network."""
    return tuple(sorted(file.stem for file in Path(__file__).parent.glob("*.py") if not file.stem.startswith("_")))


def load(name: str) -> ModuleType:
    """The module of one network, imported now."""
    if name not in available():
        raise UnknownNetwork(f"There is no network named {name!r}; networks/ holds {_offer(name)}")
    return importlib.import_module(f"{__name__}.{name}")


def _offer(name: str) -> str:
    nearest = difflib.get_close_matches(name, available(), n=1, cutoff=0.4)
    advice = f"Did you mean {nearest[0]!r}?" if nearest else "Give one of these names."
    return f"{', '.join(available())}. {advice}"
