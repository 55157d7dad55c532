"""Attention that can be looked at: maps are made when somebody asks, and cost nothing when nobody does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Attentive(nn.Module):
    """A module with an attention of its own. It calls `show` with a function that makes the map."""

    def __init__(self) -> None:
        super().__init__()
        self.is_watched = False
        self.seen: Tensor | None = None

    def show(self, draw: Callable[[], Tensor]) -> None:
        """[B, ...]: a weight per place or per channel, larger where the module looks more."""
        if self.is_watched:
            self.seen = draw().detach()


def attention_maps(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each attention of the network does with this input, by the module's name; one that was not run is left out.

    No gradient, mode or weight is touched.
    """
    with _watched(network) as modules, torch.no_grad(), _in_use(network):
        network(x)
        return {name: module.seen for name, module in modules.items() if module.seen is not None}


@contextmanager
def _watched(network: nn.Module) -> Iterator[dict[str, Attentive]]:
    modules = {name: module for name, module in network.named_modules() if isinstance(module, Attentive)}
    for module in modules.values():
        module.is_watched = True
    try:
        yield modules
    finally:
        for module in modules.values():
            module.is_watched, module.seen = False, None


@contextmanager
def _in_use(network: nn.Module) -> Iterator[None]:
    """`eval` for the while, each module back in its own mode afterwards: parts may be frozen."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
