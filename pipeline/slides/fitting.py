"""One network taught on some slides, and kept from the epoch that did best on others."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

import networks
from networks.parts.bags import Bags, cross_entropy
from networks.parts.entropy import annealed, attention_entropy_loss
from preprocessing.records import BadRecord, decode, encode

from ..config import SlideTraining
from ..errors import UsageError
from ..report import write_whole
from .answering import answer, bag_of
from .package import build_network
from .table import LabelledSlide

TILES_TOGETHER = 16_384
"""Slides of one step go through the network together up to so many tiles: copying them side by side costs 32 MiB at 1,024
numbers in half precision. A larger one goes alone, from its mapped file, uncopied."""

SLIDES_SEEN, FEWEST_EPOCHS, MOST_EPOCHS = 4000, 20, 200
"""Published trainings see some hundred slides in 50 (ACMIL, AEM) to 200 epochs (CLAM, TransMIL); of few slides more are needed."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What decides a training's weights, beside its slides and its seed."""

    network: str
    network_config: dict[str, Any]
    features: int
    classes: int
    settings: SlideTraining

    def build(self) -> nn.Module:
        """The network, untrained."""
        return build_network(self.network, self.network_config, self.features, self.classes)

    def epochs(self, slides: int) -> int:
        """As many as were asked for, or as so many slides need."""
        return self.settings.epochs or int(np.clip(math.ceil(SLIDES_SEEN / slides), FEWEST_EPOCHS, MOST_EPOCHS))


@dataclass(frozen=True, kw_only=True)
class Taught:
    """What a training came to. Its checkpoint was chosen by the loss on what was held out, not by an AUROC: of a dozen slides
    that takes few values, jumps between them by luck, and is 1 in many epochs that are not equally good."""

    curves: tuple[dict[str, float], ...]
    """Of every epoch: `loss` of the slides taught, `held_out_loss` of the others, and the network's losses by name."""
    chosen: int
    """The epoch whose weights were kept, from 0."""
    logits: dict[str, tuple[float, ...]]
    """Of each slide held out, in that epoch."""
    seed: int

    @property
    def best(self) -> dict[str, float]:
        """The chosen epoch's losses."""
        return self.curves[self.chosen]


Tell = Callable[[int, dict[str, float]], None]
"""Told of each epoch its number and losses."""


def fit(
    lesson: Lesson, taught: Sequence[LabelledSlide], held_out: Sequence[LabelledSlide], seed: int, device: torch.device,
    tell: Tell,
) -> tuple[nn.Module, Taught]:  # fmt: skip
    """The network as it was after its best epoch, ready to evaluate; on a CPU the same seed gives the same weights."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        network = lesson.build().to(device)
        best, kept, curves = math.inf, None, []
        for epoch, losses in enumerate(_epochs(network, lesson, taught, seed, device)):
            logits = {slide.id: answered(network, slide, device) for slide in held_out}
            losses["held_out_loss"] = _loss(
                logits, held_out, class_weights([slide.label for slide in taught], lesson.classes)
            )
            refuse_divergence(losses, epoch)
            curves.append(losses)
            tell(epoch, losses)
            if losses["held_out_loss"] < best:
                best = losses["held_out_loss"]
                kept = (
                    epoch,
                    logits,
                    {name: value.detach().cpu().clone() for name, value in network.state_dict().items()},
                )
    assert kept is not None
    epoch, logits, state = kept
    network.load_state_dict(state)
    as_told = {name: tuple(values.tolist()) for name, values in logits.items()}
    return network.eval(), Taught(curves=tuple(curves), chosen=epoch, logits=as_told, seed=seed)


def answered(network: nn.Module, slide: LabelledSlide, device: torch.device) -> Float[np.ndarray, " class"]:
    """A network's logits of one slide, by the function that classification answers with."""
    return answer([network], 1.0, bag_of(slide.file, device), explain=False).logits


def config_of_network(settings: SlideTraining) -> dict[str, Any]:
    """Of the network; options it cannot have are told before a file is read."""
    module = networks.load_for_slides(settings.network)
    try:
        return encode(decode(module.Config, settings.network_options, where=f"network_options of {settings.network}"))
    except BadRecord:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from None


