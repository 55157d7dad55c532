"""saliency-*.dcm: where the network looked, as DICOM Parametric Maps on the planes of the source series.

Voxels are 32-bit floats that are the map's values: the readers of such maps (dcmqi and with it 3D Slicer, highdicom, OHIF)
take floats, some of them nothing else, and there is no slope that one of them could forget. What floats cost is saved on
slices: those above and below everything the map shows are left out.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32
from pydicom.dataset import Dataset

from preprocessing.codes import Code

from ..report import Explanation, Result, hilum_version, named
from . import _dicom

if TYPE_CHECKING:
    from highdicom.pm import ParametricMap

SERIES_NUMBER = 3000
"""The series follows its source's number by so much."""

PER_ML = Code(value="/mL", scheme="UCUM", meaning="per milliliter")
NO_UNITS = Code(value="1", scheme="UCUM", meaning="no units")
"""A network's scores are numbers without a unit."""

SALIENCY = Code(value="130404", scheme="DCM", meaning="Saliency")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is explained, and how, is decided where the output `saliency` is."""

    revision: _dicom.Revision = field(default_factory=_dicom.Revision)
    """Where this is not the first answer for its scan."""


def write(result: Result, folder: Path, config: Config) -> list[Path]:
    """One file per map, all of one series; none where nothing was explained."""
    _dicom.refuse_odd_planes(result.scan.geometry)
    origin = _dicom.origin_of(result.scan)
    print_ = _dicom.fingerprint(result, origin, config.revision.number)
    now = datetime.datetime.now()
    written = []
    for number, (name, explanation) in enumerate(named(result.explanations), start=1):
        path = folder / f"saliency-{name}.dcm"
        with _dicom.quiet():
            data = _map(result, explanation, origin, print_, number, now)
        _dicom.write_object(data, path, now, origin, result, revision=config.revision)
        written.append(path)
    return written


def _map(
    result: Result, explanation: Explanation, origin: _dicom.Origin, print_: str, number: int, now: datetime.datetime
) -> "ParametricMap":
    import highdicom  # not at the top: it takes a second

    geometry, shown = result.scan.geometry, _shown(explanation)
    planes = _planes(explanation, shown)
    what = f"{explanation.label} {explanation.part or ''} {explanation.method} {explanation.layer}"
    data = highdicom.pm.ParametricMap(
        source_images=[_dicom.stand_in(geometry, origin)],
        pixel_array=planes,
        series_instance_uid=_dicom.uid("parametric map series", print_),
        series_number=SERIES_NUMBER + origin.series_number,
        sop_instance_uid=_dicom.uid("parametric map", print_, _print_of(explanation)),
        instance_number=number,
        manufacturer=_dicom.MANUFACTURER,
        manufacturer_model_name=_dicom.MANUFACTURER,
        software_versions=_dicom.one_line(hilum_version()),
        device_serial_number=_dicom.one_line(result.package_id),
        contains_recognizable_visual_features=False,  # a map is no image of a face
        real_world_value_mappings=[_mapping(explanation, planes)],
        voi_lut_transformations=[_window(explanation)],
        content_description=_dicom.one_line(f"{explanation.standing}, not for diagnosis: {what}"),
        content_label="SALIENCY",
        content_qualification="RESEARCH",
        series_description=_dicom.one_line(f"saliency, not for diagnosis: {result.package_name}"),
        content_date=now.date(),
        content_time=now.time().replace(microsecond=0),
        pixel_measures=_dicom.measures(geometry),
        plane_orientation=highdicom.PlaneOrientationSequence("PATIENT", _dicom.orientation_of(geometry)),
        plane_positions=_dicom.positions(geometry, shown),
    )
    _dicom.tie_to_source(data, geometry, shown, origin, SALIENCY)
    _dicom.name_dimensions(data, _dicom.uid("dimensions", print_, _print_of(explanation)))
    data.Laterality = None  # must be there, empty, as the source may show one of a pair
    data.ImageComments = _dicom.one_line(_comment(explanation, what), 1024)
    return data


def _shown(explanation: Explanation) -> Sequence[int]:
    """From the first slice with anything on it to the last; of a blank map the middle one, as an object must have a frame."""
    inside = np.flatnonzero(explanation.codes.any(axis=(0, 1)))
    if not inside.size:
        return [explanation.codes.shape[2] // 2]
    return range(int(inside[0]), int(inside[-1]) + 1)


def _planes(explanation: Explanation, shown: Sequence[int]) -> Float32[np.ndarray, "k j i"]:
    planes = explanation.codes[:, :, shown[0] : shown[-1] + 1].transpose(2, 1, 0)
    return np.multiply(planes, np.float32(explanation.scale), dtype=np.float32)


def _mapping(explanation: Explanation, planes: Float32[np.ndarray, "k j i"]) -> Dataset:
    """What is stored is what is meant; its unit as a code, and in the map's own words."""
    import highdicom

    low, high = float(planes.min()), float(planes.max())
    return highdicom.pm.RealWorldValueMapping(
        lut_label="SALIENCY",
        lut_explanation=_dicom.one_line(explanation.unit),
        unit=_dicom.concept(PER_ML if "per ml" in explanation.unit else NO_UNITS),
        value_range=(low, high),
        slope=1.0,
        intercept=0.0,
        quantity_definition=_dicom.concept(SALIENCY),
    )


def _window(explanation: Explanation) -> Dataset:
    """As wide as the map's own scale, around 0: the same grey for as much for as against."""
    import highdicom

    width = 254 * explanation.scale or 1.0
    # exact: every other function asks for a width of at least 1, and values may be far smaller (PS3.3 C.11.2.1.2)
    return highdicom.VOILUTTransformation(
        window_center=0.0, window_width=float(f"{width:.6g}"), voi_lut_function="LINEAR_EXACT"
    )


def _print_of(explanation: Explanation) -> str:
    words = repr((explanation.label, explanation.part, explanation.method, explanation.layer, float(explanation.scale)))
    return sha256(words.encode() + np.ascontiguousarray(explanation.codes).tobytes()).hexdigest()


def _comment(explanation: Explanation, what: str) -> str:
    caution = "for research, not for diagnosis: where the network looked, not where disease is"
    return "; ".join([caution, what, explanation.standing, *explanation.warnings])
