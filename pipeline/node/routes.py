"""What a hospital wants done with its studies: who may send them, which package sees which series, where results go."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .rules import Preference, Rule


@dataclass(frozen=True, kw_only=True)
class Route:
    """One package for one kind of study. A study takes every route that is open to it."""

    package: Path
    """The package's folder. The node works with a copy of its own, made when it starts."""
    before: Path | None = None
    """The package before, to roll back to. Packages that this route worked with earlier are remembered without."""
    shadow: Path | None = None
    """Another package that sees the same scans after the results are sent: compared with them, and never sent itself."""
    take: dict[str, Rule]
    """What the series of each of the package's channels must be, by the channel's name."""
    prefer: Preference = "most_slices"
    """Which series is taken of several that fit: most_slices, thinnest, or all (each is a case of its own)."""
    sources: tuple[str, ...] = ()
    """Peers whose studies take this route; none named: everybody's."""
    outputs: tuple[str, ...] = ("dicom_seg", "structured_report", "secondary_capture")
    """What is written for each case: files of pipeline/outputs/. Whatever of it is DICOM is sent."""
    output_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of single outputs."""
    targets: tuple[str, ...] = ()
    """Peers that results are sent to."""
    folder: Path | None = None
    """Where results are put as files, too: a folder per case under its key, whole or not at all."""
    proof: Literal["read_back", "commitment", "none"] = "read_back"
    """How it is known that a target kept them: it is asked for what it has; it vouches for them (storage commitment); or
    not at all."""
    vouch_s: float = 86400.0
    """How long a target may take to vouch before it is asked anew: some archives do so in the night."""
    priority: int = 5
    """From 1, before all others, to 9."""

    def __post_init__(self) -> None:
        if not self.take:
            raise ValueError(
                "a route takes no series; rules for each of its package's channels are needed. Write `take`."
            )
        if self.vouch_s <= 0:
            raise ValueError(f"vouch_s is {self.vouch_s}; it must be above 0.")
        if not 1 <= self.priority <= 9:
            raise ValueError(f"a route's priority is {self.priority}; it must be 1 (first) to 9.")


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """When a study counts as whole."""

    quiet_s: float = 60.0
    """After so long without a new object, where its source does not say how many there are."""
    settled_s: float = 3.0
    """After so long, where its source says that all are here: some send an object twice."""
    cap_s: float = 1800.0
    """A study that its source says is not whole is worked on after so long without a new object, and the result says so."""
    ask_every_s: float = 30.0
    """How often a source is asked."""

    def __post_init__(self) -> None:
        if not 0 < self.settled_s <= self.quiet_s <= self.cap_s:
            raise ValueError(
                f"settled_s {self.settled_s}, quiet_s {self.quiet_s} and cap_s {self.cap_s} were given; each must be above 0 "
                "and no shorter than the one before."
            )


@dataclass(frozen=True, kw_only=True)
class Working:
    """What the node may spend on a case, and how often it tries."""

    workers: int = 1
    """Cases at once; each has a process of its own."""
    memory_gb: float = 8.0
    """What a case may take at most, beside the libraries themselves."""
    seconds: float = 3600.0
    """How long a case may take."""
    attempts: int = 5
    """How often anything else is tried before it is a dead letter."""
    target_attempts: int = 20
    """How often a target is tried: 20 are eleven hours, by the pauses here, for an archive that is away in the night."""
    first_pause_s: float = 10.0
    """Before the second try; before each further one twice as long."""
    longest_pause_s: float = 3600.0
    silent_s: float = 60.0
    """A process of the node that has said nothing for so long is dead, and others finish what it had begun. Longer than a
    database may be away: one that was thought dead and was not costs work twice, never a result."""

    def pause(self, tried: int) -> float:
        """Seconds until the next try, after so many."""
        return min(self.longest_pause_s, self.first_pause_s * 2.0 ** (tried - 1))
