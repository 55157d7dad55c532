"""probability-*.nii.gz: how likely each label is in every voxel, one map per label, on exactly the scan's own grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from preprocessing import files
from preprocessing.plan import Label
from preprocessing.records import nearest

from ..errors import UsageError
from ..report import Result, file_word


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of which labels, and how finely."""

    labels: tuple[str, ...] = ()
    """Names of the labels written; empty: every one of the package, found or not."""
    exact: bool = False
    """32-bit floats instead of bytes that stand for 1/255 each."""


def write(result: Result, folder: Path, config: Config) -> list[Path]:
    """Label after label: two maps are never in memory together. Where labels exclude each other, what they leave of 1 is
    the background's."""
    assert result.maps is not None and result.maps.labels, "probabilities are asked for before a scan is looked at"
    written = []
    for label in _chosen(result.label_table, config):
        path = folder / f"probability-{label.value}-{file_word(label.name)}.nii.gz"
        likely = result.maps.probability(label.name)
        files.write(likely.with_voxels(likely.voxels, result.scan.geometry), path, scale=result.maps.scale)
        written.append(path)
    return written


def _chosen(table: Sequence[Label], config: Config) -> list[Label]:
    known = {label.name: label for label in table}
    for name in config.labels:
        if name not in known:
            raise UsageError(
                f"probabilities were asked for of {name!r}{nearest(name, list(known))}; the package knows {', '.join(known)}. "
                "Name some of these in output_options.probabilities.labels, or none for all."
            )
    return [known[name] for name in config.labels] or list(table)
