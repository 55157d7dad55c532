"""What MLflow hears of a training on slides: curves, scores, a page, a picture, the card; and nobody's name."""

import json
from typing import Any

from preprocessing.records import encode

from .. import tracking
from ..report import as_json, hilum_version
from . import sheet
from .division import Division
from .feature_file import FeatureRecipe
from .fitting import Lesson
from .package import SlidePackage, card
from .scores import Judged, SlideScores
from .workshop import SlideWorkshop, decisive

NESTED = "nested"
"""The run above all others, that of what is reported."""


def open_tracker(
    lesson: Lesson, division: Division, workshop: SlideWorkshop, recipe: FeatureRecipe, count: int,
    part: str = NESTED, parent: tracking.Tracker | None = None,
) -> tracking.Tracker:  # fmt: skip
    """The run of a part, below `parent`; that of a resumed training goes on. It learns from so many slides or tiles."""
    settings, dataset = lesson.settings, workshop.job.dataset
    uri = settings.tracking_uri or tracking.default_uri()
    if parent is None:
        tracking.end_the_dead(uri)
    run_id = workshop.job.runs.get(part)
    tracker = tracking.open_run(
        uri=uri,
        experiment=settings.experiment or workshop.out.name,
        run_name=part if parent else f"{lesson.network}, {part}",
        params={
            "network": lesson.network,
            "folds": f"{len(division.outer)} × {len(division.members)}",
            "encoder": recipe.encoder.partition("@")[0],  # a weights file's path is nobody's concern
            "learning_rate": settings.learning_rate,
            "seed": settings.seed,
        },
        tags={"hilum": hilum_version(), "code": tracking.code_version(), "dataset": dataset[:16]}
        | ({"mlflow.parentRunId": parent.run_id} if parent else {}),
        run_id=run_id,
        journal=workshop.points(part),
    )
    if not run_id:
        workshop.remember(part, tracker.run_id)
    if parent is None:
        tracker.dataset(workshop.out.name, dataset, count, "training")
        tracker.text(json.dumps(decisive(settings), indent=2), "settings.json")
        tracker.text(tracking.environment(), "environment.txt")
    return tracker


def tell(package: SlidePackage, judged: Judged, tracker: tracking.Tracker) -> None:
    """What was measured."""
    record = package.record
    tracker.metrics(points_of(record.scores, NESTED), step=0)
    tracker.picture(f"{NESTED}/roc and confusion", sheet.picture(record, judged), step=0)
    tracker.text(sheet.page(record, judged), "report/nested.html")
    tracker.text(as_json(encode(record.scores)), "report/scores.json")
    tracker.text(card(record), "card.md")
    tracker.tag("mlflow.note.content", card(record))
    tracker.tag("package", record.id[:16])


def points_of(scores: SlideScores, where: str) -> dict[str, float]:
    """As points of curves; the word macro in every mean over classes."""
    figures: dict[str, Any] = {"ece": scores.ece_before, "ece_calibrated": scores.ece_after}
    figures |= {"nll": scores.nll_before, "nll_calibrated": scores.nll_after}
    for name in ("macro_auroc", "macro_balanced_accuracy", "macro_f1"):
        estimate = getattr(scores, name)
        if estimate.value is not None:
            figures[name] = estimate.value
        if estimate.interval:
            figures |= {f"{name}_low": estimate.interval[0], f"{name}_high": estimate.interval[1]}
    for name, one in scores.per_class.items():
        figures |= {f"recall[{name}]": one.recall.value} if one.recall.value is not None else {}
    return {f"{where}/{name}": float(value) for name, value in figures.items()}
