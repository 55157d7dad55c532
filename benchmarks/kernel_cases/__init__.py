"""What each kernel is timed on, a file per kernel: real sizes, what moves at least, and who else does it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Work = Callable[[], Any]
"""Does it once. What it allocates is measured beside its time."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one size, in one direction."""

    name: str
    """The size and the direction as a person says them: 4,096 tokens, width 64 + 8, forward and backward."""
    make: Callable[[str, str], dict[str, Work]]
    """make(device, dtype): inputs are made here, outside the time; each entrant by name: `ours`, `reference`, `eager` (what
    people write), `compiled` (torch.compile of eager), and peers. A peer that is not installed raises ImportError when
    it is first called."""
    bytes_moved: int = 0
    """What must be read and written at least, counted for 4 bytes a number; halves count half."""
    fixed_bytes: int = 0
    """The same, of what is float32 or whole numbers in every type."""
    flops: int = 0
    """Multiplications and additions of matrix products, two per multiply-add."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32",)
    goal: str = ""
    """What is promised: 'at least 3 times eager'."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Anything else the table should say."""
