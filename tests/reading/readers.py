"""The readers that are compared: each takes a path and returns the volumes it makes of it, or raises."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from .kinds import Kind
from .phantom import LPS_TO_RAS, Seen

Reader = Callable[[Path], list[Seen]]


def simple_itk(path: Path) -> list[Seen]:
    """ReadImage; for a folder what the manual shows: every series that GDCM finds there, its files in GDCM's order."""
    import SimpleITK

    if not path.is_dir():
        return [_of_itk(SimpleITK.ReadImage(str(path)))]
    found = SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(path))
    if not found:
        raise ValueError("no series")
    return [
        _of_itk(SimpleITK.ReadImage(list(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(path), series))))
        for series in found
    ]


def _of_itk(image: Any) -> Seen:
    import SimpleITK

    axes = image.GetDimension()
    if axes < 3:
        raise ValueError(f"{axes} axes")
    voxels = SimpleITK.GetArrayFromImage(image)
    vector = image.GetNumberOfComponentsPerPixel() > 1
    space = voxels.transpose(*range(axes)[::-1], *([axes] if vector else []))
    affine = np.eye(4)
    direction = np.array(image.GetDirection()).reshape(axes, axes)[:3, :3]
    affine[:3, :3] = direction * np.array(image.GetSpacing()[:3])
    affine[:3, 3] = image.GetOrigin()[:3]
    return Seen(space, LPS_TO_RAS @ affine)


def nibabel(path: Path) -> list[Seen]:
    import nibabel as library

    image = library.load(path)
    if image.get_data_dtype().fields:
        coloured = np.asanyarray(image.dataobj)
        return [Seen(np.stack([coloured[name] for name in coloured.dtype.names], axis=-1), image.affine)]
    complex_ = image.get_data_dtype().kind == "c"
    return [Seen(np.asanyarray(image.dataobj) if complex_ else image.get_fdata(), image.affine)]


def monai(reader: str | None) -> Reader:
    def read(path: Path) -> list[Seen]:
        from monai.transforms import LoadImage

        image = LoadImage(reader=reader, image_only=True)(str(path))
        return [Seen(image.numpy(), image.affine.numpy())]

    return read


PEERS: dict[str, Reader] = {
    "SimpleITK": simple_itk,
    "nibabel": nibabel,
    "MONAI LoadImage": monai(None),
    "MONAI PydicomReader": monai("PydicomReader"),
    "MONAI ITKReader": monai("ITKReader"),
}
"""MONAI's NibabelReader is what LoadImage takes for NIfTI; ITKReader needs the package itk, without which it is n/a."""


def applies(reader: str, kind: Kind) -> bool:
    """Whether the reader claims to read such files at all, with what is installed here."""
    families = {
        "SimpleITK": ("DICOM", "NIfTI", "NRRD", "MetaImage"),
        "nibabel": ("NIfTI",),
        "MONAI PydicomReader": ("DICOM",),
    }
    families["MONAI ITKReader"] = families["SimpleITK"] if find_spec("itk") else ()
    families["MONAI LoadImage"] = families["MONAI ITKReader"] or ("DICOM", "NIfTI")
    return kind.family in families[reader]
