"""Slides as scanners and programs write them, and as they arrive broken: what the tests of slides share."""

from collections.abc import Sequence
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage, generate_uid

from preprocessing.slide_phantoms import PhantomSlide


def halved(pixels: np.ndarray, times: int) -> list[np.ndarray]:
    """The picture and each half of it, averaged."""
    levels = [pixels]
    for _ in range(times):
        height, width = (side // 2 * 2 for side in levels[-1].shape[:2])
        four = levels[-1][:height, :width].astype(float).reshape(height // 2, 2, width // 2, 2, 3)
        levels.append((four.mean((1, 3)) + 0.5).astype(np.uint8))
    return levels


def aperio(path: Path, phantom: PhantomSlide, times: int = 2, says_resolution: bool = True) -> Path:
    """As an Aperio scanner writes it: its words in the description, a thumbnail in strips between the levels."""
    first, *others = halved(phantom.pixels, times)
    height, width = first.shape[:2]
    mpp = f"|MPP = {phantom.microns_per_pixel[0]:.4f}" if says_resolution else ""
    words = f"Aperio Image Library v11.2.1 \r\n{width}x{height} [0,0 {width}x{height}] (256x256) JPEG/RGB Q=90|AppMag = 20{mpp}"
    how = {"compression": "jpeg", "photometric": "rgb", "metadata": None, "compressionargs": {"level": 90}}
    with tifffile.TiffWriter(path) as file:
        file.write(first, tile=(256, 256), description=words, software=False, **how)
        file.write(others[-1], rowsperstrip=16, description="Aperio thumbnail", software=False, **how)
        for level in others:
            file.write(level, tile=(256, 256), description=words, software=False, **how)
    return path


def leica(path: Path, phantom: PhantomSlide, offset_um: tuple[float, float]) -> Path:
    """As a Leica SCN400 writes it: what was scanned lies somewhere on a far larger glass."""
    levels = halved(phantom.pixels, 1)
    height, width = levels[0].shape[:2]
    nm = round(phantom.microns_per_pixel[0] * 1000)
    left, top = (round(side * 1000) for side in offset_um)
    dimensions = "".join(
        f'<dimension sizeX="{level.shape[1]}" sizeY="{level.shape[0]}" r="{number}" ifd="{number}"/>'
        for number, level in enumerate(levels)
    )
    words = f"""<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">
<collection name="c" uuid="urn:uuid:1" sizeX="{4 * width * nm}" sizeY="{3 * height * nm}"><image name="i" uuid="urn:uuid:2">
<pixels sizeX="{width}" sizeY="{height}">{dimensions}</pixels>
<view sizeX="{width * nm}" sizeY="{height * nm}" offsetX="{left}" offsetY="{top}" spacingZ="0"/>
<scanSettings><objectiveSettings><objective>20</objective></objectiveSettings><illuminationSettings>
<numericalAperture>0.4</numericalAperture><illuminationSource>brightfield</illuminationSource></illuminationSettings>
</scanSettings><device model="m" version="1"/><creationDate>2020-01-01</creationDate></image></collection></scn>"""
    per_cm = (1e7 / nm, 1e7 / nm)
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for number, level in enumerate(levels):
            file.write(
                level,
                tile=(256, 256),
                compression="jpeg",
                photometric="rgb",
                metadata=None,
                software=False,
                resolution=per_cm,
                resolutionunit="CENTIMETER",
                description=words if number == 0 else None,
            )
    return path


def broken_blocks(path: Path, blocks: Sequence[int], how: str, page: int = 0) -> Path:
    """Some blocks of a page overwritten in place: by zeros, by another file's bytes, or from their middle on."""
    with tifffile.TiffFile(path) as file:
        places = [(file.pages[page].dataoffsets[n], file.pages[page].databytecounts[n]) for n in blocks]
    noise = np.random.default_rng(0)
    with path.open("r+b") as stream:
        for offset, count in places:
            start = {"zeros": 0, "noise": count // 4, "half": count // 2}[how]
            stream.seek(offset + start)
            stream.write(noise.bytes(count - start) if how == "noise" else bytes(count - start))
    return path


def dicom(folder: Path, phantom: PhantomSlide, times: int = 2) -> Path:
    """As a scanner that speaks DICOM writes it: a file for each level, frames of 256 pixels in JPEG, one series."""
    folder.mkdir()
    series = generate_uid(entropy_srcs=["series", phantom.id])
    for number, pixels in enumerate(halved(phantom.pixels, times)):
        height, width = pixels.shape[:2]
        frames = [
            imagecodecs.jpeg8_encode(_block(pixels, row, column), level=95)
            for row in range(0, height, 256)
            for column in range(0, width, 256)
        ]
        image = Dataset()
        image.file_meta = FileMetaDataset()
        image.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = VLWholeSlideMicroscopyImageStorage
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid(
            entropy_srcs=[series, str(number)]
        )
        image.SeriesInstanceUID, image.StudyInstanceUID, image.Modality = series, series, "SM"
        image.ImageType = [
            "ORIGINAL" if number == 0 else "DERIVED",
            "PRIMARY",
            "VOLUME",
            "NONE" if number == 0 else "RESAMPLED",
        ]
        image.DimensionOrganizationType = "TILED_FULL"
        image.SamplesPerPixel, image.PhotometricInterpretation, image.PlanarConfiguration = 3, "YBR_FULL_422", 0
        image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 8, 8, 7, 0
        image.Rows, image.Columns, image.NumberOfFrames = 256, 256, len(frames)
        image.TotalPixelMatrixRows, image.TotalPixelMatrixColumns = height, width
        measures, shared = Dataset(), Dataset()
        measures.PixelSpacing = [step * 2**number / 1000 for step in reversed(phantom.microns_per_pixel)]
        shared.PixelMeasuresSequence = [measures]
        image.SharedFunctionalGroupsSequence = [shared]
        image.PixelData = encapsulate(frames)
        image["PixelData"].is_undefined_length = True
        image.save_as(folder / f"level_{number}.dcm", enforce_file_format=True)
    return folder


def _block(pixels: np.ndarray, row: int, column: int) -> np.ndarray:
    part = pixels[row : row + 256, column : column + 256]
    return np.pad(part, ((0, 256 - part.shape[0]), (0, 256 - part.shape[1]), (0, 0)), constant_values=255)
