"""One channel of a Volume as a classic DICOM series, one file per slice."""

import hashlib
import os
import uuid
from pathlib import Path

import numpy as np
import pydicom
from jaxtyping import Integer, Shaped
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage

from ..volume import LPS_TO_RAS, Geometry, ScanError, Volume


def write_series(
    volume: Volume, folder: Path, *, description: str, modality: str = "MR", study: str | None = None
) -> list[Path]:
    """One channel as a classic series, one file per slice; its UIDs follow from its content.

    Series written with the same word for `study` share their study and frame of reference. Slices of a left-handed
    grid come back in the opposite order when read, every voxel where it was: DICOM knows right-handed series only.
    """
    _refuse_unwritable(volume, modality)
    stored, slope, intercept = _stored(volume.voxels[0])
    common = _common(volume, description, modality, study, stored, slope, intercept)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k in range(stored.shape[2]):
        path = folder / f"{k + 1:04d}.dcm"
        _save(_slice(common, volume.geometry, np.ascontiguousarray(stored[:, :, k].T), k), path)
        paths.append(path)
    return paths


WRITABLE = {"MR": MRImageStorage, "CT": CTImageStorage}


def _refuse_unwritable(volume: Volume, modality: str) -> None:
    if modality not in WRITABLE:
        raise ScanError(f"A series of modality {modality} cannot be written; {' or '.join(WRITABLE)} can. Choose one.")
    if len(volume.channels) != 1 or volume.geometry.is_sheared:
        raise ScanError(
            f"A volume of {len(volume.channels)} channels on {volume.geometry} was to become a DICOM series; "
            "one channel on a grid with right angles is needed. Write each channel as a series of its own."
        )
    if volume.voxels.dtype.kind not in "biuf" or not np.isfinite(volume.voxels).all():
        raise ScanError("Voxels that are no finite numbers cannot be written as DICOM. Replace them first.")


def _stored(values: Shaped[np.ndarray, "i j k"]) -> tuple[Integer[np.ndarray, "i j k"], str, str]:
    """int16 pixels with the slope and intercept that bring the values back, as DICOM will spell them."""
    values = values.astype(np.float64)
    least, most = float(values.min()), float(values.max())
    slope, intercept = "1", "0"
    if np.any(values != np.rint(values)) or most - least > 65535:
        # 65000 steps, not 65536: the two numbers are rounded to 16 characters and the ends must still fit
        slope, intercept = _decimal((most - least) / 65000 or 1.0), _decimal((most + least) / 2)
    elif least < -32768 or most > 32767:
        intercept = _decimal(least + 32768)
    return np.rint((values - float(intercept)) / float(slope)).astype(np.int16), slope, intercept


def _decimal(number: float) -> str:
    """As many digits as fit 16 characters; pydicom 3.0's own function makes 17 of 9.999999999999998."""
    spelt = (f"{float(number) + 0.0:.{digits}g}" for digits in range(16, 0, -1))  # + 0.0: no minus zero
    return next(text for text in spelt if len(text) <= 16)


def _common(
    volume: Volume, description: str, modality: str, study: str | None, stored: np.ndarray, slope: str, intercept: str
) -> Dataset:
    """Everything the slices of a series share: the modules of the MR or CT image that PS3.3 A.4, A.3 ask for."""
    content = hashlib.sha256(repr((description, modality, study, slope, intercept, stored.shape)).encode())
    content.update(volume.geometry.affine.tobytes() + np.ascontiguousarray(stored).tobytes())
    series = content.hexdigest()
    data = Dataset()
    data.SpecificCharacterSet = "ISO_IR 192"
    data.ImageType = ["DERIVED", "PRIMARY", "AXIAL" if modality == "CT" else "OTHER"]
    data.SOPClassUID = WRITABLE[modality]
    data.Modality = modality
    data.SeriesDescription = " ".join(description.replace("\\", "/").split())[:64]
    data.PatientName, data.PatientID = "Hilum^Synthetic", "hilum"
    data.StudyInstanceUID = _uid("study", study if study is not None else series)
    data.FrameOfReferenceUID = _uid("frame of reference", study if study is not None else series)
    data.SeriesInstanceUID = _uid("series", series)
    data.SeriesNumber = 1
    data.Rows, data.Columns = stored.shape[1], stored.shape[0]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    data.RescaleSlope, data.RescaleIntercept = slope, intercept
    data.RescaleType = "HU" if modality == "CT" else "US"
    data.SliceThickness = _decimal(volume.geometry.spacing[2])
    data.PatientPosition = "HFS"
    empty = ["PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID", "AccessionNumber", "Manufacturer"]
    empty += ["ReferringPhysicianName", "PositionReferenceIndicator", "AcquisitionNumber", "Laterality"]
    empty += ["KVP"] if modality == "CT" else ["ScanOptions", "RepetitionTime", "EchoTime", "EchoTrainLength"]
    for tag in empty:  # type 2: must be there, may be unknown
        setattr(data, tag, None)
    if modality == "MR":
        data.ScanningSequence, data.SequenceVariant, data.MRAcquisitionType = "RM", "NONE", "3D"
        data.SpacingBetweenSlices = data.SliceThickness
    return data


def _slice(common: Dataset, geometry: Geometry, pixels: Integer[np.ndarray, "row column"], k: int) -> Dataset:
    lps = LPS_TO_RAS @ geometry.affine
    direction = lps[:3, :3] / np.array(geometry.spacing)
    data = Dataset(common)
    data.SOPInstanceUID = _uid("slice", f"{common.SeriesInstanceUID} {k}")
    data.InstanceNumber = k + 1
    data.ImagePositionPatient = [_decimal(x) for x in (lps @ [0, 0, k, 1])[:3]]
    data.ImageOrientationPatient = [_decimal(x) for x in direction[:, :2].T.ravel()]
    data.PixelSpacing = [_decimal(geometry.spacing[1]), _decimal(geometry.spacing[0])]  # between rows, then columns
    data.PixelData = pixels.astype("<i2").tobytes()
    data["PixelData"].VR = "OW"
    return data


def _save(data: Dataset, path: Path) -> None:
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made = path.with_name(f".{path.name}.{os.getpid()}")
    pydicom.dcmwrite(made, data, enforce_file_format=True)
    made.replace(path)


def _uid(kind: str, content: str) -> str:
    """A UID that needs no registered root (PS3.5 B.2: 2.25 and a UUID), the same for the same content."""
    digest = hashlib.sha256(f"hilum {kind} {content}".encode()).digest()
    return f"2.25.{uuid.UUID(bytes=digest[:16], version=5).int}"
