"""What trained networks say of every tile of a slide: training measures with it, and a class map is drawn from it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from networks.parts.bags import Bags

from .scores import softmax


@dataclass(frozen=True, kw_only=True, eq=False)
class TileAnswers:
    """Of the tiles that were asked about."""

    logits: Float[np.ndarray, "tile class"]
    """Mean over the members, before the temperature."""
    probabilities: Float[np.ndarray, "tile class"]
    """Calibrated: of the logits divided by the temperature."""

    @property
    def predicted(self) -> Int[np.ndarray, " tile"]:
        """The class with the greatest logit."""
        return self.logits.argmax(axis=1)


@torch.no_grad()
def answer_tiles(
    networks: Sequence[nn.Module], temperature: float, bags: Bags, centres: Int[Tensor, " tile"] | None = None
) -> TileAnswers:
    """The mean of the members' answers to these tiles, to every tile where none are named."""
    assert not any(network.training for network in networks), "dropout is for training"
    logits = np.mean([network(bags, centres).double().cpu().numpy() for network in networks], axis=0)
    return TileAnswers(logits=logits, probabilities=softmax(logits / temperature))
