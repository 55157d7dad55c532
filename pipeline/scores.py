"""What an evaluation says: a score per case and label, a summary per label, and in words what each number means."""

from dataclasses import dataclass

from .metrics import Measure
from .significance import Difference, Spread


@dataclass(frozen=True, kw_only=True)
class Score:
    """One label of one case. None: there is nothing to measure (see the conventions)."""

    case_id: str
    label: str
    dice: float | None
    iou: float | None
    nsd: float | None
    hd95_mm: float | None
    assd_mm: float | None
    hd_mm: float | None
    lesion_f1: float | None
    lesion_precision: float | None
    lesion_recall: float | None
    lesions: int
    """In the reference."""
    lesions_found: int
    lesions_predicted: int
    lesions_right: int
    volume_ml: float
    reference_ml: float
    volume_error_ml: float
    """What the prediction has too much."""
    volume_error_percent: float | None
    """The same, of the reference; None where that is empty."""


MEASURED = (
    "dice", "iou", "nsd", "hd95_mm", "assd_mm", "hd_mm", "lesion_f1", "lesion_precision", "lesion_recall",
    "volume_error_ml", "volume_error_percent",
)  # fmt: skip
"""What is averaged over cases."""

TESTED = ("dice", "nsd", "hd95_mm", "assd_mm", "lesion_f1")
"""What two predictions are told apart by."""

WORDS = {
    "dice": "Dice",
    "iou": "IoU",
    "nsd": "NSD",
    "hd95_mm": "HD95 mm",
    "assd_mm": "ASSD mm",
    "hd_mm": "HD mm",
    "lesion_f1": "lesion F1",
    "lesion_precision": "lesion precision",
    "lesion_recall": "lesion recall",
    "volume_error_ml": "volume error ml",
    "volume_error_percent": "volume error %",
}


def less_is_better(metric: str) -> bool:
    """Of distances; of everything else that is tested more is."""
    return metric.endswith("_mm")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One label over all cases."""

    label: str
    cases: int
    """In which the label was in the prediction, in the reference, or in both."""
    missed: int
    """Cases with a reference and no prediction of it: distances know nothing of these."""
    invented: int
    """Cases with a prediction and no reference of it."""
    of: dict[str, Spread]
    """Each of MEASURED, over the cases that could be measured."""

    @property
    def dice(self) -> float | None:
        return self.of["dice"].mean

    @property
    def nsd(self) -> float | None:
        return self.of["nsd"].mean

    @property
    def hd95_mm(self) -> float | None:
        return self.of["hd95_mm"].mean


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Every case that was compared, every one that could not be, and why."""

    measure: Measure
    """The spacing in it is of no case."""
    mean_dice: float | None
    """Mean over labels of their mean Dice: a rare label weighs as much as a common one."""
    mean_dice_interval: tuple[float, float] | None
    summary: tuple[Summary, ...]
    scores: tuple[Score, ...]
    failed: dict[str, str]
    """Case to reason."""
    unmatched_predictions: tuple[str, ...]
    unmatched_references: tuple[str, ...]
    partly_annotated: tuple[str, ...] = ()
    """Cases in which only some labels were looked for: they are measured by those alone."""
    left_out: tuple[str, ...] = ()
    """Names that DICOM objects hold and that are none of the labels."""
    against: dict[str, dict[str, Difference]] | None = None
    """This prediction minus another one: metric, label, difference."""
    other: "Evaluation | None" = None
    """The other one."""

    @property
    def tolerance_mm(self) -> float:
        return self.measure.tolerance_mm

    @property
    def cases(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(score.case_id for score in self.scores))


def conventions(measure: Measure) -> dict[str, str]:
    """What the numbers mean, in words."""
    surface = {
        "voxels": "centres of a label's voxels with a face towards another label or out of the image, all of one weight (as MONAI)",
        "surfels": "corners between voxels, each of the weight of its area by marching cubes (as DeepMind's surface-distance)",
    }
    percentile = {"voxels": "interpolated", "surfels": "of the area"}
    return {
        "surface": surface[measure.surface],
        "nsd": f"share of both surfaces within {measure.tolerance_mm:g} mm of the other surface",
        "hd95_mm": f"larger of the two directed 95th percentiles of surface distances, {percentile[measure.surface]}",
        "hd_mm": "longest distance from a point of either surface to the other surface",
        "assd_mm": "mean distance over the points of both surfaces",
        "lesion": "connected part, 26 neighbours; found, or right, when it shares a voxel with the other side",
        "lesion_f1": "2 P R / (P + R) of precision (share of predicted lesions that are right) and recall (share found)",
        "volume_error": "prediction minus reference; percent of the reference, null where that is empty",
        "empty in both": "null, not counted in any mean",
        "empty in one": "Dice, IoU, NSD and lesion F1 0, counted; distances null, not counted (see missed, invented); "
        "lesion recall null without a reference, lesion precision null without a prediction",
        "ignored": "voxels under the dataset's label 'ignore' belong to no label on either side",
        "annotated": "a case with only some labels annotated is measured by these alone",
        "mean_dice": "mean over labels of their mean Dice",
        "cases": "counted as independent of each other, also those of one patient; where patients have several, intervals "
        "are too narrow and p-values too small",
        "interval": "95 % percentile bootstrap over cases, 2000 resamples, seed 0; null below 5 cases",
        "p": "Wilcoxon signed-rank, two-sided, equal cases left out; null ('too few') below 6 cases that differ; "
        "p_holm is corrected over the labels of one metric",
    }


def figure(value: float | None, digits: int) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"
