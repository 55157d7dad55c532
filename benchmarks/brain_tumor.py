"""Four contrasts of MR as DICOM series, a tumour mask as another: trained, segmented and scored by hilum's own commands.

`--data` has a folder per patient, in it one per study, in it a folder per series whose name holds T1pre, T1post, T2, FLAIR or
Mask (Brain-Tumor-Progression of The Cancer Imaging Archive is meant: three studies of two patients are enough to show that
it works from end to end, and too few to say which network is better). Each patient in turn is held out: `hilum train` on a
CSV of the series folders, `hilum segment` on the held-out studies, `hilum evaluate` against their masks. All networks take
the same number of steps.
"""

import argparse
import csv
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from peers import HILUM, environment, machine, our_versions, watch

CHANNELS = {"T1": "T1pre", "T1post": "T1post", "T2": "T2", "FLAIR": "FLAIR"}
"""Channel and what its series' folder has in its name."""
MASK = "Mask"
LABEL = "tumour"


@dataclass(frozen=True, kw_only=True)
class Study:
    """One case: a patient's scans of one day."""

    id: str
    patient: str
    series: dict[str, Path]
    mask: Path


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--data", type=Path, help="the folder of patients; without it nothing is measured")
    words.add_argument("--networks", default="residual_unet,frequency_unet")
    words.add_argument("--epochs", type=int, default=40, help="of 20 steps of two windows")
    words.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "brain_tumor.md")
    said = words.parse_args()
    if not said.data:
        print("No data was given; this benchmark makes up none. --data names the folder of patients.")
        return
    studies = list(found(said.data))
    rows = []
    with tempfile.TemporaryDirectory(prefix="brain-tumor-") as folder:
        for network in said.networks.split(","):
            for fold, patient in enumerate(sorted({study.patient for study in studies})):
                rows += run(network, patient, studies, said.epochs, Path(folder) / f"{network}-{fold}")
                said.results.write_text(shown := table(rows, said.epochs))
    print(shown)


def found(data: Path) -> Iterator[Study]:
    folders = sorted(study for patient in data.iterdir() if patient.is_dir() for study in patient.iterdir())
    for number, folder in enumerate(folders):
        series = {channel: named(folder, word) for channel, word in CHANNELS.items()}
        yield Study(id=f"study{number}", patient=folder.parent.name, series=series, mask=named(folder, MASK))


def named(folder: Path, word: str) -> Path:
    matching = [each for each in folder.iterdir() if word in each.name]
    assert len(matching) == 1, f"{folder.name} has {len(matching)} series called {word}; one is needed"
    return matching[0]


def run(network: str, held_out: str, studies: Sequence[Study], epochs: int, folder: Path) -> list[dict[str, object]]:
    """One training on all patients but one, and what it finds in that one's studies."""
    folder.mkdir()
    home = environment(HILUM_HOME=folder / "home")
    others = [study for study in studies if study.patient == held_out]
    training = describe([study for study in studies if study.patient != held_out], folder / "train")
    references = describe(others, folder / "references")
    words = ["--network", network, "--epochs", str(epochs), "--fold", "all", "--device", "cpu"]
    trained = watch([*HILUM, "train", training, *words, "--out", folder / "package"], folder, home)
    scans = linked(others, folder / "scans")
    segmenting = ["segment", scans, "--package", folder / "package", "--out", folder / "found", "--device", "cpu"]
    segmented = watch([*HILUM, *segmenting], folder, home)
    watch([*HILUM, "evaluate", folder / "found", references, "--out", folder / "scores.json"], folder, home)
    scores = json.loads((folder / "scores.json").read_text())
    return [
        {
            "network": network,
            "held out": case["case"],
            "trained on": len(studies) - len(others),
            "scores": case["labels"][LABEL],
            "minutes of training": trained.seconds / 60,
            "seconds per scan": segmented.seconds / len(others),
        }
        for case in scores["cases"]
    ]


def describe(studies: Sequence[Study], folder: Path) -> Path:
    """The studies as a CSV of series folders, and the mask's name beside it."""
    folder.mkdir()
    with (folder / "brain.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["id", *CHANNELS, "labels", "patient"])
        for study in studies:
            rows.writerow([study.id, *(study.series[channel] for channel in CHANNELS), study.mask, study.patient])
    (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, LABEL: 1}}))
    return folder / "brain.csv"


def linked(studies: Sequence[Study], folder: Path) -> Path:
    """A folder per study with a series folder per channel, called as the channel: what `segment` brings together."""
    for study in studies:
        (folder / study.id).mkdir(parents=True)
        for channel, series in study.series.items():
            (folder / study.id / channel).symlink_to(series.resolve())
    return folder


def table(rows: Sequence[dict[str, object]], epochs: int) -> str:
    head = ["", "held out", "Dice", "HD95 mm", "ml found", "ml true", "min of training", "s per scan"]
    lines = [f"## Brain tumours in four contrasts, DICOM in and out: {epochs} epochs of 20 steps", ""]
    lines += [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *(map(cells_of, rows)))]
    told = machine()
    lines += [
        "",
        "Trained on the other patient's studies alone: it shows that all works from end to end, not which is better.",
        "",
        f"Measured {datetime.now(UTC):%Y-%m-%d} on {told['chip']}, {told['cores']} cores, {told['platform']}, "
        f"load {told['load']} at the end.",
        "",
        f"Versions: {', '.join(f'{name} {version}' for name, version in our_versions().items())}.",
    ]
    return "\n".join(lines) + "\n"


def cells_of(row: dict[str, object]) -> list[str]:
    scores = row["scores"]
    assert isinstance(scores, dict)
    numbers = [scores["dice"], scores["hd95_mm"], scores["predicted_ml"], scores["reference_ml"]]
    told = ["-" if number is None else f"{number:.3g}" for number in numbers]
    return [
        str(row["network"]),
        str(row["held out"]),
        *told,
        f"{row['minutes of training']:.1f}",
        f"{row['seconds per scan']:.1f}",
    ]


if __name__ == "__main__":
    main()
