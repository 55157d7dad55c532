"""What runs a trained network: windows in, logits out, one engine per fold. Each file here is a way to do it, by its name.

A file has `open(package, how)`, which makes an engine of every fold; nothing else makes it one. Whatever is done for speed,
precision and layout is done inside an engine: who asks it only knows windows and logits.
"""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ..errors import UsageError
from ..shelf import Shelf

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


_shelf = Shelf(package=__name__, places=__path__, kind="engine", refusal=UsageError)
available, load = _shelf.available, _shelf.load


def open_engines(package: "ModelPackage", how: "Inference") -> "tuple[Engine, ...]":
    """An engine for every fold of the package, in its order, by the way that `how.engine` names."""
    engines: tuple[Engine, ...] = load(how.engine).open(package, how)
    return engines
