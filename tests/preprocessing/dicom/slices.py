"""Slices and many-frame objects for the tests: unless told otherwise, a pixel shows a linear function of its place."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

from preprocessing import dicom
from preprocessing.reading import STRICT, Reading
from preprocessing.volume import Geometry, Volume

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
SHAPE = (5, 4, 6)
SLOPE = 0.01
GRADIENT, OFFSET = np.array([0.3, -0.2, 0.7]), 40.0
AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))

Direction = tuple[Sequence[float], Sequence[float]]


def ramp(lps: np.ndarray) -> np.ndarray:
    """The value at points of the patient: linear, so that linear interpolation must bring it back exactly."""
    return lps @ GRADIENT + OFFSET


def a_slice(
    position: Sequence[float],
    direction: Direction = AXIAL,
    spacing: tuple[float, float] = (0.8, 0.7),
    shape: tuple[int, int] = (5, 6),
    values: np.ndarray | None = None,
    **elements: Any,
) -> Dataset:
    """A classic CT or MR slice that shows the ramp, or `values` as they are."""
    data = Dataset()
    data.SOPClassUID = MRImageStorage if elements.get("Modality") == "MR" else CTImageStorage
    data.SOPInstanceUID, data.SeriesInstanceUID, data.StudyInstanceUID = generate_uid(), "1.2.3", "1.2"
    data.FrameOfReferenceUID, data.Modality = "1.2.9", "CT"
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.ImagePositionPatient = [float(f"{x:.8g}") for x in position]
    data.ImageOrientationPatient = [float(f"{x:.10g}") for x in np.ravel(direction)]
    data.PixelSpacing = list(spacing)
    stored = stored_ramp(position, direction, spacing, shape) if values is None else values
    put_pixels(data, stored)
    data.RescaleSlope, data.RescaleIntercept = (SLOPE, 0) if values is None else (1, 0)
    for tag, value in elements.items():
        setattr(data, tag, value)
    return data


def stored_ramp(
    position: Sequence[float], direction: Direction, spacing: tuple[float, float], shape: tuple[int, int]
) -> np.ndarray:
    rows, columns = np.indices(shape)
    row, column = np.array(direction)
    points = np.array(position) + columns[..., None] * row * spacing[1] + rows[..., None] * column * spacing[0]
    return np.rint(ramp(points) / SLOPE).astype(np.int16)


def put_pixels(data: Dataset, stored: np.ndarray, bits: int = 16) -> None:
    data.Rows, data.Columns = stored.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = stored.dtype.itemsize * 8
    data.BitsStored = min(bits, data.BitsAllocated) if data.BitsAllocated == 16 else data.BitsAllocated
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(stored.dtype.kind == "i")
    data.PixelData = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    data["PixelData"].VR = "OW" if data.BitsAllocated > 8 else "OB"


def a_stack(count: int = 6, step: float = 2.5, **elements: Any) -> list[Dataset]:
    """Slices above each other; an element given as a function is that of the slice's number."""
    slices = []
    for k in range(count):
        own = {tag: value(k) if callable(value) else value for tag, value in elements.items()}
        slices.append(a_slice((-10, -20, 30 + k * step), InstanceNumber=own.pop("InstanceNumber", k + 1), **own))
    return slices


