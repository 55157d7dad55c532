"""What runs a trained network: windows in, logits out, one engine per fold. Each file here is a way to do it, by its name.

A file has `open(package, how)`, which makes an engine of every fold; nothing else makes it one. Whatever is done for speed,
precision and layout is done inside an engine: who asks it only knows windows and logits.
"""

import pkgutil
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from preprocessing.records import nearest

from ..errors import UsageError

if TYPE_CHECKING:
    import torch

    from ..package import ModelPackage
    from ..prediction import Inference


@runtime_checkable
class Engine(Protocol):
    """One fold's network, ready to answer."""

    @property
    def device(self) -> "torch.device":
        """Where its answers lie; windows may come from anywhere."""

    @property
    def words(self) -> str:
        """What it is, for the report: `torch 2.15.0, float32, channels last`."""

    def __call__(self, windows: "torch.Tensor") -> "torch.Tensor":
        """Windows [B, C, i, j, k] of float32 -> logits [B, K, i, j, k] of float32."""


def available() -> tuple[str, ...]:
    """The names of all engines. Nothing is imported."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def load(name: str) -> ModuleType:
    """The module of one engine, imported now."""
    names = available()
    if name not in names:
        raise UsageError(
            f"engine {name!r} was asked for{nearest(name, names)}; one of {', '.join(names)} is needed. Choose among these."
        )
    return import_module(f".{name}", __name__)


def open_engines(package: "ModelPackage", how: "Inference") -> "tuple[Engine, ...]":
    """An engine for every fold of the package, in its order, by the way that `how.engine` names."""
    engines: tuple[Engine, ...] = load(how.engine).open(package, how)
    return engines
