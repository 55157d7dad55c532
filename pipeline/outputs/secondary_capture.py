"""overlay.dcm: the picture of the output `overlay` as a DICOM Secondary Capture in the patient's study, for any viewer.

The picture says what was found and by what, and not in whom: neither a patient nor a case is named in its pixels, so that
what identifies lies in the header alone, where an archive knows how to take it out. Uncompressed: every viewer opens it.
"""

import datetime
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from pydicom.dataset import Dataset
from pydicom.uid import SecondaryCaptureImageStorage

from ..report import Result
from . import _dicom, overlay

FILE_NAME = "overlay.dcm"

SERIES_NUMBER = 4000
"""The series follows its source's number by so much."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the picture shows."""

    picture: overlay.Config = field(default_factory=overlay.Config)
    """As in the output `overlay`."""
    revision: _dicom.Revision = field(default_factory=_dicom.Revision)
    """Where this is not the first answer for its scan."""


def write(result: Result, folder: Path, config: Config) -> list[Path]:
    """One file; the same picture of the same study has the same UIDs."""
    origin = _dicom.origin_of(result.scan)
    now = datetime.datetime.now()
    path = folder / FILE_NAME
    pixels = np.asarray(overlay.picture(result, config.picture, anonymous=True))
    with _dicom.quiet():
        data = _capture(result, origin, pixels, now, config.revision.number)
    _dicom.write_object(data, path, now, origin, result, lies_in_patient=False, revision=config.revision)
    return [path]


def _capture(
    result: Result,
    origin: _dicom.Origin,
    pixels: UInt8[np.ndarray, "row column 3"],
    now: datetime.datetime,
    revision: int,
) -> Dataset:
    print_ = _dicom.fingerprint(result, origin, revision)
    data = Dataset()
    data.SOPClassUID = SecondaryCaptureImageStorage
    data.SOPInstanceUID = _dicom.uid("picture", print_, sha256(pixels.tobytes()).hexdigest())
    data.SeriesInstanceUID = _dicom.uid("picture series", print_)
    data.Modality, data.ConversionType = "OT", "WSD"  # made by a workstation
    data.SeriesNumber, data.InstanceNumber = SERIES_NUMBER + origin.series_number, 1
    data.SeriesDescription = _dicom.one_line(f"overlay, not for diagnosis: {result.package_name}")
    data.ManufacturerModelName = _dicom.MANUFACTURER
    data.DeviceSerialNumber = _dicom.one_line(result.package_id)
    data.ImageType = ["DERIVED", "SECONDARY"]
    data.ContentDate, data.ContentTime = _dicom.date_and_time(now)
    data.DateOfSecondaryCapture, data.TimeOfSecondaryCapture = _dicom.date_and_time(now)
    data.PatientOrientation = None  # several planes, each with its letters
    data.Laterality = None  # must be there, empty, as the source may show one of a pair
    data.BurnedInAnnotation = "NO"  # words, but none that identify
    data.ImageComments = "what a program found; for research, not for diagnosis"
    data.DerivationDescription = _dicom.one_line(f"segmented by {result.package_name}", 1024)
    data.DerivationCodeSequence = [_dicom.concept(_dicom.SEGMENTATION)]
    data.ReferencedSeriesSequence = [_dicom.referenced_series(origin)]
    data.SourceImageSequence = [_dicom.source(instance) for instance in origin.instances]
    for element in origin.loss:
        data[element.tag] = element
    _add_pixels(data, pixels)
    return data


def _add_pixels(data: Dataset, pixels: UInt8[np.ndarray, "row column 3"]) -> None:
    data.Rows, data.Columns, data.SamplesPerPixel = *pixels.shape[:2], 3
    data.PhotometricInterpretation, data.PlanarConfiguration, data.PixelRepresentation = "RGB", 0, 0
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit = 7
    data.PixelData = pixels.tobytes()
