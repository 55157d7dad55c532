"""uncertainty-*.nii.gz: how unsure the networks are in every voxel, 0 to 1, one map per kind, on exactly the scan's grid."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from preprocessing import files

from ..errors import UsageError
from ..maps import CODES, Maps, in_bytes
from ..report import Result


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of which kinds, and how finely. Their means in each label stand in report.json, whatever is written."""

    kinds: tuple[Literal["entropy", "folds", "flips"], ...] = ()
    """Empty: entropy; folds, where the package has several; flips, where the scan was mirrored."""
    exact: bool = False
    """32-bit floats instead of bytes that stand for 1/255 each."""


def write(result: Result, folder: Path, config: Config) -> list[Path]:
    """Kind after kind: two maps are never in memory together."""
    assert result.maps is not None and result.maps.kinds, "uncertainty is asked for before a scan is looked at"
    written = []
    for kind in _chosen(result.maps, config):
        path = folder / f"uncertainty-{kind}.nii.gz"
        unsure = result.maps.uncertainty(kind)
        unsure = unsure.with_voxels(unsure.voxels, result.scan.geometry)
        if config.exact:
            files.write(unsure, path)
        else:
            files.write(in_bytes(unsure), path, scale=1 / CODES)
        written.append(path)
    return written


WHEN = {"folds": "a package with several folds", "flips": "--flips"}


def _chosen(maps: Maps, config: Config) -> tuple[str, ...]:
    for kind in config.kinds:
        if kind not in maps.kinds:
            raise UsageError(
                f"uncertainty by {kind} was asked for; it needs {WHEN[kind]}, and there is none here. Leave it out of "
                "output_options.uncertainty.kinds."
            )
    return config.kinds or maps.kinds
