"""What speed costs a package: Dice of held-out cases against seconds, way by way, and which way is chosen."""

from dataclasses import dataclass

from preprocessing.records import BadRecord

BEARABLE = 0.002
"""Of mean Dice: what a faster way may lose. Trainings of one network from two seeds differ by several times that."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One way to look at scans, and what came of it."""

    overlap: float
    flips: bool
    precision: str
    dice: float
    """The mean over labels of the mean over held-out cases, without post-processing."""
    agreement: float
    """The same, its labels not against the truth but against those that float32 gives with the same windows."""
    seconds: float
    """The mean over cases, for one fold's network: from the prepared scan to labels on its own grid."""

    @property
    def words(self) -> str:
        flips = ", mirrored and averaged" if self.flips else ""
        return f"overlap {self.overlap:g}{flips}"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What `hilum tune` measured."""

    points: tuple[Point, ...]
    cases: int
    """Held-out cases, each answered by the network that had not seen it."""
    folds: tuple[str, ...]
    """Whose they were."""
    machine: str
    """What the seconds are true of."""

    def __post_init__(self) -> None:
        if not any(point.precision == "float32" for point in self.points):
            raise BadRecord(
                "a curve without a point in float32 was met; one at least is needed. Tune the package again."
            )

    @property
    def best(self) -> Point:
        """Of all ways, whatever it takes."""
        return max(self.points, key=lambda point: (point.dice, -point.seconds))

    def changed(self, overlap: float, flips: bool, precision: str) -> float | None:
        """How far labels in this precision agree with those of float32; None where nobody measured that."""
        way = (overlap, flips, precision)
        return next((one.agreement for one in self.points if (one.overlap, one.flips, one.precision) == way), None)

    def choice(self, precision: str = "float32") -> Point:
        """The quickest in this precision that loses no more than BEARABLE to the best of all; where all do, the best of
        them. In a precision that was not measured, what float32 would take."""
        of_kind = [point for point in self.points if point.precision == precision]
        if not of_kind:
            return self.choice()
        best = self.best.dice
        bearable = [point for point in of_kind if point.dice >= best - BEARABLE]
        if not bearable:
            return max(of_kind, key=lambda point: (point.dice, -point.seconds))
        # scans no larger than a window took the same whatever the overlap: of such the one that larger scans need
        return min(bearable, key=lambda point: (point.seconds, -point.dice, -point.overlap))
