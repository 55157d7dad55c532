"""classify with a package that names tiles: every slide becomes a map of what each of its tiles is."""

import csv
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from preprocessing.slides import SlideFile, find_tissue

from .. import index
from ..outputs._html import document, text
from ..report import FILE_NAME, as_json, hilum_version, inert, write_whole
from ..results import DONE, ERROR, FAILED, LookedAt, Row, Work, counts, explained
from . import class_map
from .answering import bag_of
from .class_map import ClassMap
from .class_map_report import ClassMapReport
from .feature_file import FILE_NAME as FEATURES
from .package import SlidePackage
from .sight import frame_of, origin_of, overview_of, warnings_of
from .supply import Supply
from .tile_answering import answer_tiles


class Naming(Work[SlideFile, ClassMapReport]):
    """A class for each tile of each slide."""

    stage = "classify"
    mark = FILE_NAME
    incomplete = frozenset({ERROR})

    def __init__(self, package: SlidePackage, supply: Supply) -> None:
        self.package, self.supply = package, supply

    @cached_property
    def networks(self) -> list[torch.nn.Module]:
        """Loaded for the first slide that needs them."""
        return [network.to(self.supply.device) for network in self.package.networks()]

    def ahead(
        self, looked_at: Iterator[LookedAt[SlideFile, ClassMapReport]]
    ) -> Iterator[LookedAt[SlideFile, ClassMapReport]]:
        return self.supply.ahead(looked_at)

    def found(self, folder: Path) -> Row[ClassMapReport] | None:
        if not (folder / FILE_NAME).exists():
            return None
        return Row(case_id=folder.name, status=DONE, report=ClassMapReport.read(folder))

    def is_enough(self, result: ClassMapReport, folder: Path) -> bool:
        return result.package_id == self.package.id and all((folder / name).exists() for name in result.files)

    def other(self, result: ClassMapReport, scan: SlideFile) -> str:
        if result.package_id != self.package.id:
            return "by another package"
        return self.supply.difference(result.slide_sha256, result.resolution_from, result.microns_per_pixel, scan)

    def make(self, scan: SlideFile, folder: Path) -> Row[ClassMapReport]:
        began = time.perf_counter()
        file, features = self.supply.features_of(scan, folder)
        made = time.perf_counter()
        said = answer_tiles(self.networks, self.package.record.temperature, bag_of(file, self.supply.device))
        seconds = {"features": round(made - began, 3), "answer": round(time.perf_counter() - made, 3)}
        with self.supply.open(scan) as slide:
            overview, blank = overview_of(slide, file.recipe)
            tissue = find_tissue(slide)
            found = ClassMap(
                frame=frame_of(slide, file), origin=origin_of(self.package), overview=overview, tissue=tissue.mask,
                tissue_um=tissue.microns_per_pixel, tile_um=file.recipe.tile_um, step_um=file.recipe.step_um,
                positions_um=file.positions_um, grid=file.grid, tissue_share=file.tissue, classes=self.package.record.classes,
                probabilities=said.probabilities, predicted=said.predicted, quarantined=file.quarantined,
                warnings=warnings_of(slide, file, blank), seconds=seconds,
            )  # fmt: skip
        (folder / FEATURES).unlink(missing_ok=True)  # made for this answer alone; `slides features` keeps them
        report = ClassMapReport.of(found, class_map.write_all(found, folder), features)
        write_whole(folder / FILE_NAME, as_json(asdict(report)))
        return Row(case_id=scan.id, status=DONE, report=report)

    def explain(self, scan: SlideFile, error: Exception, folder: Path) -> Row[ClassMapReport]:
        return explained(scan.id, error, folder, {"package_id": self.package.id, "sources": str(scan.path)})

    def summarise(self, out: Path, rows: Sequence[Row[ClassMapReport]], left_alone: Mapping[str, str]) -> None:
        classes, name = self.package.record.classes, self.package.name
        write_whole(out / "summary.csv", _csv(rows, classes))
        write_whole(out / "summary.json", as_json(_summary(rows, dict(left_alone), name)))
        write_whole(out / "index.html", _page(rows, classes, dict(left_alone), name))


