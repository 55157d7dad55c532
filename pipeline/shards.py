"""A part of many cases: the i-th of n, as the tasks of an array job share a night's work."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Case = TypeVar("Case")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One of so many parts, counted from 1."""

    number: int
    of: int

    @staticmethod
    def parse(words: str) -> "Shard | None":
        """What `3/8` means; None of nothing."""
        if not words:
            return None
        number, _, of = words.partition("/")
        if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise ValueError(
                f"shard is {words!r}; i/n is needed, the i-th of n parts counted from 1, as 3/8. In an array job of SLURM "
                "whose tasks are numbered 1-8 that is --shard $SLURM_ARRAY_TASK_ID/8."
            )
        return Shard(number=int(number), of=int(of))

    def part(self, cases: Sequence[Case]) -> list[Case]:
        """Every n-th case: neighbours, which are often of one size, go to different machines."""
        return list(cases[self.number - 1 :: self.of])
