"""A second package that sees the same scans once the results are sent: compared label by label, never sent, never in the way.

Whether a new package may serve is decided by how it does on this hospital's own scans, before anybody's results depend on
it. What it makes lies beside the results, in a folder that nobody sends; that it fails is written down, and that is all.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sql
from jaxtyping import Bool, Integer

from preprocessing.regions import values_of

from ..package import ModelPackage
from ..report import FILE_NAME as REPORT
from ..report import Report
from . import rollback
from .desk import Desk
from .ledger import Ledger, tables
from .room import Answer, Job
from .stories import Story

LABELS = "labels"
"""The output that is compared; where a route has a shadow, its own package writes it too."""

agreements = sql.Table(
    "node_shadows",
    tables,
    sql.Column("study", sql.String(20), primary_key=True),
    sql.Column("revision", sql.Integer, primary_key=True),
    sql.Column("route", sql.String(64), primary_key=True),
    sql.Column("attempt", sql.Integer, primary_key=True),
    sql.Column("scan", sql.Integer, primary_key=True),
    sql.Column("label", sql.String(255), primary_key=True),
    sql.Column("package", sql.String(64), nullable=False),
    sql.Column("shadow", sql.String(64), nullable=False),
    sql.Column("dice", sql.Float),
    sql.Column("volume_ml", sql.Float, nullable=False),
    sql.Column("shadow_ml", sql.Float, nullable=False),
)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of two packages on one label of one scan."""

    scan: int
    """The how-manyth of its story."""
    label: str
    dice: float | None
    """None where neither found any of it."""
    volume_ml: float
    shadow_ml: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Of two packages on one label of all scans so far."""

    route: str
    package: str
    shadow: str
    label: str
    scans: int
    dice: float | None
    """The mean where either found any."""
    lowest: float | None
    difference_ml: float
    """The mean of the shadow's volume less the other's."""


def follow(at: Desk, study: str, revision: int, route: str) -> str:
    """Let the shadow see what the package saw, and compare. Twice says the same as once. What came of it, in a word."""
    story = at.stories.get(study, revision, route)
    wanted = at.node.routes[route].shadow
    if story is None or wanted is None or _is_seen(story):
        return "nothing"
    shadow, folder = rollback.shelf(at).take_in(wanted), at.folder(study, revision, route)
    said: dict[str, Any] = {"attempt": story.attempt, "package": shadow.id, "name": shadow.name}
    answer = _answer(at, shadow, folder)
    found: list[Agreement] = []
    if answer.status == "done":
        ours = rollback.shelf(at).open(story.facts["package"]["id"])
        found = list(_compared(folder, ours, shadow))
        _keep(at.ledger, said | {"study": study, "revision": revision, "route": route}, ours.id, found)
    at.stories.remember(
        story, shadow=said | {"status": answer.status, "code": answer.code, "labels": [asdict(one) for one in found]}
    )
    return answer.status


AWAITED_H = 24.0
"""For so long a story's input is kept for its shadow: a night's queue, and no more, should it never come."""


def is_awaited(at: Desk, story: Story) -> bool:
    """Whether a shadow has still to see what a story was about."""
    how = at.node.routes.get(story.route)
    if how is None or how.shadow is None or story.state != "done" or story.facts.get("as_before"):
        return False
    return not _is_seen(story) and datetime.now(UTC) - story.changed < timedelta(hours=AWAITED_H)


def _is_seen(story: Story) -> bool:
    """Now, or when what is only sent somewhere else now was made."""
    return story.attempt in (story.facts.get(name, {}).get("attempt") for name in ("shadow", "wish"))


def summaries(ledger: Ledger) -> list[Summary]:
    """How alike each shadow and its route's package have been, label by label."""
    groups = (agreements.c.route, agreements.c.package, agreements.c.shadow, agreements.c.label)
    mean, lowest = sql.func.avg(agreements.c.dice), sql.func.min(agreements.c.dice)
    difference = sql.func.avg(agreements.c.shadow_ml - agreements.c.volume_ml)
    ledger.make(agreements)
    with ledger.reading() as connection:
        asked = sql.select(*groups, sql.func.count(), mean, lowest, difference).group_by(*groups).order_by(*groups)
        rows = connection.execute(asked).all()
    names = ("route", "package", "shadow", "label", "scans", "dice", "lowest", "difference_ml")
    return [Summary(**dict(zip(names, row, strict=True))) for row in rows]


def _answer(at: Desk, shadow: ModelPackage, folder: Path) -> Answer:
    """Case after case, as its story did it; the first that is not done ends it."""
    cases = sorted(path for path in (folder / "input").glob("*") if path.is_dir())
    if not cases:
        return Answer(status="refused", code="input_gone")
    answer = Answer(status="done")
    for case in cases:
        job = Job(
            paths=(str(case),), package=str(rollback.shelf(at).place(shadow.id)), package_id=shadow.id,
            trusted=tuple(map(str, at.node.trusted)), out=str(folder / "shadow"), settings={"outputs": [LABELS]},
        )  # fmt: skip
        with at.room() as room:
            answer = room.work(job, at.node.working.seconds)
        if answer.status != "done":
            return answer
    return answer


def _compared(folder: Path, ours: ModelPackage, shadow: ModelPackage) -> Iterator[Agreement]:
    """Of every scan that both have an answer for, every label that both know by name."""
    cases = sorted(path.parent.name for path in (folder / "shadow").glob(f"[!.]*/{REPORT}"))
    values = values_of(ours.plan.labels), values_of(shadow.plan.labels)
    for number, case in enumerate(cases, 1):
        folders = folder / "results" / case, folder / "shadow" / case
        if not (folders[0] / REPORT).exists():
            continue
        reports, maps = [Report.read(one) for one in folders], [_label_map(one) for one in folders]
        for name in (label for label in values[0] if label in values[1]):
            masks = [np.isin(voxels, of[name]) for voxels, of in zip(maps, values, strict=True)]
            volumes = [report.volumes_ml.get(name, 0.0) for report in reports]
            yield Agreement(
                scan=number,
                label=name,
                dice=_dice(*masks),
                volume_ml=round(volumes[0], 3),
                shadow_ml=round(volumes[1], 3),
            )


def _label_map(folder: Path) -> Integer[np.ndarray, "i j k"]:
    import nibabel

    return np.asanyarray(nibabel.load(folder / "labels.nii.gz").dataobj)


def _dice(one: Bool[np.ndarray, "i j k"], other: Bool[np.ndarray, "i j k"]) -> float | None:
    both = int(one.sum()) + int(other.sum())
    return round(2 * int((one & other).sum()) / both, 4) if both else None


def _keep(ledger: Ledger, said: dict[str, Any], package: str, found: list[Agreement]) -> None:
    """For the metrics, which look at all stories; anew where a killed process had begun to."""
    ledger.make(agreements)
    whose = {name: said[name] for name in ("study", "revision", "route", "attempt")}
    with ledger.writing() as connection:
        connection.execute(
            sql.delete(agreements).where(*(agreements.c[name] == value for name, value in whose.items()))
        )
        for one in found:
            connection.execute(
                sql.insert(agreements).values(**whose, **asdict(one), package=package, shadow=said["package"])
            )
