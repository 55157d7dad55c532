"""DICOM objects made by pydicom alone, so that no mistake of hilum's own writer is shared by its reader."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from io import BytesIO
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from .phantom import OBLIQUE, stored_values

ROOT = "1.2.826.0.1.3680043.8.498.77"


@contextmanager
def anything_goes() -> Iterator[None]:
    """pydicom writes what it is told to, wrong as it may be."""
    settings = pydicom.config.settings
    before = settings.reading_validation_mode, settings.writing_validation_mode
    settings.reading_validation_mode = settings.writing_validation_mode = pydicom.config.IGNORE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        settings.reading_validation_mode, settings.writing_validation_mode = before


def text(numbers: Sequence[float]) -> list[str]:
    """Decimal strings of at most 16 characters."""
    spelt = [[f"{float(x) + 0.0:.{digits}g}" for digits in range(12, 0, -1)] for x in numbers]
    return [next(word for word in words if len(word) <= 16) for words in spelt]


def ct(
    stored: np.ndarray | None = None, lps: np.ndarray = OBLIQUE, *, series: str = "1", patient: str = "P1"
) -> list[Dataset]:
    """A classic CT, one object per slice, in the order of k."""
    values = stored_values() if stored is None else stored
    return [_slice(values[:, :, k], lps, k, series, patient) for k in range(values.shape[2])]


def _slice(plane: np.ndarray, lps: np.ndarray, k: int, series: str, patient: str) -> Dataset:
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    directions = lps[:3, :3] / spacing
    data = Dataset()
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, f"{ROOT}.{series}.{k + 1}"
    data.StudyDate, data.SeriesDate, data.ContentDate = "20260101", "20260101", "20260101"
    data.StudyTime, data.SeriesTime, data.AcquisitionTime, data.ContentTime = "100000", "100100", "100200", "100300"
    data.AccessionNumber, data.Modality, data.Manufacturer = "A1", "CT", "Nobody"
    data.SeriesDescription = "phantom"
    data.PatientName, data.PatientID = f"Phantom^{patient}", patient
    data.PatientBirthDate, data.PatientSex = "19500101", "O"
    data.SliceThickness, data.KVP, data.PatientPosition = text([spacing[2]])[0], "120", "HFS"
    data.StudyInstanceUID, data.SeriesInstanceUID = f"{ROOT}.9.{patient[1:]}", f"{ROOT}.{series}"
    data.StudyID, data.SeriesNumber, data.AcquisitionNumber, data.InstanceNumber = "1", series, "1", str(k + 1)
    data.ImagePositionPatient = text((lps @ [0, 0, k, 1])[:3])
    data.ImageOrientationPatient = text(directions[:, :2].T.ravel())
    data.FrameOfReferenceUID = f"{ROOT}.8.{patient[1:]}"
    data.SliceLocation = text([k * spacing[2]])[0]
    _describe_pixels(data, plane)
    data.PixelSpacing = text([spacing[1], spacing[0]])
    data.RescaleIntercept, data.RescaleSlope, data.RescaleType = "-1024", "1", "HU"
    set_pixels(data, plane)
    return data


def _describe_pixels(data: Dataset, plane: np.ndarray) -> None:
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.Rows, data.Columns = plane.shape[1], plane.shape[0]
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1


def set_pixels(data: Dataset, plane: np.ndarray, kind: str = "<i2") -> None:
    """Native pixels from values [i j], or [i j frame]."""
    data.PixelData = np.ascontiguousarray(plane.T).astype(kind).tobytes()
    data["PixelData"].VR = "OW"


def pixels(data: Dataset) -> np.ndarray:
    """The stored values [i j] of a slice made here."""
    return np.frombuffer(data.PixelData, "<i2").reshape(data.Rows, data.Columns).T


def change(slices: Sequence[Dataset], **values: object) -> list[Dataset]:
    """Every slice with these elements; None takes an element away."""
    for data in slices:
        for keyword, value in values.items():
            if value is not None:
                setattr(data, keyword, value)
            elif keyword in data:
                delattr(data, keyword)
    return list(slices)


def as_bytes(data: Dataset, syntax: str = ExplicitVRLittleEndian, **meta: object) -> bytes:
    """The object as a file; `meta` overrules what its head says of it."""
    data = copy(data)
    data.file_meta = FileMetaDataset()
    data.file_meta.FileMetaInformationGroupLength = 0  # asks pydicom to write the true one
    data.file_meta.FileMetaInformationVersion = b"\0\1"
    data.file_meta.MediaStorageSOPClassUID = data.get("SOPClassUID", "") or CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.get("SOPInstanceUID", "") or f"{ROOT}.0"
    data.file_meta.TransferSyntaxUID = syntax
    data.file_meta.ImplementationClassUID = ROOT
    for keyword, value in meta.items():
        setattr(data.file_meta, keyword, value)
    stream = BytesIO()
    with anything_goes():
        implicit = syntax == pydicom.uid.ImplicitVRLittleEndian
        pydicom.dcmwrite(
            stream, data, implicit_vr=implicit, little_endian=syntax != pydicom.uid.ExplicitVRBigEndian,
            overwrite=True, force_encoding=True, enforce_file_format=False,
        )  # fmt: skip
    body = stream.getvalue()
    return body if body[128:132] == b"DICM" else b"\0" * 128 + b"DICM" + body


def save(
    slices: Sequence[Dataset],
    folder: Path,
    *,
    syntax: str = ExplicitVRLittleEndian,
    first: int = 1,
    name: str = "{:03d}.dcm",
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name.format(number) for number in range(first, first + len(slices))]
    for path, data in zip(paths, slices, strict=True):
        path.write_bytes(as_bytes(data, syntax))
    return paths


# Packed pixels

ENCODERS = {
    JPEG2000Lossless: lambda plane: imagecodecs.jpeg2k_encode(plane, codecformat="J2K", reversible=True, level=0),
    JPEGLSLossless: lambda plane: imagecodecs.jpegls_encode(plane),
    RLELossless: lambda plane: _rle(plane),
}


def _rle(plane: np.ndarray) -> bytes:
    """PS3.5 annex G: the high bytes, then the low bytes; a segment is of even length."""
    octets = plane.astype(">u2").view(np.uint8).reshape(*plane.shape, 2)
    segments = [_packbits(octets[..., n]) for n in (0, 1)]
    head = np.zeros(16, "<u4")
    head[:3] = 2, 64, 64 + len(segments[0])
    return head.tobytes() + b"".join(segments)


def _packbits(rows: np.ndarray) -> bytes:
    packed = b"".join(imagecodecs.packbits_encode(row.tobytes()) for row in rows)
    return packed + b"\0" * (len(packed) % 2)


def codestream(plane: np.ndarray, syntax: str) -> bytes:
    """One frame [i j], unsigned, packed."""
    return bytes(ENCODERS[syntax](np.ascontiguousarray(plane.T.astype(np.uint16))))


def pack(data: Dataset, syntax: str, damage: object = None) -> Dataset:
    """The slice with packed pixels, each codestream having gone through `damage`."""
    stream = codestream(pixels(data), syntax)
    stream = damage(stream) if callable(damage) else stream
    return set_codestreams(data, [stream])


def set_codestreams(data: Dataset, streams: Sequence[bytes]) -> Dataset:
    data.PixelRepresentation, data.BitsStored, data.HighBit = 0, 16, 15
    data.PixelData = encapsulate([s + b"\0" * (len(s) % 2) for s in streams])
    data["PixelData"].VR = "OB"
    data["PixelData"].is_undefined_length = True
    return data


# Objects of many frames


def enhanced(
    stored: np.ndarray | None = None, lps: np.ndarray = OBLIQUE, sop_class: str = EnhancedCTImageStorage
) -> Dataset:
    """The phantom as one multi-frame object, its frames in the order of k."""
    values = stored_values() if stored is None else stored
    one = _slice(values[:, :, 0], lps, 0, "5", "P1")
    data = deepcopy(one)
    for keyword in (
        *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SliceLocation"),
        *("RescaleIntercept", "RescaleSlope", "RescaleType", "AcquisitionNumber"),
    ):
        delattr(data, keyword)
    data.SOPClassUID, data.SOPInstanceUID = sop_class, f"{ROOT}.5.1"
    data.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    data.NumberOfFrames = values.shape[2]
    set_pixels(data, values)
    data.SharedFunctionalGroupsSequence = Items([_shared(one)])
    data.PerFrameFunctionalGroupsSequence = Items([_per_frame(lps, k) for k in range(values.shape[2])])
    return data


def item(**values: object) -> Items:
    data = Dataset()
    for keyword, value in values.items():
        setattr(data, keyword, value)
    return Items([data])


def _shared(one: Dataset) -> Dataset:
    group = Dataset()
    group.PixelMeasuresSequence = item(PixelSpacing=one.PixelSpacing, SliceThickness=one.SliceThickness)
    group.PlaneOrientationSequence = item(ImageOrientationPatient=one.ImageOrientationPatient)
    group.PixelValueTransformationSequence = item(RescaleIntercept="-1024", RescaleSlope="1", RescaleType="HU")
    group.CTImageFrameTypeSequence = item(FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"])
    return group


def _per_frame(lps: np.ndarray, k: int) -> Dataset:
    group = Dataset()
    group.FrameContentSequence = item(
        FrameAcquisitionNumber=1, StackID="1", InStackPositionNumber=k + 1, DimensionIndexValues=[1, k + 1]
    )
    group.PlanePositionSequence = item(ImagePositionPatient=text((lps @ [0, 0, k, 1])[:3]))
    return group


# What lies in a series' folder and is no slice of it


def other_object(sop_class: str, number: int, modality: str) -> Dataset:
    """An object of the phantom's own series without pixels: a report, a presentation state."""
    data = _slice(stored_values()[:, :, 0], OBLIQUE, 900 + number, "1", "P1")
    for keyword in [
        *("PixelData", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
        *("SamplesPerPixel", "PhotometricInterpretation", "PixelSpacing", "ImagePositionPatient", "ImageType"),
        *("ImageOrientationPatient", "SliceThickness", "SliceLocation", "RescaleSlope", "RescaleIntercept"),
        *("RescaleType", "KVP", "FrameOfReferenceUID"),
    ]:
        delattr(data, keyword)
    data.SOPClassUID, data.SOPInstanceUID, data.Modality = sop_class, f"{ROOT}.7.{number}", modality
    return data


def dose_report(number: int) -> Dataset:
    """A picture of a table, as CT scanners send it at the end of a series."""
    data = _slice(stored_values()[:, :, 0], OBLIQUE, 900 + number, "1", "P1")
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID", "SliceLocation"):
        delattr(data, keyword)
    data.SOPClassUID, data.SOPInstanceUID = pydicom.uid.SecondaryCaptureImageStorage, f"{ROOT}.7.{number}"
    data.ImageType, data.ConversionType = ["DERIVED", "SECONDARY", "OTHER"], "WSD"
    return data


DEFLATED = DeflatedExplicitVRLittleEndian
