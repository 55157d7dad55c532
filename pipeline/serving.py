"""A registered package as MLflow loads it, `mlflow.pyfunc.load_model("models:/liver@best").predict([paths])`.

MLflow finds this module by the name in MLmodel and calls `_load_pyfunc` with the package's folder: no code and no object
was stored with the model, so nothing is unpickled. Paths go in, a table comes out, and label maps lie where it says.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from .config import Segment
from .errors import UsageError
from .registry import PARAMS

if TYPE_CHECKING:
    from pandas import DataFrame  # type: ignore[import-untyped]

    from .report import Report
    from .results import Row


def _load_pyfunc(path: str) -> "Served":
    """What MLflow calls, by this very name."""
    return Served(Path(path))


@final
class Served:
    """A package behind MLflow's `predict`."""

    def __init__(self, folder: Path) -> None:
        from .package import ModelPackage

        self.package = ModelPackage.load(folder)

    def predict(self, model_input: Any, params: Mapping[str, str] | None = None) -> "DataFrame":
        """A row for each case found under the paths; a case that failed has its reason in `error`, and no other does."""
        from pandas import DataFrame

        from .batch import segment
        from .results import EARLIER

        said = PARAMS | {name: value for name, value in (params or {}).items() if value}
        outputs = tuple(dict.fromkeys(["labels", *(name.strip() for name in said["outputs"].split(","))]))
        out = Path(said["out"]).absolute()
        batch = segment(paths(model_input), self.package.folder, out, Segment(outputs=outputs))
        labels = [label.name for label in self.package.plan.labels]
        rows = [row for row in batch.rows if row.status != EARLIER]  # `out` may hold what was asked for before
        return DataFrame([_told(row, out, labels) for row in rows], columns=_columns(labels))


def paths(model_input: Any) -> list[Path]:
    """Of a path, a list or an array of them, or a table with one column."""
    if hasattr(model_input, "to_numpy"):
        model_input = model_input.to_numpy()
    if hasattr(model_input, "ravel"):
        model_input = model_input.ravel().tolist()
    given: Iterable[Any] = [model_input] if isinstance(model_input, str | Path) else model_input
    found = [Path(str(one)) for one in given]
    if not found:
        raise UsageError("no path was given; files, DICOM series or trees of them are needed. Pass a list of paths.")
    return found


def _columns(labels: list[str]) -> list[str]:
    """The same for every table of a package."""
    numbers = [f"{name}{what}" for what in (" ml", " confidence") for name in labels]
    return ["case", "labels", *numbers, "warnings", "error"]


def _told(row: "Row[Report]", out: Path, labels: list[str]) -> dict[str, Any]:
    report = row.report
    if report is None:
        return {"case": row.case_id, "labels": "", "warnings": "", "error": row.message}
    file = next((name for name in report.files if name.startswith("labels.")), "")
    return {
        "case": row.case_id,
        "labels": str(out / row.case_id / file) if file else "",
        **{f"{name} ml": report.volumes_ml.get(name) for name in labels},
        **{f"{name} confidence": report.confidence.get(name) for name in labels},
        "warnings": "; ".join(report.warnings),
        "error": "",
    }