def _csv(rows: Sequence[Row[ClassMapReport]], classes: Sequence[str]) -> str:
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    areas = (inert(f"{name} mm2") for name in classes)
    table.writerow(["slide", "status", "reason", "most", *areas, "tiles", "warnings", "seconds", "message"])
    for row in rows:
        said, reason = row.report, (row.error or {}).get("reason", "")
        found = [f"{said.areas_mm2[name]:.6f}" if said and name in said.areas_mm2 else "" for name in classes]
        told = [said.tiles if said else "", inert(" | ".join(said.warnings if said else ()))]
        most = inert(said.most) if said else ""
        table.writerow(
            [inert(row.case_id), row.status, reason, most, *found, *told, f"{row.seconds:.2f}", inert(row.message)]
        )
    return buffer.getvalue()


def _summary(rows: Sequence[Row[ClassMapReport]], left_alone: dict[str, str], package_name: str) -> dict[str, Any]:
    return {
        "hilum_version": hilum_version(),
        "package_name": package_name,
        "counts": counts(rows),
        "slides": [
            {
                "slide": row.case_id,
                "status": row.status,
                "areas_mm2": row.report.areas_mm2 if row.report else None,
                "warnings": list(row.report.warnings) if row.report else [],
                "seconds": round(float(row.seconds), 3),
                "error": row.error,
            }
            for row in rows
        ],
        "left_alone": left_alone,
    }


def _page(
    rows: Sequence[Row[ClassMapReport]], classes: Sequence[str], left_alone: dict[str, str], package_name: str
) -> str:
    title = f"{len(rows)} slide{'' if len(rows) == 1 else 's'}, {package_name}"
    numbers = "".join(f'<th class="number" data-number="1"><button>{text(name)} mm²</button></th>' for name in classes)
    head = (
        f"<thead><tr><th>picture</th><th><button>slide</button></th><th><button>status</button></th>{numbers}"
        "<th>reasons and warnings</th></tr></thead>"
    )
    shown = "".join(_row(row, classes) for row in sorted(rows, key=lambda row: row.status != FAILED))
    body = (
        f'<h1>{text(title)}</h1><p class="quiet">areas of tissue by the class of each tile · for research, not for diagnosis · '
        '<a href="summary.csv">summary.csv</a> · <a href="summary.json">summary.json</a></p>'
        f'{index.counted(rows, left_alone)}<div class="wide"><table>{head}<tbody>{shown}</tbody></table></div>'
        f"{index.left_alone_table(left_alone)}<footer>hilum {text(hilum_version())} · for research, not for diagnosis</footer>"
    )
    return document(title, body, style=index.STYLE, script=index.SCRIPT, pictures="'self' file:")


def _row(row: Row[ClassMapReport], classes: Sequence[str]) -> str:
    said, home = row.report, quote(row.case_id)
    shown = f"{home}/{class_map.PICTURE}"
    target = shown if said else f"{home}/error.json"
    seen = (
        f'<a href="{shown}"><img src="{shown}" loading="lazy" alt="class map of {text(row.case_id)}"></a>'
        if said
        else ""
    )
    areas = [said.areas_mm2.get(name) if said else None for name in classes]
    numbers = "".join(
        f'<td class="number" data-key="{"" if mm2 is None else mm2}">{"" if mm2 is None else f"{mm2:.3g}"}</td>'
        for mm2 in areas
    )
    told = text(row.message) if said is None else "<br>".join(map(text, said.warnings))
    return (
        f'<tr class="{"failed" if row.status == FAILED else "fine"}"><td>{seen}</td>'
        f'<td class="case"><a href="{target}">{text(row.case_id)}</a></td><td>{text(row.status)}</td>{numbers}'
        f'<td class="reason">{told}</td></tr>'
    )