def many_frames(
    frames: Sequence[dict[str, Any]], shared: dict[str, Any] | None = None, shape: tuple[int, int] = (5, 6), **top: Any
) -> Dataset:
    """An enhanced object; the groups are given by {macro: {element: value}}, each frame with its position at least."""
    data = a_slice((0, 0, 0), shape=shape)
    for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"):
        delattr(data, tag)
    data.SOPClassUID, data.Modality, data.ImageType = (
        EnhancedMRImageStorage,
        "MR",
        ["ORIGINAL", "PRIMARY", "T1", "NONE"],
    )
    data.NumberOfFrames = len(frames)
    planes = [frame.pop("values", None) for frame in frames]
    positions = [frame["PlanePositionSequence"]["ImagePositionPatient"] for frame in frames]
    stored = [
        stored_ramp(position, AXIAL, (0.8, 0.7), shape) if plane is None else plane
        for plane, position in zip(planes, positions, strict=True)
    ]
    put_pixels(data, np.stack(stored))
    data.PerFrameFunctionalGroupsSequence = [_group(frame) for frame in frames]
    data.SharedFunctionalGroupsSequence = [_group(SHARED if shared is None else shared)]
    for tag, value in top.items():
        if value is None:
            delattr(data, tag)
        else:
            setattr(data, tag, value)
    return data


SHARED = {
    "PlaneOrientationSequence": {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
    "PixelMeasuresSequence": {"PixelSpacing": [0.8, 0.7]},
    "PixelValueTransformationSequence": {"RescaleSlope": SLOPE, "RescaleIntercept": 0, "RescaleType": "US"},
}


def placed(z: float, **groups: Any) -> dict[str, Any]:
    """The groups of one frame at a height."""
    return {"PlanePositionSequence": {"ImagePositionPatient": [-10.0, -20.0, z]}, **groups}


def _group(macros: dict[str, Any]) -> Dataset:
    group = Dataset()
    for macro, elements in macros.items():
        item = Dataset()
        for tag, value in elements.items():
            setattr(item, tag, [_group(value[0])] if isinstance(value, list) and isinstance(value[0], dict) else value)
        setattr(group, macro, [item])
    return group


def save(folder: Path, slices: Sequence[Dataset], name: Callable[[int], str] = "{:04d}.dcm".format) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, data in enumerate(slices):
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        paths.append(folder / name(number))
        pydicom.dcmwrite(paths[-1], data, enforce_file_format=True)
    return paths


def series_of(folder: Path) -> dict[str, dicom.Series]:
    """The volumes in a folder by the name of their part; nothing may be left alone."""
    series, left_alone = dicom.series_in([path for path in folder.rglob("*") if path.is_file()])
    assert not left_alone, left_alone
    assert len({one.part for one in series}) == len(series)
    return {one.part: one for one in series}


def read_one(folder: Path, reading: Reading = STRICT) -> Volume:
    (series,) = series_of(folder).values()
    return dicom.read(series, reading)


def assert_shows_the_ramp(volume: Volume, tolerance: float = 0.006, inside: np.ndarray | None = None) -> None:
    """Every voxel, at its place in the patient, has the value of that place."""
    geometry = volume.geometry
    ijk = np.stack(np.meshgrid(*map(np.arange, geometry.shape), indexing="ij"), axis=-1)
    wanted = ramp(geometry.to_world(ijk) * [-1, -1, 1])
    off = np.abs(volume.voxels[0] - wanted)
    assert (off if inside is None else off[inside]).max() <= tolerance


# volumes to be written


def a_volume(seed: int = 0, affine: np.ndarray | None = None, kind: str = "int16") -> Volume:
    random = np.random.default_rng(seed)
    voxels = random.integers(-1000, 3000, SHAPE).astype(kind)
    if affine is None:
        affine = an_affine(np.eye(3), (0.7, 0.9, 2.5))
    return Volume(voxels=voxels[None], geometry=Geometry(shape=SHAPE, affine=affine), channels=("0",))


def an_affine(
    direction: np.ndarray, spacing: tuple[float, ...], origin: tuple[float, ...] = (-90, 30, 7)
) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(spacing)
    affine[:3, 3] = origin
    return affine


def turned(axis: tuple[float, ...], angle: float) -> np.ndarray:
    """The rotation by `angle` about `axis` (Rodrigues)."""
    x, y, z = np.array(axis) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def as_simpleitk_reads(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    (uid,) = SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)
    image = SimpleITK.ReadImage(names)
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0), LPS_TO_RAS @ affine
