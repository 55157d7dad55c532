"""A CT of 300 slices read from its files: hilum beside SimpleITK, pydicom by hand and dicom2nifti; time and memory.

Plain (explicit VR little endian) and JPEG 2000 without loss. Each reading is a process of its own that has imported its
library before the clock starts; the readers take turns, so that a busy minute hits all alike. `--peers PYTHON` names an
interpreter in which the others (and their decoders) are installed; without it they are looked for in this one.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench

SIZE = 512


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--peers", default=sys.executable, help="the interpreter that has the other readers")
    words.add_argument("--slices", type=int, default=300)
    words.add_argument("--rounds", type=int, default=5)
    words.add_argument("--make", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    words.add_argument("--read", nargs=2, metavar=("READER", "FOLDER"), help=argparse.SUPPRESS)
    said = words.parse_args()
    if said.make:
        MAKERS[said.make[0]](Path(said.make[1]), said.slices)
    elif said.read:
        print(json.dumps(measured(said.read[0], Path(said.read[1]))))
    else:
        compare(said.peers, said.slices, said.rounds)


def compare(peers: str, slices: int, rounds: int) -> None:
    print(bench.heading())
    voxels = slices * SIZE * SIZE * 2
    for kind in MAKERS:
        with tempfile.TemporaryDirectory() as folder:
            bench.child(sys.executable, __file__, "--make", kind, folder, "--slices", str(slices))
            held = sum(path.stat().st_size for path in Path(folder).iterdir())
            print(f"\n{slices} x {SIZE} x {SIZE}, int16, {kind}: {held / 2**20:.0f} MiB of files; {rounds} rounds")
            report(in_turn(peers, folder, rounds), voxels)


def in_turn(peers: str, folder: str, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """What each reader measured, round by round; readers that cannot read it drop out and say why."""
    found: dict[str, list[dict[str, Any]]] = {reader: [] for reader in READERS}
    for _ in range(rounds + 1):  # the first warms the cache of files, and is not counted
        for reader in list(found):
            answer = bench.child(sys.executable if reader == "hilum" else peers, __file__, "--read", reader, folder)
            if "error" in answer:
                print(f"{reader:<26} left out: {answer['error']}")
                del found[reader]
            else:
                found[reader].append(answer)
    return {reader: answers[1:] for reader, answers in found.items()}


def report(found: dict[str, list[dict[str, Any]]], voxels: int) -> None:
    medians = {reader: statistics.median(a["seconds"] for a in answers) for reader, answers in found.items()}
    sums = {answers[0]["sum"] for answers in found.values()}
    for reader, answers in found.items():
        memory = max(answer["memory"] for answer in answers) / voxels
        ratio = medians[reader] / medians["hilum"]
        busy = statistics.median(answer["busy"] for answer in answers)
        version = answers[0]["version"]
        speed = f"{medians[reader]:6.2f} s  {ratio:5.2f} of hilum  processor {busy:6.2f} s"
        print(f"{reader + ' ' + version:<26} {speed}  memory {memory:4.2f} x voxels")
    others = [seconds for reader, seconds in medians.items() if reader != "hilum"]
    if others:
        print(f"{'':<26} hilum is {min(others) / medians['hilum']:.2f} times as fast as the fastest other")
    print("all found the same voxels" if len(sums) == 1 else f"THE VOXELS DIFFER: sums {sorted(sums)}")


# one reading, in a process of its own


def measured(reader: str, folder: Path) -> dict[str, Any]:
    read, version = READERS[reader]()
    before = bench.peak()
    started, busy = time.perf_counter(), time.process_time()
    voxels = read(folder)
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    memory = bench.peak() - before
    return {
        "seconds": seconds,
        "busy": busy,
        "memory": memory,
        "version": version,
        "sum": int(voxels.sum(dtype="int64")),
    }


Reader = tuple[Callable[[Path], Any], str]
"""How it reads a folder into an array, and its version. Only what is imported on the way is needed by it."""


def hilum() -> Reader:
    from importlib.metadata import version

    from preprocessing import dicom

    def read(folder: Path) -> Any:
        series, _ = dicom.series_in(list(folder.iterdir()))
        return dicom.read(series[0]).voxels

    return read, version("hilum")


def simpleitk() -> Reader:
    import SimpleITK

    reader = SimpleITK.ImageSeriesReader()
    images = []

    def read(folder: Path) -> Any:
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
        images.append(reader.Execute())
        return SimpleITK.GetArrayViewFromImage(images[0])  # a view, which costs nothing, and does not keep its image

    return read, SimpleITK.Version.VersionString()


def pydicom_by_hand() -> Reader:
    import numpy
    import pydicom

    def read(folder: Path) -> Any:
        slices = [pydicom.dcmread(path) for path in folder.iterdir()]
        slices.sort(key=lambda one: float(one.ImagePositionPatient[2]))
        stack = numpy.empty((len(slices), slices[0].Rows, slices[0].Columns), numpy.int16)
        for k, one in enumerate(slices):
            stack[k] = one.pixel_array.astype(numpy.int16) * int(one.RescaleSlope) + int(one.RescaleIntercept)
        return stack

    return read, pydicom.__version__


def dicom2nifti() -> Reader:
    from importlib.metadata import version

    import dicom2nifti as library
    import numpy

    def read(folder: Path) -> Any:
        return numpy.asanyarray(library.dicom_series_to_nifti(str(folder), None, reorient_nifti=False)["NII"].dataobj)

    return read, version("dicom2nifti")


READERS = {"hilum": hilum, "SimpleITK": simpleitk, "pydicom": pydicom_by_hand, "dicom2nifti": dicom2nifti}


# the series


def make_plain(folder: Path, slices: int) -> None:
    make(folder, slices, "1.2.840.10008.1.2.1", lambda pixels: pixels.tobytes())


def make_jpeg_2000(folder: Path, slices: int) -> None:
    import imagecodecs
    from pydicom.encaps import encapsulate

    make(
        folder,
        slices,
        "1.2.840.10008.1.2.4.90",
        lambda pixels: encapsulate([imagecodecs.jpeg2k_encode(pixels, level=0, codecformat="j2k", reversible=True)]),
    )


MAKERS = {"plain": make_plain, "JPEG 2000 lossless": make_jpeg_2000}


def make(folder: Path, slices: int, syntax: str, pack: Callable[[Any], bytes]) -> None:
    """A body of noise in air, 12 bits of it, shuffled file names: as a scanner's files come out of an archive."""
    import numpy
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import UID, CTImageStorage

    random = numpy.random.default_rng(0)
    rows, columns = numpy.mgrid[-1:1:512j, -1:1:512j]
    for k in range(slices):
        inside = rows**2 / 0.5 + columns**2 / 0.8 < 1 - 0.2 * (k / slices)
        pixels = numpy.where(inside, random.normal(1050, 15, inside.shape), random.normal(30, 5, inside.shape))
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = UID(syntax)
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = f"1.2.3.{k + 1}"
        data.ImageType, data.Modality = ["ORIGINAL", "PRIMARY", "AXIAL"], "CT"
        data.Manufacturer, data.PatientName, data.PatientID = "none", "none", "none"
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = "1.2.4", "1.2.5", "1.2.6"
        data.SeriesNumber, data.InstanceNumber = 1, k + 1
        data.ImagePositionPatient, data.ImageOrientationPatient = [-200, -200, 1.25 * k], [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.SliceThickness = [0.78125, 0.78125], 1.25
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.Rows, data.Columns = SIZE, SIZE
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        data.PixelData = pack(pixels.clip(0, 4095).astype("uint16"))
        data["PixelData"].VR = "OW"
        data["PixelData"].is_undefined_length = UID(syntax).is_compressed
        data.save_as(folder / f"{k * 7919 % slices:04d}.dcm", enforce_file_format=True)


if __name__ == "__main__":
    main()
