"""Scans in, reports out: the verbs, each one a function with the meaning of the command of its name.

The functions live in the rooms of this floor and are brought in when first used, so that importing the floor costs
nothing: `from pipeline import segment` loads torch, `hilum --help` does not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import segment
    from .checking import check
    from .contest import compare
    from .conversion import convert
    from .demonstration import demo
    from .description import show
    from .evaluation import evaluate
    from .planning import plan
    from .tracking import serve as ui
    from .training import train

__all__ = ["check", "compare", "convert", "demo", "evaluate", "plan", "segment", "show", "train", "ui"]

_HOMES = {
    "check": ("checking", "check"),
    "compare": ("contest", "compare"),
    "convert": ("conversion", "convert"),
    "demo": ("demonstration", "demo"),
    "evaluate": ("evaluation", "evaluate"),
    "plan": ("planning", "plan"),
    "segment": ("batch", "segment"),
    "show": ("description", "show"),
    "train": ("training", "train"),
    "ui": ("tracking", "serve"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    room, function = _HOMES[name]
    return getattr(import_module(f".{room}", __name__), function)
