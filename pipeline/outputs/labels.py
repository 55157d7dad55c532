"""labels.nii.gz or labels.seg.nrrd: the label of every voxel, on exactly the scan's own grid."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import ndimage

from preprocessing import files
from preprocessing.plan import Label
from preprocessing.regions import names_in_map

from ..report import Result, write_whole

FILE_NAME = "labels.nii.gz"
NRRD_FILE_NAME = "labels.seg.nrrd"
"""By the two endings 3D Slicer knows a segmentation, with names and colours."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the label map is kept."""

    format: Literal["nii.gz", "nrrd"] = "nii.gz"
    """nii.gz, which `hilum evaluate` looks for; or nrrd, with the names, colours and codes of the labels in it."""


def write(result: Result, folder: Path, config: Config) -> list[Path]:
    """Bytes where 255 labels are enough, 16 bits where not."""
    highest = max((label.value for label in result.label_table), default=0)
    dtype = np.uint8 if highest <= 255 else np.uint16
    labels = result.labels.with_voxels(result.labels.voxels.astype(dtype), result.scan.geometry)
    path = folder / (FILE_NAME if config.format == "nii.gz" else NRRD_FILE_NAME)
    files.write(labels, path, is_labels=True)
    if config.format == "nrrd":
        _name_segments(path, result)
    return [path]


def _name_segments(path: Path, result: Result) -> None:
    """Key and value pairs behind the fields of the header: for 3D Slicer names, for everyone else comments."""
    header, _, voxels = path.read_bytes().partition(b"\n\n")
    boxes = ndimage.find_objects(result.labels.voxels[0])
    pairs = ["Segmentation_MasterRepresentation:=Binary labelmap"]
    pairs += [
        "Segmentation_ContainedRepresentationNames:=Binary labelmap|",
        "Segmentation_ReferenceImageExtentOffset:=0 0 0",
    ]
    names = names_in_map(result.label_table)
    for number, label in enumerate(result.label_table):
        box = boxes[label.value - 1] if label.value <= len(boxes) else None
        pairs += [f"Segment{number}_{key}:={value}" for key, value in _segment(label, names[label.name], box).items()]
    write_whole(path, b"\n".join([header, *(pair.encode() for pair in pairs)]) + b"\n\n" + voxels)


def _segment(label: Label, name: str, box: tuple[slice, ...] | None) -> dict[str, str]:
    spans = [f"{part.start} {part.stop - 1}" for part in box] if box else ["0 -1"] * 3
    return {
        "ID": f"Segment_{label.value}",
        "Name": " ".join(name.split()),
        "Color": " ".join(f"{channel / 255:.6g}" for channel in label.colour),
        "LabelValue": str(label.value),
        "Layer": "0",
        "Extent": " ".join(spans),
        "Tags": f"TerminologyEntry:{_terminology(label)}|",
    }


def _terminology(label: Label) -> str:
    """As 3D Slicer writes it: context, category, type, modifier, then the same for a region, of which nothing is said."""
    meaning = label.meaning
    codes = [
        f"{code.scheme}^{code.value}^{code.meaning}"
        for code in (meaning.category, meaning.type, *meaning.modifiers[:1])
    ]
    codes += ["^^"] * (3 - len(codes))
    context = "Segmentation category and type - DICOM master list"
    return f"{context}~{'~'.join(codes)}~Anatomic codes - DICOM master list~^^~^^"
