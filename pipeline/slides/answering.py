"""What trained networks say of one slide, and which tiles say it: one forward pass for the answer and for its heatmap."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from networks.parts.bags import BagAnswer, Bags

from .feature_file import FeatureFile
from .scores import softmax


@dataclass(frozen=True, kw_only=True, eq=False)
class SlideAnswer:
    """Of one slide. probabilities = softmax((rest + the sum of shares) / temperature), where shares were asked for.

    Logits, shares and rest are told as differences from their mean over classes, which no probability sees: else a tile
    that raises all classes alike would look as if it spoke for one of them.
    """

    logits: Float[np.ndarray, " class"]
    """Mean over the members, before the temperature."""
    probabilities: Float[np.ndarray, " class"]
    """Calibrated: of the logits divided by the temperature."""
    attention: Float[np.ndarray, " tile"]
    """Mean over members and their branches; sums to 1."""
    shares: Float[np.ndarray, "tile class"] | None = None
    """What each tile adds to the logits."""
    rest: Float[np.ndarray, " class"] | None = None
    """What no tile adds."""

    @property
    def predicted(self) -> int:
        """The class with the greatest logit: the temperature changes no decision."""
        return int(self.logits.argmax())

    @property
    def entropy(self) -> float:
        """Of the attention, as a share of what it would be were all tiles equal: 1 looks everywhere, 0 at one tile."""
        likely = self.attention[self.attention > 0]
        return float(-(likely * np.log(likely)).sum() / np.log(max(2, len(self.attention))))

    def top_mass(self, tiles: int) -> float:
        """The attention that so many tiles have, those with the most of it."""
        return float(np.sort(self.attention)[::-1][:tiles].sum())


def answer(networks: Sequence[nn.Module], temperature: float, bags: Bags, explain: bool = True) -> SlideAnswer:
    """The mean of the members' answers to one bag. Training measures with it, classification reports and draws with it.

    What each adds is averaged as the logits are, so shares and rest still add up to them.
    """
    assert len(bags) == 1 and len(bags.features), "one slide, with at least one tile"
    said = [_asked(network, bags, explain) for network in networks]
    logits = _centred(_mean([one.logits[0] for one in said]))
    return SlideAnswer(
        logits=logits,
        probabilities=softmax(logits / temperature),
        attention=_mean([one.attention(bags).mean(1) for one in said]),
        shares=_centred(_mean([one.shares for one in said if one.shares is not None])) if explain else None,
        rest=_centred(_mean([one.rest[0] for one in said if one.rest is not None])) if explain else None,
    )


def bag_of(file: FeatureFile, device: torch.device | str = "cpu") -> Bags:
    """The bag of a slide. On the CPU its features stay in the mapped file; a GPU gets them once, in half precision."""
    features, grid = torch.from_numpy(file.features()), torch.from_numpy(file.grid)
    return Bags.of(features.to(device), grid.to(device))


def without(bags: Bags, keep: Bool[Tensor, " tile"]) -> Bags:
    """The bags with these tiles alone; every bag must keep one."""
    keep = keep.to(bags.features.device)
    kept = torch.stack([part.sum() for part in keep.split(bags.offsets.diff().tolist())]).cpu()
    assert bool((kept > 0).all()), "a bag without tiles has no answer"
    return Bags(
        features=bags.features[keep],
        offsets=torch.cat([kept.new_zeros(1), kept.cumsum(0)]),
        grid=None if bags.grid is None else bags.grid[keep],
    )


@torch.no_grad()
def _asked(network: nn.Module, bags: Bags, explain: bool) -> BagAnswer:
    assert not network.training, "dropout and masks are for training"
    return network(bags, explain=explain)


def _centred(values: Float[np.ndarray, "*tiles class"]) -> Float[np.ndarray, "*tiles class"]:
    return values - values.mean(axis=-1, keepdims=True)


def _mean(values: Sequence[Tensor]) -> Float[np.ndarray, "..."]:
    """In double precision: a hundred thousand shares must still add up."""
    total = torch.zeros(values[0].shape, dtype=torch.float64, device=values[0].device)
    for value in values:
        total += value.detach()
    return (total / len(values)).cpu().numpy()
