"""Any file of ours, or a scan, in words a person can read."""

from pathlib import Path

from preprocessing import files
from preprocessing.plan import Plan

from .errors import UsageError
from .package import ModelPackage, card
from .report import Report, millilitres


def show(path: Path) -> str:
    """A scan, plan, package or report, printed; refused when it is none of them."""
    if not path.exists():
        raise UsageError(f"{path} does not exist; a scan, plan, package or report is needed. Look at the spelling.")
    if (path / "package.json").exists() or path.name == "package.json":
        return _package(path if path.is_dir() else path.parent)
    if (path / "report.json").exists() or path.suffix == ".json":
        return _report(path)
    if path.suffix in (".yaml", ".yml"):
        return _plan(path)
    return _scan(path)


def _package(folder: Path) -> str:
    package = ModelPackage.load(folder)
    return f"{card(package.record)}\nid {package.id}\nEvery byte is as it was packed."


def _report(path: Path) -> str:
    report = Report.read(path)
    lines = [f"{report.case_id}: {report.status}, by {report.package_name} ({report.package_id[:12]})", ""]
    lines += [f"  {name:<20} {millilitres(ml):>12}" for name, ml in report.volumes_ml.items()]
    lines += [f"  warning: {warning}" for warning in report.warnings]
    lines += [f"  repaired: {repair}" for repair in report.repairs]
    grid = report.grid
    shape, spacing = "×".join(map(str, grid["shape"])), "×".join(f"{s:.3g}" for s in grid["spacing_mm"])
    lines += [
        "",
        f"  grid    {shape} voxels of {spacing} mm, {grid['orientation']}",
        f"  read    {', '.join(report.sources)}",
    ]
    lines += [
        f"  files   {', '.join(report.files)}",
        f"  seconds {', '.join(f'{k} {v:g}' for k, v in report.seconds.items())}",
    ]
    return "\n".join(lines)


def _plan(path: Path) -> str:
    plan = Plan.read(path)
    facts = {
        "channels": ", ".join(plan.channels),
        "labels": ", ".join(f"{label.name} ({label.value})" for label in plan.labels),
        "steps": " > ".join(step.kind for step in plan.steps),
        "spacing_mm": "×".join(f"{s:g}" for s in plan.spacing_mm),
        "patch": "×".join(map(str, plan.patch)),
        "batch": str(plan.batch),
    }
    lines = [plan.name, ""]
    for name, value in facts.items():
        lines.append(f"  {name:<12} {value}")
        if name in plan.reasons:
            lines.append(f"  {'':<12} because: {plan.reasons[name]}")
    return "\n".join(lines)


def _scan(path: Path) -> str:
    volume = files.read(path)
    low, high = float(volume.voxels.min()), float(volume.voxels.max())
    x, y, z = volume.geometry.to_world((0, 0, 0))
    lines = [
        f"{path.name}: {volume.geometry}",
        f"  {len(volume.channels)} channel(s) of {volume.voxels.dtype}, {low:g} to {high:g}",
        f"  first voxel at {x:.2f}, {y:.2f}, {z:.2f} mm (right, anterior, superior)",
        f"  read by {volume.provenance.reader}, sha256 {volume.provenance.sha256[:16]}",
        *(f"  repaired: {repair}" for repair in volume.provenance.repairs),
    ]
    return "\n".join(lines)
