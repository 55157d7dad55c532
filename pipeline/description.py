"""Any file of ours, or a scan, in words a person can read.

Each kind of file loads what it needs and no more: nobody waits for a reader of DICOM to see a plan, and only the table of
networks waits for torch.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .names import MEASUREMENTS, PACKAGE, PAGE, REPORT, VERDICT

if TYPE_CHECKING:
    from .report import Report


def show(path: Path, plan: Path | None = None) -> str:
    """A scan, plan, package, report or evaluation, printed; refused when it is none of them. `networks`, where no file is called so,
    is a table of all networks, for the windows of a plan."""
    if str(path) == "networks" and not path.is_file():
        from preprocessing.plan import Plan

        from .catalogue import table as networks  # which counts on torch's own tensors

        return networks(Plan.read(plan) if plan else None)
    if plan:
        raise UsageError(f"--plan {plan} was given with {path}; it belongs to `hilum show networks`. Leave it out.")
    if not path.exists():
        raise UsageError(
            f"{path} does not exist; a scan, plan, package, report or evaluation is needed. Look at the spelling."
        )
    if (path / PACKAGE).exists() or path.name == PACKAGE:
        return _package(path if path.is_dir() else path.parent)
    if (path / VERDICT).exists() or path.name == VERDICT:
        return _conversion(path / VERDICT if path.is_dir() else path)
    if (path / REPORT).exists() or path.suffix == ".json":
        return JSON[_subject(path)](path)
    if path.suffix in (".yaml", ".yml"):
        return _plan(path)
    return _scan(path)


def _package(folder: Path) -> str:
    from . import seal
    from .package import ModelPackage, card
    from .slides import package as slide_packages

    if seal.kind_of(folder) in slide_packages.KINDS:
        of_slides = slide_packages.SlidePackage.load(folder)
        written, sealed = slide_packages.card(of_slides.record), of_slides.id
    else:
        package = ModelPackage.load(folder)
        written, sealed = card(package.record), package.id
    return f"{written}\nid {sealed}\nEvery byte is as it was packed."


def _report(path: Path) -> str:
    from .report import Report, run_words, told

    report = Report.read(path)
    folder = path if path.is_dir() else path.parent
    lines = [f"{report.case_id}: {report.status}, by {report.package_name} ({report.package_id[:12]})", ""]
    lines += _findings(report, _parts(folder))
    lines += [f"  warning: {warning}" for warning in report.warnings]
    lines += [f"  unsure of {name}: {_unsure(found)}" for name, found in report.uncertainty.items()]
    lines += [f"  map of {name}: {standing}" for name, standing in report.explanations.items()]
    lines += [f"  repaired: {repair}" for repair in report.repairs]
    lines += [f"  note: {note}" for note in report.notes]
    lines += [f"  rule: {told(applied)}" for applied in report.postprocessing]
    lines += [
        "",
        f"  scan    {', '.join(filter(None, (report.verdict, report.modality, report.encoding)))}",
        f"  grid    {_grid(report.grid)}",
        f"  read    {', '.join(report.sources)}",
        *(f"  {name:<7} {words}" for name, words in run_words(report)),
    ]
    lines += [
        f"  files   {', '.join(report.files)}",
        f"  seconds {', '.join(f'{k} {v:g}' for k, v in report.seconds.items())}",
    ]
    if address := address_of(folder):
        lines.append(f"  page    {address}")
    return "\n".join(lines)


def _unsure(found: dict[str, float]) -> str:
    return ", ".join(f"{kind} {value:.3g}" for kind, value in found.items())


def _subject(path: Path) -> str:
    """Of what a JSON file tells: a slide, an evaluation, or else a case; the reader of reports says what is wrong."""
    try:
        said = json.loads((path / REPORT if path.is_dir() else path).read_text(encoding="utf-8"))
    except ValueError:
        return "case"
    if not isinstance(said, dict):
        return "case"
    return "slide" if "slide_id" in said else "evaluation" if {"summary", "tolerance_mm"} <= said.keys() else "case"


def _evaluation(path: Path) -> str:
    """The summary per label that `evaluate` printed, and the cases that are in no mean."""
    from preprocessing.records import decode

    from .evaluation import Summary, figure, summary_lines

    said = json.loads(path.read_text(encoding="utf-8"))
    counted = ("cases", "missed", "invented")
    summary = [
        {"label": label, "of": {name: one for name, one in found.items() if name not in counted}}
        | {name: found[name] for name in counted}
        for label, found in said["summary"].items()
    ]
    lines = summary_lines(decode(tuple[Summary, ...], summary, where=path.name))
    lines.append(f"mean Dice {figure(said['mean_dice'], 3)}; NSD at {said['tolerance_mm']:g} mm")
    lines += [f"  failed: {case}: {reason}" for case, reason in said["failed"].items()]
    if (beside := path.with_suffix(".html")).is_file():
        lines.append(f"  page    {beside.resolve().as_uri()}")
    return "\n".join(lines)


def _slide(path: Path) -> str:
    """A slide that was classified, or whose tiles were."""
    from .slides.class_map_report import ClassMapReport
    from .slides.report import SlideReport
    from .slides.result import probability

    folder = path if path.is_dir() else path.parent
    names_tiles = "areas_mm2" in json.loads((folder / REPORT).read_text(encoding="utf-8"))
    report = ClassMapReport.read(folder) if names_tiles else SlideReport.read(folder)
    origin = report.origin
    x, y = report.microns_per_pixel
    lines = [f"{report.slide_id}: {report.status}, by {origin.package_name} ({report.package_id[:12]})", ""]
    if isinstance(report, SlideReport):
        lines += [f"  {name:<16} {probability(value):>10}" for name, value in report.probabilities.items()]
        lines += ["", f"  map     deletion test {report.deletion_verdict}"]
    else:
        lines += [*(f"  {name:<16} {area:>10.3g} mm²" for name, area in report.areas_mm2.items()), ""]
    lines += [f"  warning: {warning}" for warning in report.warnings]
    lines += [f"  left out: {count} tiles, {reason}" for reason, count in report.quarantined.items()]
    lines += [
        f"  slide   {report.size_um[0] / 1000:.3g} x {report.size_um[1] / 1000:.3g} mm, {x:g} x {y:g} um per pixel "
        f"({'as its file says' if report.resolution_from == 'file' else 'as was stated'})",
        f"  tiles   {report.tiles} of {report.tile_um:g} um, encoder {origin.encoder}, features {report.features}",
        f"  files   {', '.join(report.files)}",
        f"  seconds {', '.join(f'{k} {v:g}' for k, v in report.seconds.items())}",
    ]
    if address := address_of(folder):
        lines.append(f"  page    {address}")
    return "\n".join(lines)


JSON = {"slide": _slide, "evaluation": _evaluation, "case": _report}
"""Who tells of what."""


def address_of(path: Path) -> str:
    """Where a browser finds the page of this case; empty where there is none."""
    found = (path if path.is_dir() else path.parent) / PAGE
    return found.resolve().as_uri() if found.is_file() else ""


MOST_PARTS = 5
"""Lines of parts under a label; measurements.json has more."""


def _findings(report: "Report", parts: dict[str, Any]) -> list[str]:
    from .report import millilitres, place

    lines = []
    for name, ml in report.volumes_ml.items():
        sure = f"   confidence {report.confidence[name]:.2f}" if name in report.confidence else ""
        lines.append(f"  {name:<20} {millilitres(ml):>12}{sure}")
        found = parts.get(name, [])
        if len(found) < 2:
            continue
        for part in found[:MOST_PARTS]:
            lines.append(
                f"    {part['number']:>3} {'':<14} {millilitres(part['volume_ml']):>12}   {place(part['centroid_mm'])}"
            )
        if (more := len(found) - MOST_PARTS) > 0:
            lines.append(f"    and {more} smaller")
    return lines


def _parts(folder: Path) -> dict[str, Any]:
    """Of each label its parts, from the measurements beside the report; empty where they were not asked for."""
    try:
        labels = json.loads((folder / MEASUREMENTS).read_text(encoding="utf-8"))["labels"]
        return {name: label["parts"] for name, label in labels.items()}
    except (FileNotFoundError, KeyError):  # not asked for, or by a hilum that knew no parts
        return {}


def _conversion(path: Path) -> str:
    from .conversion import Conversion

    said = Conversion.read(path)
    grid = f"{_grid(said.grid)}, {said.encoding}" if said.grid else f"{len(said.files)} file(s)"
    lines = [f"{said.case}: {said.word}. {', '.join(filter(None, (said.modality, grid)))}"]
    lines += [f"  {said.reason}: {said.message}"] if said.message else []
    lines += [f"  repaired: {repair}" for repair in said.repairs]
    lines += [f"  note: {note}" for note in said.notes]
    return "\n".join([*lines, f"  read from {', '.join(said.sources or said.files)}, sha256 {said.sha256[:16]}"])


def _grid(grid: dict[str, Any]) -> str:
    shape, spacing = "×".join(map(str, grid["shape"])), "×".join(f"{s:.3g}" for s in grid["spacing_mm"])
    return f"{shape} voxels of {spacing} mm, {grid['orientation']}"


def _plan(path: Path) -> str:
    from preprocessing.plan import Plan

    plan = Plan.read(path)
    facts = {
        "channels": ", ".join(plan.channels),
        "labels": ", ".join(f"{label.name} ({label.value})" for label in plan.labels),
        "steps": " > ".join(step.kind for step in plan.steps),
        "spacing_mm": "×".join(f"{s:g}" for s in plan.spacing_mm),
        "patch": "×".join(map(str, plan.patch)),
        "batch": str(plan.batch),
        "memory_gb": "nobody predicted it" if plan.memory_gb is None else f"{plan.memory_gb:g}",
        **{f"network_options.{name}": _short(value) for name, value in plan.network_options.items()},
        **{f"recipe.{name}": _short(value) for name, value in vars(plan.recipe).items()},
    }
    wide = max(12, *map(len, facts))
    lines = [f"{plan.name}, by the rules of {'nnU-Net' if plan.mode == 'nnunet' else 'hilum'}", ""]
    for name, value in facts.items():
        lines.append(f"  {name:<{wide}} {value}")
        if name in plan.reasons:
            lines.append(f"  {'':<{wide}} because: {plan.reasons[name]}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    """A setting in a word; lists of strides as 1×1×1, 2×2×2."""
    if isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple):
        return ", ".join("×".join(map(str, one)) for one in value)
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _scan(path: Path) -> str:
    from preprocessing import dicom, files
    from preprocessing.verdict import Verdict

    from .checking import judge
    from .finding import find_scans
    from .verdicts import table

    scans = find_scans([path]).scans if path.is_dir() or dicom.is_dicom(path) else ()
    if len(scans) > 1:
        return table({scan.case_id: judge(scan) for scan in scans})
    volume = files.read(path)
    verdict = Verdict.of(volume)
    low, high = float(volume.voxels.min()), float(volume.voxels.max())
    x, y, z = volume.geometry.to_world((0, 0, 0))
    lines = [
        f"{path.name}: {verdict.word}. {verdict.what}",
        f"  {len(volume.channels)} channel(s) of {volume.voxels.dtype}, {low:g} to {high:g}",
        f"  first voxel at {x:.2f}, {y:.2f}, {z:.2f} mm (right, anterior, superior)",
        f"  read by {volume.provenance.reader}, sha256 {volume.provenance.sha256[:16]}",
        *(f"  repaired: {repair}" for repair in verdict.repairs),
        *(f"  note: {note}" for note in verdict.notes),
    ]
    return "\n".join(lines)
