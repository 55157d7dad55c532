"""Tensors in, logits out: each file here is a network, and the file's name is the network's name.

A network's module has `PAPER`, `GOOD_FOR`, `Config`, `fit`, `divisor`, `build` and `explained`; nothing else makes it one.
One for slides, `mil_*` or `tile_*`, takes bags of tile features and has `PAPER`, `GOOD_FOR`, `Config` and `build`.
"""

import difflib
import importlib
from pathlib import Path
from types import ModuleType

FOR_SLIDES = ("mil_", "tile_")
"""How the names of networks begin that take bags of tile features."""

IMPORTED = ("monai_net",)
"""Networks that come with imported weights alone: they can be loaded, and are not offered to whoever trains."""


class UnknownNetwork(LookupError):
    """No file here has that name."""


def available() -> tuple[str, ...]:
    """The names of all networks for scans that can be trained, sorted, without importing one. `parts` is a folder."""
    return tuple(name for name in _names() if not name.startswith(FOR_SLIDES) and name not in IMPORTED)


def for_slides() -> tuple[str, ...]:
    """The names of all networks for slides, sorted, without importing one."""
    return tuple(name for name in _names() if name.startswith(FOR_SLIDES))


def load(name: str) -> ModuleType:
    """The module of one network for scans, imported now."""
    return importlib.import_module(f"{__name__}.{name}") if name in IMPORTED else _loaded(name, available())


def refuse_unknown(name: str) -> None:
    """Unless a network for scans has that name; nothing is imported."""
    if name not in IMPORTED:
        _refuse_unknown(name, available())


def load_for_slides(name: str) -> ModuleType:
    """The module of one network for slides, imported now; `acmil` is `mil_acmil`."""
    return _loaded(f"mil_{name}" if f"mil_{name}" in for_slides() else name, for_slides())


def _names() -> list[str]:
    return sorted(file.stem for file in Path(__file__).parent.glob("*.py") if not file.stem.startswith("_"))


def _loaded(name: str, known: tuple[str, ...]) -> ModuleType:
    _refuse_unknown(name, known)
    return importlib.import_module(f"{__name__}.{name}")


def _refuse_unknown(name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise UnknownNetwork(f"There is no network named {name!r}; networks/ holds {_offer(name, known)}")


def _offer(name: str, known: tuple[str, ...]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    advice = f"Did you mean {nearest[0]!r}?" if nearest else "Give one of these names."
    return f"{', '.join(known)}. {advice}"
