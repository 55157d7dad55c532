"""labels.nii.gz: the label of every voxel, on exactly the scan's own grid."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from preprocessing import files

from ..report import Result

FILE_NAME = "labels.nii.gz"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing to decide."""


def write(result: Result, folder: Path, config: Config) -> list[Path]:
    """Bytes where 255 labels are enough, 16 bits where not."""
    highest = max((label.value for label in result.label_table), default=0)
    dtype = np.uint8 if highest <= 255 else np.uint16
    labels = result.labels.with_voxels(result.labels.voxels.astype(dtype), result.scan.geometry)
    path = folder / FILE_NAME
    files.write(labels, path, is_labels=True)
    return [path]