def seed_of(seed: int, part: str) -> int:
    """Each training has its own, whatever was trained before it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {part}".encode()).digest()[:4])


def keep(network: nn.Module, taught: Taught, path: Path) -> None:
    """Weights and what is known of them as one file that is there whole or not at all."""
    from safetensors.torch import save

    state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    write_whole(path, save(state, metadata={"taught": json.dumps(encode(taught))}))


def kept(lesson: Lesson, path: Path, device: torch.device) -> tuple[nn.Module, Taught]:
    """What `keep` wrote."""
    from safetensors import safe_open

    network = lesson.build()
    with safe_open(path, framework="pt") as stored:
        taught = decode(Taught, json.loads(stored.metadata()["taught"]), where=path.name)
        network.load_state_dict({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
    return network.to(device).eval(), taught


def _epochs(
    network: nn.Module, lesson: Lesson, taught: Sequence[LabelledSlide], seed: int, device: torch.device
) -> Iterator[dict[str, float]]:
    """The mean losses of each epoch, the network ready to evaluate after it."""
    settings, epochs = lesson.settings, lesson.epochs(len(taught))
    optimiser = torch.optim.AdamW(network.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    steps = math.ceil(len(taught) / settings.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * steps)
    weights = class_weights([slide.label for slide in taught], lesson.classes).to(device)
    draw = np.random.default_rng(seed)
    for epoch in range(epochs):
        network.train()
        sums: dict[str, float] = {}
        order = draw.permutation(len(taught))
        for step, first in enumerate(range(0, len(order), settings.batch)):
            batch = [taught[number] for number in order[first : first + settings.batch]]
            done = (epoch * steps + step) / (epochs * steps)
            for name, value in _step(network, optimiser, batch, weights, settings, done, device).items():
                sums[name] = sums.get(name, 0.0) + value / len(taught)
            schedule.step()
        network.eval()
        yield sums


def _step(
    network: nn.Module, optimiser: torch.optim.Optimizer, batch: Sequence[LabelledSlide], weights: Tensor,
    settings: SlideTraining, done: float, device: torch.device,
) -> dict[str, float]:  # fmt: skip
    """One change of the weights, by the mean gradient of the batch's slides; the sums of their losses."""
    optimiser.zero_grad()
    sums: dict[str, float] = {}
    for some in _portions(batch):
        bags, labels = _together(some, device), torch.tensor([slide.label for slide in some], device=device)
        said = network(bags)
        of_network: Any = network.losses  # every network for slides has them
        losses = dict(of_network(said, bags, labels, weights))
        if settings.entropy_weight:
            weight = annealed(settings.entropy_weight, done)
            losses["entropy"] = weight * attention_entropy_loss(said, bags, settings.entropy_top)
        torch.stack(tuple(losses.values())).sum().mul(len(some) / len(batch)).backward()
        told = {"loss": cross_entropy(said.logits, labels, weights)} | {f"of_{n}": value for n, value in losses.items()}
        for name, value in told.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach()) * len(some)
    optimiser.step()
    return sums


def _portions(batch: Sequence[LabelledSlide]) -> Iterator[list[LabelledSlide]]:
    """Slides that go through the network together."""
    portion: list[LabelledSlide] = []
    for slide in batch:
        if portion and sum(len(one.file) for one in (*portion, slide)) > TILES_TOGETHER:
            yield portion
            portion = []
        portion.append(slide)
    yield portion


def _together(slides: Sequence[LabelledSlide], device: torch.device) -> Bags:
    """Their bags side by side; of one slide the mapped bag itself."""
    bags = [bag_of(slide.file, device) for slide in slides]
    if len(bags) == 1:
        return bags[0]
    bounds = np.cumsum([0, *(len(slide.file) for slide in slides)])
    return replace(
        bags[0],
        features=torch.cat([one.features for one in bags]),
        offsets=torch.from_numpy(bounds),
        grid=torch.cat([one.grid for one in bags if one.grid is not None]),
    )


def class_weights(labels: Sequence[int], classes: int) -> Float[Tensor, " class"]:
    """All slides (or tiles) of a class together weigh as much as all of another; the mean over slides is 1."""
    counts = np.bincount(labels, minlength=classes)
    return torch.tensor(counts.sum() / (classes * counts), dtype=torch.float32)


def _loss(logits: dict[str, np.ndarray], slides: Sequence[LabelledSlide], weights: Float[Tensor, " class"]) -> float:
    """Weighed as in training."""
    said = torch.from_numpy(np.stack([logits[slide.id] for slide in slides])).float()
    return float(cross_entropy(said, torch.tensor([slide.label for slide in slides]), weights))


def refuse_divergence(losses: dict[str, float], epoch: int) -> None:
    """Weights that overflowed come back by no further step."""
    if not all(math.isfinite(value) for value in losses.values()):
        raise UsageError(
            f"the losses are no longer numbers after epoch {epoch + 1}; they must stay finite. Give a lower --learning_rate."
        )
