"""Everything once, on patients that hilum makes up itself: the fastest honest look at what it does."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from preprocessing import dicom, files
from preprocessing.phantoms import CHANNELS, LABELS, body, phantom
from preprocessing.volume import Case

from .batch import segment
from .checking import check
from .config import Segment, Train
from .errors import UsageError
from .evaluation import Evaluation, evaluate
from .planning import plan
from .progress import Progress, silent
from .report import Report, millilitres
from .results import Batch
from .slides.demonstration import SlideDemo, demo_slides
from .training import train

TRAINED, UNSEEN = range(1, 21), range(101, 105)
"""Seeds of the patients trained on, and of those the package is shown for the first time."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Where to look, and what came out."""

    folder: Path
    evaluation: Evaluation
    batch: Batch[Report]
    tracking_uri: str
    known_ml: dict[str, dict[str, float]]
    """Per unseen patient: the exact millilitres of each label, by geometry."""
    slides: SlideDemo


def demo(out: Path, minutes: float = 2.25, progress: Progress = silent) -> Demo:
    """Make patients, check, plan, train, segment unseen ones from DICOM and NIfTI, evaluate; then whole slides. All of it inside `out`."""
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty; the demo needs a new folder. Remove it, or give another --out.")
    dataset, unseen, references = out / "dataset", out / "unseen", out / "references"
    write_dataset(dataset, TRAINED, progress)
    _write_unseen(unseen, references, progress)
    findings = check(dataset, progress=progress).findings
    assert not findings, findings
    plan(dataset, out / "plan.yaml", progress=progress)
    uri = f"sqlite:///{(out / 'mlflow.db').resolve()}"
    settings = Train(plan=out / "plan.yaml", minutes=minutes, tracking_uri=uri, cache=out / "cache")
    train(dataset, out / "package", settings, progress)
    shutil.rmtree(out / "cache")
    batch = segment([unseen], "models:/phantoms@latest", out / "segmented", Segment(tracking_uri=uri), progress)
    scores = evaluate(out / "segmented", references, out / "evaluation.json")
    known = {f"phantom_{seed:03d}": body(seed).known_ml() for seed in UNSEEN}
    slides = demo_slides(out / "slides", uri, progress)
    return Demo(folder=out, evaluation=scores, batch=batch, tracking_uri=uri, known_ml=known, slides=slides)


def write_dataset(folder: Path, patients: Sequence[int], progress: Progress) -> None:
    """An nnU-Net v2 folder of these patients: one file per channel, labels beside them, dataset.json."""
    for done, seed in enumerate(patients, start=1):
        case = phantom(seed)
        for number in range(len(CHANNELS)):
            _write_channel(case, number, folder / "imagesTr" / f"{case.id}_{number:04d}.nii.gz")
        _write_labels(case, folder / "labelsTr" / f"{case.id}.nii.gz")
        progress("make patients", done, len(patients))
    description = {
        "name": "phantoms",
        "channel_names": {str(number): name for number, name in enumerate(CHANNELS)},
        "labels": {"background": 0} | LABELS,
        "numTraining": len(patients),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2))


def _write_unseen(folder: Path, references: Path, progress: Progress) -> None:
    """The first half arrive as DICOM series, the rest as NIfTI: a folder per patient, named channels inside."""
    for done, seed in enumerate(UNSEEN):
        case = phantom(seed)
        for number, name in enumerate(CHANNELS):
            if done < len(UNSEEN) / 2:
                channel = case.image.with_voxels(case.image.voxels[number : number + 1], channels=(name,))
                dicom.write_series(channel, folder / case.id / name, description=name, study=case.id)
            else:
                _write_channel(case, number, folder / case.id / f"{name}.nii.gz")
        _write_labels(case, references / f"{case.id}.nii.gz")
        progress("make unseen patients", done + 1, len(UNSEEN))


def _write_channel(case: Case, number: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = case.image.voxels[number : number + 1]
    files.write(case.image.with_voxels(voxels, channels=(CHANNELS[number],)), path)


def _write_labels(case: Case, path: Path) -> None:
    assert case.labels is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(case.labels, path, is_labels=True)


def where_to_look(made: Demo) -> str:
    """The last words of the demo."""
    lines = ["label        true ml   found ml   (each unseen patient in turn)"]
    reports = {row.case_id: row.report for row in made.batch.rows if row.report}
    for name in LABELS:
        for case, known in made.known_ml.items():
            found = reports[case].volumes_ml[name] if case in reports else float("nan")
            lines.append(f"{name:<10} {millilitres(known[name]):>10} {millilitres(found):>10}")
    folder = made.folder
    places = {
        folder / "segmented" / "index.html": "every unseen patient: picture, millilitres, warnings",
        folder / "package" / "card.md": "the trained package, and what it is worth",
        folder / "slides" / "classified" / "index.html": "every unseen slide: answer, heatmap, tiles",
        folder / "plan.yaml": "how the scans are prepared, each number with its reason",
        f"hilum ui --tracking_uri {made.tracking_uri}": "both trainings in MLflow: curves, pictures",
    }
    width = max(len(str(place)) for place in places)
    lines += [
        "",
        f"mean Dice on patients it had never seen: {made.evaluation.mean_dice:.3f}",
        made.slides.told(),
        "",
        "look at",
        *(f"  {place!s:<{width}}  {what}" for place, what in places.items()),
    ]
    return "\n".join(lines)
