"""How an operation becomes one of torch's own: known to autograd, autocast, torch.compile and torch.export."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.library import CustomOpDef


def operation(name: str, *, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Registers a function as `hilum::name`; its annotations become the schema. Give it a `register_fake`, and, if it is
    not the backward of another, a `register_autograd`.

    Autocast is off inside: an operation says itself in which precision it sums.
    """

    def register(function: Callable[..., Any]) -> CustomOpDef:
        @functools.wraps(function)
        def precisely(*arguments: Any) -> Any:
            kinds = {value.device.type for value in arguments if isinstance(value, torch.Tensor)}
            if not any(torch.is_autocast_enabled(kind) for kind in kinds):
                return function(*arguments)
            with torch.autocast(kinds.pop(), enabled=False):
                return function(*arguments)

        return torch.library.custom_op(f"hilum::{name}", precisely, mutates_args=tuple(mutates))

    return register
