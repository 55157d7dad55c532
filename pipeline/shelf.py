"""A folder of ours in which each file is a thing of one kind, found by the file's name: a new file is a new thing."""

import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from preprocessing.records import nearest


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """Such a folder. Files that begin with an underscore belong to the folder itself."""

    package: str
    places: Iterable[str]
    """The package's `__path__`."""
    kind: str
    """What one of them is called."""
    refusal: type[Exception]
    """Raised where there is no such file."""

    def available(self) -> tuple[str, ...]:
        """All names, sorted. Nothing is imported."""
        return tuple(
            sorted(found.name for found in pkgutil.iter_modules(self.places) if not found.name.startswith("_"))
        )

    def load(self, name: str) -> ModuleType:
        """The module of one, imported now."""
        names = self.available()
        if name not in names:
            raise self.refusal(
                f"{self.kind} {name!r} was asked for{nearest(name, names)}; one of {', '.join(names)} is needed. "
                "Choose among these."
            )
        return import_module(f".{name}", self.package)
