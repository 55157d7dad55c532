"""What a network says in training, when it has more to say than logits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """Logits of several resolutions, and losses of the network's own that need no truth: reconstruction, guidance.

    A network that has none returns a list of logits alone.
    """

    logits: Sequence[Tensor]
    """[B, K, D, H, W] each, finest first."""
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    """Scalars by name, weighted by the network; training adds them up and tracks each."""
    weights: Sequence[float] = ()
    """How much each of the logits counts, as the paper has it; empty: each half as much as the next finer one."""
