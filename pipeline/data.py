"""Prepared cases to batches: the windows of each step, and held-out cases whole."""

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

from preprocessing.augment import AUGMENTATIONS, augment, draw_turn
from preprocessing.patches import draw
from preprocessing.plan import Plan, Recipe

from .cache import PreparedCase


class Steps(Sampler[list[int]]):
    """The numbers of the windows of each step, from some step on and without end; ranks share a step between them."""

    def __init__(self, *, first: int, batch: int, rank: int = 0, ranks: int = 1):
        self.first, self.batch, self.rank, self.ranks = first, batch, rank, ranks

    def __iter__(self) -> Iterator[list[int]]:
        for step in count(self.first):
            start = (step * self.ranks + self.rank) * self.batch
            yield list(range(start, start + self.batch))


class Windows(TorchDataset[tuple[Tensor, Tensor, Tensor]]):
    """The training windows, numbered without end. Window n depends on the seed and n alone, so a resumed run sees
    exactly what an undisturbed one would have seen, whatever the number of loading processes."""

    def __init__(self, cases: Sequence[PreparedCase], plan: Plan, recipe: Recipe, *, seed: int):
        self.cases = list(cases)
        self.plan = plan
        self.recipe = recipe
        self.seed = seed

    def case_of(self, n: int) -> PreparedCase:
        """Every case once in each round, in an order of the round's own."""
        round_, place = divmod(n, len(self.cases))
        return self.cases[np.random.default_rng([self.seed, 0, round_]).permutation(len(self.cases))[place]]

    def _forced(self, n: int) -> bool | None:
        """nnU-Net decides by place: the last windows of every step lie on a label, the others anywhere."""
        if self.plan.mode != "nnunet":
            return None
        batch = self.plan.batch
        return n % batch >= round(batch * (1 - self.recipe.foreground))

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """The scan's window, its part numbers (-1: nobody knows), and which labels were looked for in that case."""
        rng = np.random.default_rng([self.seed, 1, n])
        case, patch, spacing_mm = self.case_of(n), self.plan.patch, self.plan.spacing_mm
        i, j, k = draw(case.shape, patch, case.places(), rng, foreground=self.recipe.foreground, forced=self._forced(n))
        augmentation = AUGMENTATIONS[self.recipe.augmentation]
        turn = draw_turn(rng, augmentation, spacing_mm, patch, self.recipe.mirror)
        size = turn.reach(patch, spacing_mm)
        start = [begin - (wide - side) // 2 for begin, wide, side in zip((i, j, k), size, patch, strict=True)]
        image, labels = case.window(start, size)
        seen, truth = torch.from_numpy(image), torch.from_numpy(labels)
        seen, truth = augment(seen, truth, turn, patch, spacing_mm, rng, augmentation)
        return seen, truth[0].long(), torch.tensor(case.annotated)


def whole(case: PreparedCase) -> tuple[Tensor, Tensor]:
    """A held-out case as segmentation will see it, and its part numbers."""
    return torch.from_numpy(case.image()), torch.from_numpy(case.labels()[0].astype(np.int64))
