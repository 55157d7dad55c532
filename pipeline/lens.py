"""Networks, and how they are looked through: folds and mirrored passes together see one window as one model does."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from preprocessing.plan import Plan

from .attribution import AVERAGING, CAMS, Layer, Score, channel_weights, chosen_layer, feel, see
from .prediction import Inference, mirrorings


@dataclass(frozen=True, kw_only=True, eq=False)
class Lens:
    """Networks, and how they are looked through."""

    networks: tuple[nn.Module, ...]
    temperatures: tuple[float, ...]
    mirrorings: tuple[tuple[int, ...], ...]
    """The axes of [1, C, i, j, k] that each pass mirrors."""
    has_regions: bool
    method: str
    layer: Layer | None
    """None of methods that go back to the scan."""

    @staticmethod
    def through(
        networks: Sequence[nn.Module], temperatures: Sequence[float], plan: Plan, how: Inference,
        method: str, layer: str,
    ) -> "Lens":  # fmt: skip
        """The layer of that name or, where the method looks at one and none is named, the one that suits it best."""
        is_cam = method in CAMS
        return Lens(
            networks=tuple(networks),
            temperatures=tuple(temperatures) or (1.0,) * len(networks),
            mirrorings=tuple(mirrorings(how)),
            has_regions=plan.has_regions,
            method=method,
            layer=chosen_layer(networks[0], len(plan.channels), plan.patch, layer) if is_cam else None,
        )

    @property
    def layer_name(self) -> str:
        return self.layer.name if self.layer else "input"

    def look(
        self, window: Float[Tensor, "channel i j k"], weight: Float[Tensor, "i j k"], channel: int,
        pooled: "Sequence[np.ndarray]" = (),
    ) -> "Look":  # fmt: skip
        """What the networks see in a window; `weight` says how much the margin in each voxel counts, `pooled` what a method
        that averages has made of all windows, where there are several."""
        if self.method in AVERAGING and not pooled:
            pooled = self.weighed(window, weight, channel)
        total, score = torch.zeros(weight.shape), 0.0
        gradients, sizes = [torch.zeros(1)] * len(self.networks), [0.0] * len(self.networks)
        for number, network, axes, x, score_of, share in self._passes(window, weight, channel):
            seen = see(network, x, score_of, self.method, self.layer_name, pooled[number] if pooled else None)
            total += share * seen.map.flip([axis - 2 for axis in axes])
            score += share * seen.score
            gradients[number] = gradients[number] + share * seen.gradient
            sizes[number] += share * seen.size
        return Look(map=total, score=score, gradients=gradients, sizes=sizes)

    def score(self, window: Float[Tensor, "channel i j k"], weight: Float[Tensor, "i j k"], channel: int) -> float:
        with torch.no_grad():
            return sum(
                share * float(score_of(network(x[None])[0].float()))
                for _, network, _, x, score_of, share in self._passes(window, weight, channel)
            )

    def weighed(
        self, window: Float[Tensor, "channel i j k"], weight: Float[Tensor, "i j k"], channel: int
    ) -> list[np.ndarray]:
        """Of methods that average: what each network's channels weigh in this window."""
        weights: list[np.ndarray] = [np.zeros(1)] * len(self.networks)
        counts = float(weight.sum())  # grad-cam++ adds a constant to what it divides by: gradients must be of a size
        for number, network, _, x, score_of, _ in self._passes(window, weight / counts, channel):
            felt = feel(network, x, score_of, self.layer_name)
            weights[number] = weights[number] + channel_weights(self.method, felt) * counts / len(self.mirrorings)
        return weights

    def _passes(
        self, window: Float[Tensor, "channel i j k"], weight: Float[Tensor, "i j k"], channel: int
    ) -> Iterator[tuple[int, nn.Module, tuple[int, ...], Tensor, Score, float]]:
        """Each network, each mirroring of the window: which, the window, its score, and what of it counts."""
        for number, (network, temperature) in enumerate(zip(self.networks, self.temperatures, strict=True)):
            device = next((parameter.device for parameter in network.parameters()), window.device)
            for axes in self.mirrorings:
                x = window.to(device).flip([axis - 1 for axis in axes])
                score = self._score(weight.to(device).flip([axis - 2 for axis in axes]), channel)
                yield number, network, axes, x, score, 1 / (temperature * len(self.networks) * len(self.mirrorings))

    def _score(self, weight: Float[Tensor, "i j k"], channel: int) -> Score:
        def scored(logits: Tensor) -> Tensor:
            own = logits[channel]
            if self.has_regions:
                return (own * weight).sum()
            others = (logits.sum(dim=0) - own) / (len(logits) - 1)
            return ((own - others) * weight).sum()

        return scored


@dataclass(frozen=True, kw_only=True, eq=False)
class Look:
    """What all networks saw in one window, or in all windows together."""

    map: Float[Tensor, "i j k"]
    score: float
    gradients: Sequence[Tensor]
    """Per network, per channel of its layer."""
    sizes: Sequence[float]

    def and_then(self, other: "Look") -> "Look":
        """Both, but for the map."""
        gradients = [mine + its for mine, its in zip(self.gradients, other.gradients, strict=True)]
        sizes = [mine + its for mine, its in zip(self.sizes, other.sizes, strict=True)]
        return replace(self, score=self.score + other.score, gradients=gradients, sizes=sizes)

    @property
    def health(self) -> float | None:
        """|mean gradient| / mean |gradient|, the mean over networks; None where no layer was looked at."""
        ratios = [
            float(gradient.abs().sum()) / size
            for gradient, size in zip(self.gradients, self.sizes, strict=True)
            if size
        ]
        return sum(ratios) / len(ratios) if ratios else None
