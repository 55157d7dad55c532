"""How far a long piece of work has come: told by the verbs, shown by whoever called them."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Called with what is being done, how much of it is done, of how much, and a few words on the state."""

    def __call__(self, stage: str, done: float, of: float, note: str = "") -> None: ...


def silent(stage: str, done: float, of: float, note: str = "") -> None:
    """For callers who do not watch."""
