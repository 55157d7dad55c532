"""A trained model as a folder a person can read: package.json, weights-fold0.safetensors, card.md. Never a pickle."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preprocessing.plan import Plan
from preprocessing.records import BadRecord, decode, encode

from .errors import DamagedPackage, PackageError
from .report import hilum_version, recover, swap

if TYPE_CHECKING:
    from torch import nn

FORMAT = 1
"""Raised when a reader of yesterday could misread a package of today."""


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One training: its weights and how well they did on cases they had not seen."""

    weights: str
    """The file's name inside the package."""
    dice: dict[str, float]
    """Mean Dice per label over the fold's held-out cases, on each scan's own grid."""
    cases_trained: int
    cases_held_out: int
    epochs: int
    minutes: float
    seed: int
    run_id: str = ""
    """The MLflow run that made it."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """Everything package.json says; `files` and `id` seal it."""

    format: int
    hilum: str
    """The version that wrote it."""
    name: str
    created: str
    network: str
    network_config: dict[str, Any]
    plan: Plan
    folds: dict[str, Fold]
    versions: dict[str, str]
    """Of what the weights were trained with."""
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of every other file of the package."""
    id: str = ""
    """sha256 of all of the above: two packages with one id say the same of every scan."""


@dataclass(frozen=True, kw_only=True)
class ModelPackage:
    """A package on disk, its seal checked."""

    folder: Path
    record: Package

    @property
    def plan(self) -> Plan:
        return self.record.plan

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def name(self) -> str:
        return self.record.name

    @staticmethod
    def load(folder: Path) -> "ModelPackage":
        """The package in that folder; refused when a byte of it changed."""
        recover(folder)
        path = folder / "package.json"
        if not path.is_file():
            raise PackageError(
                f"{folder} holds no package.json; a finished package is needed. Train one with `hilum train`, or finish "
                "an unfinished training with `--resume`."
            )
        try:
            raw = path.read_text()
            record = decode(Package, json.loads(raw), where="package.json")
        except OSError as error:
            raise PackageError(
                f"{path} cannot be opened ({error.strerror}); it must be readable. Mend its permissions."
            ) from None
        except (UnicodeDecodeError, json.JSONDecodeError, BadRecord) as error:
            raise DamagedPackage(f"{path} cannot be read ({error}). {_FETCH_AGAIN}") from None
        if record.format != FORMAT:
            raise PackageError(
                f"{folder} has format {record.format}; this hilum reads {FORMAT}. Use the hilum that made it."
            )
        if raw != _rendered(record) or record.id != _seal(record):
            raise DamagedPackage(f"{path} is not as it was sealed (id {record.id[:12]}). {_FETCH_AGAIN}")
        for name, sha256 in record.files.items():
            _verify(folder, name, sha256)
        for fold in record.folds.values():
            if fold.weights not in record.files:
                raise DamagedPackage(f"{path} names the weights {fold.weights}, which it does not seal. {_FETCH_AGAIN}")
        return ModelPackage(folder=folder, record=record)

    def networks(self) -> list["nn.Module"]:
        """The trained network of every fold, ready to evaluate."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        networks = []
        for fold in self.record.folds.values():
            network = build_network(self.record.network, self.record.network_config, self.plan)
            try:
                network.load_state_dict(load_file(self.folder / fold.weights), strict=True)
            except (SafetensorError, RuntimeError) as error:  # sealed so by whoever made it
                raise DamagedPackage(
                    f"{fold.weights} holds no weights of this network ({error}). {_FETCH_AGAIN}"
                ) from None
            networks.append(network.eval())
        return networks


def build_network(name: str, config: dict[str, Any], plan: Plan) -> "nn.Module":
    """An untrained network for a plan, by name and settings."""
    import networks

    module = networks.load(name)
    settings = decode(module.Config, config, where=f"network {name}")
    return module.build(settings, channels=len(plan.channels), classes=plan.classes)


def save(
    folder: Path, *, network: "nn.Module", name: str, network_name: str, network_config: dict[str, Any], plan: Plan,
    fold_number: int, fold: Fold,
) -> ModelPackage:  # fmt: skip
    """Write a package, or add a fold to one made by the same plan and network. The old one stays until the new is whole."""
    from safetensors.torch import save as serialise

    before = ModelPackage.load(folder).record if (folder / "package.json").exists() else None
    building = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    if before:
        for earlier in before.folds.values():
            shutil.copy2(folder / earlier.weights, building / earlier.weights)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
    # not by safetensors' own save_file: what it writes is readable by its writer alone
    (building / fold.weights).write_bytes(serialise(state))
    folds = (before.folds if before else {}) | {str(fold_number): fold}
    record = Package(
        format=FORMAT,
        hilum=hilum_version(),
        name=name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        network=network_name,
        network_config=network_config,
        plan=plan,
        folds=dict(sorted(folds.items())),
        versions=library_versions(),
    )
    (building / "card.md").write_text(card(record))
    record = replace(record, files={path.name: _sha256(path) for path in sorted(building.iterdir())})
    (building / "package.json").write_text(_rendered(replace(record, id=_seal(record))))
    swap(building, folder)
    return ModelPackage.load(folder)


def card(record: Package) -> str:
    """What a person should know before trusting the package; everything in it can be read from package.json."""
    plan = record.plan
    cases = sum(fold.cases_held_out for fold in record.folds.values())
    lines = [
        f"# {record.name}",
        "",
        f"Finds {', '.join(label.name for label in plan.labels)} in scans with the channel(s) {', '.join(plan.channels)}.",
        "**Not a medical device. Not for diagnosis.** Look at every overlay before you rely on a number.",
        "",
        "| label | value in the label map | mean Dice on held-out cases |",
        "|---|---|---|",
        *(f"| {label.name} | {label.value} | {_folds_mean(record, label.name)} |" for label in plan.labels),
        "",
        f"Measured on {cases} held-out case(s) of the dataset it was trained on, on each scan's own grid. Scans from other "
        "scanners, protocols or patients may do worse; measure with `hilum evaluate` on your own references.",
        "",
        f"- network: {record.network}, {len(record.folds)} fold(s)",
        *(
            f"- fold {number}: {fold.cases_trained} cases, {fold.epochs} epochs, {fold.minutes:g} minutes, seed {fold.seed}"
            for number, fold in record.folds.items()
        ),
        f"- prepared voxel: {'×'.join(f'{s:g}' for s in plan.spacing_mm)} mm; window: {'×'.join(map(str, plan.patch))} voxels",
        f"- made by hilum {record.hilum}, {', '.join(f'{n} {v}' for n, v in record.versions.items())}, on {record.created}",
        f"- trained on the dataset with sha256 {plan.dataset}",
        "",
    ]
    return "\n".join(lines)


def _folds_mean(record: Package, label: str) -> str:
    scores = [fold.dice[label] for fold in record.folds.values() if label in fold.dice]
    return f"{sum(scores) / len(scores):.3f}" if scores else "not present in held-out cases"


def library_versions() -> dict[str, str]:
    """Of the libraries whose numbers end up in a prediction."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "monai", "numpy", "scipy", "nibabel", "SimpleITK", "pydicom")}


_FETCH_AGAIN = "A package must be byte for byte what was written: fetch it again from where it came."


def _verify(folder: Path, name: str, sha256: str) -> None:
    path = folder / name
    if Path(name).name != name or not path.is_file():
        raise DamagedPackage(f"{folder} lacks {name}, which its package.json lists. {_FETCH_AGAIN}")
    if not os.access(path, os.R_OK):
        raise PackageError(f"{path} may not be read by this user; it must be. Mend its permissions.")
    if _sha256(path) != sha256:
        raise DamagedPackage(f"{path} changed since it was packed (sha256 differs). {_FETCH_AGAIN}")


def _rendered(record: Package) -> str:
    return json.dumps(encode(record), indent=2, ensure_ascii=False) + "\n"


def _seal(record: Package) -> str:
    return hashlib.sha256(json.dumps(encode(replace(record, id="")), sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
