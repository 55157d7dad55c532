"""DICOM labels lie where their own planes say, mean what their names say, and are refused where that is in doubt."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import highdicom
import imagecodecs
import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

from preprocessing import dicom
from preprocessing.datasets import open_dataset, take_fingerprint
from preprocessing.dicom.labels import inside, is_labels, names_in, read_labels
from preprocessing.volume import Geometry, Provenance, ScanError, Volume

SHAPE = (7, 6, 5)
LPS = np.array([[0.8, 0, 0, -10], [0, 1.2, 0, 20], [0, 0, 2.5, -30], [0, 0, 0, 1.0]])
GRID = Geometry(shape=SHAPE, affine=np.diag([-1, -1, 1, 1]) @ LPS)
IMPLICIT, EXPLICIT, RLE = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.5"
SEG, LABELMAP = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"
RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    """A series with a frame of reference, read."""
    return read(series_in(tmp_path_factory.mktemp("series") / "image"))


def series_in(folder: Path, seed: int = 0) -> Path:
    grey = np.random.default_rng(seed).integers(0, 900, (1, *SHAPE)).astype(np.int16)
    volume = Volume(voxels=grey, geometry=GRID, channels=("0",))
    dicom.write_series(volume, folder, description="phantom", modality="CT", study="one")
    return folder


def read(folder: Path) -> Volume:
    (series,), _ = dicom.series_in(sorted(folder.iterdir()))
    return dicom.read(series)


def painted() -> np.ndarray:
    found = np.zeros(SHAPE, np.uint8)
    found[1:4, 1:5, 1:3] = 1
    found[4:6, 2:4, 2:4] = 2
    return found


def item(**values: object) -> Dataset:
    made = Dataset()
    for name, value in values.items():
        setattr(made, name, value)
    return made


def saved(data: Dataset, path: Path, syntax: str = EXPLICIT) -> Path:
    data.SOPInstanceUID = "1.2.3"
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, data, enforce_file_format=True)
    return path


Frames = list[tuple[int, int, np.ndarray]]
"""Segment, slice, and the pixels [row, column]."""


def frames_of(found: np.ndarray) -> Frames:
    planes = [(value, k, (found[:, :, k] == value).T) for value in np.unique(found) if value for k in range(SHAPE[2])]
    return [(int(value), k, plane) for value, k, plane in planes if plane.any()]


def segmentation(
    frames: Frames,
    names: tuple[str, ...] = ("liver", "lesion"),
    kind: str = "BINARY",
    bits: int = 1,
    lps: np.ndarray = LPS,
) -> Dataset:
    """The least that a SEG is, written by hand."""
    planes = np.array([plane for *_, plane in frames])
    data = item(
        SOPClassUID=LABELMAP if kind == "LABELMAP" else SEG, Modality="SEG", SegmentationType=kind,
        Rows=planes.shape[1], Columns=planes.shape[2], NumberOfFrames=len(frames), SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2", BitsAllocated=bits, BitsStored=bits, HighBit=bits - 1, PixelRepresentation=0,
    )  # fmt: skip
    data.SegmentSequence = [item(SegmentNumber=n, SegmentLabel=name) for n, name in enumerate(names, start=1)]
    size = np.linalg.norm(lps[:3, :3], axis=0)
    cosines = (lps[:3, :2] / size[:2]).T.ravel().tolist()
    data.SharedFunctionalGroupsSequence = [
        item(
            PlaneOrientationSequence=[item(ImageOrientationPatient=[f"{x:.10g}" for x in cosines])],
            PixelMeasuresSequence=[item(PixelSpacing=[f"{size[1]:.10g}", f"{size[0]:.10g}"])],
        )
    ]
    groups = []
    for segment, k, _ in frames:
        position = (lps @ [0, 0, k, 1])[:3]
        groups.append(item(PlanePositionSequence=[item(ImagePositionPatient=[f"{x:.10g}" for x in position])]))
        if kind != "LABELMAP":
            groups[-1].SegmentIdentificationSequence = [item(ReferencedSegmentNumber=segment)]
    data.PerFrameFunctionalGroupsSequence = groups
    if bits == 1:
        content = np.packbits(planes.astype(bool).ravel(), bitorder="little").tobytes()
    else:
        content = planes.astype("<u2" if bits == 16 else np.uint8).tobytes()
    data.PixelData = content + b"\0" * (len(content) % 2)
    data["PixelData"].VR = "OB" if bits < 16 else "OW"
    return data


def circle(i: float, j: float, k: float, radius: float, points: int = 40) -> np.ndarray:
    """LPS millimetres."""
    angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
    ijk = np.stack([i + radius * np.cos(angles), j + radius * np.sin(angles), np.full(points, k)], axis=1)
    return ijk @ LPS[:3, :3].T + LPS[:3, 3]


def structures(regions: dict[str, list[np.ndarray]], kind: str = "CLOSED_PLANAR") -> Dataset:
    """The least that an RTSTRUCT is, written by hand."""
    data = item(SOPClassUID=RTSTRUCT, Modality="RTSTRUCT")
    data.StructureSetROISequence = [item(ROINumber=n, ROIName=name) for n, name in enumerate(regions, start=1)]
    data.ROIContourSequence = []
    for number, contours in enumerate(regions.values(), start=1):
        drawn = [
            item(
                ContourGeometricType=kind,
                NumberOfContourPoints=len(points),
                ContourData=[f"{x:.4f}" for x in points.ravel()],
            )
            for points in contours
        ]
        data.ROIContourSequence.append(item(ReferencedROINumber=number, ContourSequence=drawn))
    return data


# segmentations


@pytest.mark.parametrize(("kind", "bits"), [("BINARY", 1), ("BINARY", 8), ("LABELMAP", 8), ("LABELMAP", 16)])
def test_a_segmentation_lies_where_its_frames_say(kind: str, bits: int, image: Volume, tmp_path: Path) -> None:
    found = painted()
    frames = frames_of(found) if kind == "BINARY" else [(0, k, found[:, :, k].T) for k in (3, 1, 2)]
    path = saved(segmentation(frames, kind=kind, bits=bits), tmp_path / "a.dcm")
    labels = read_labels(path, image, {"Lesion": 7, "LIVER": 300})
    np.testing.assert_array_equal(labels.voxels[0], np.array([0, 300, 7])[found])
    assert labels.geometry is image.geometry and labels.channels == ("labels",) and labels.voxels.dtype == np.uint16
    assert labels.provenance.files == (str(path),) and len(labels.provenance.sha256) == 64


def test_without_names_segments_keep_their_numbers(image: Volume, tmp_path: Path) -> None:
    path = saved(segmentation(frames_of(painted())), tmp_path / "a.dcm")
    np.testing.assert_array_equal(read_labels(path, image, {}).voxels[0], painted())
    assert names_in(path) == {"liver": 1, "lesion": 2} and is_labels(path) and not is_labels(tmp_path)


def test_frames_of_any_orientation_and_part_of_the_grid_find_their_voxels(image: Volume, tmp_path: Path) -> None:
    """Sagittal frames, rows falling, over a part of the grid."""
    found = painted()
    part = found[:, 1:5, 1:4][:, ::-1, ::-1]  # i is the slice, j falling the column, k falling the row
    lps = np.column_stack([-LPS[:, 1], -LPS[:, 2], LPS[:, 0], LPS @ [0, 4, 3, 1]])
    frames = [(value, i, (part[i] == value).T) for value in (1, 2) for i in range(SHAPE[0]) if (part[i] == value).any()]
    path = saved(segmentation(frames, lps=lps), tmp_path / "a.dcm")
    np.testing.assert_array_equal(read_labels(path, image, {}).voxels[0], found)


@pytest.mark.parametrize("syntax", [IMPLICIT, RLE, "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.90"])
def test_every_packing_gives_the_same_labels(syntax: str, image: Volume, tmp_path: Path) -> None:
    packers: dict[str, Callable[[np.ndarray], bytes]] = {
        RLE: lambda plane: b"\1\0\0\0\x40\0\0\0" + b"\0" * 56 + imagecodecs.packbits_encode(plane.tobytes()),
        "1.2.840.10008.1.2.4.80": imagecodecs.jpegls_encode,
        "1.2.840.10008.1.2.4.90": lambda plane: imagecodecs.jpeg2k_encode(plane, level=0, codecformat="j2k"),
    }
    frames = frames_of(painted())
    data = segmentation(frames, bits=8)
    if syntax in packers:
        data.PixelData = encapsulate([packers[syntax](np.ascontiguousarray(p, dtype=np.uint8)) for *_, p in frames])
        data["PixelData"].is_undefined_length = True
    path = saved(data, tmp_path / "a.dcm", syntax)
    np.testing.assert_array_equal(read_labels(path, image, {}).voxels[0], painted())


def test_fractions_are_read_only_where_they_are_all_or_nothing(image: Volume, tmp_path: Path) -> None:
    whole = [(value, k, plane * 200) for value, k, plane in frames_of(painted())]
    data = segmentation(whole, kind="FRACTIONAL", bits=8)
    data.MaximumFractionalValue = 200
    np.testing.assert_array_equal(read_labels(saved(data, tmp_path / "a.dcm"), image, {}).voxels[0], painted())
    data = segmentation([(1, 1, np.full((6, 7), 77))], kind="FRACTIONAL", bits=8)
    data.MaximumFractionalValue = 200
    with pytest.raises(ScanError, match="fractions") as refusal:
        read_labels(saved(data, tmp_path / "b.dcm"), image, {})
    assert refusal.value.reason == "values"


def test_padding_and_background_of_a_label_map_are_no_labels(image: Volume, tmp_path: Path) -> None:
    found = painted()
    found[found == 0] = 5
    data = segmentation([(0, k, found[:, :, k].T) for k in range(5)], kind="LABELMAP", bits=8)
    data.PixelPaddingValue = 5
    np.testing.assert_array_equal(read_labels(saved(data, tmp_path / "a.dcm"), image, {}).voxels[0], painted())
    del data.PixelPaddingValue
    with pytest.raises(ScanError, match="not described"):
        read_labels(saved(data, tmp_path / "b.dcm"), image, {})
    background = item(CodeValue="125040", CodingSchemeDesignator="DCM", CodeMeaning="Background")
    data.SegmentSequence.append(item(SegmentNumber=5, SegmentLabel="x", SegmentedPropertyTypeCodeSequence=[background]))
    data.PixelPaddingValue = 5
    assert names_in(saved(data, tmp_path / "c.dcm")) == {"liver": 1, "lesion": 2}


def test_segments_that_overlap_are_refused_by_name_unless_they_are_one_label(image: Volume, tmp_path: Path) -> None:
    one = np.zeros((6, 7), bool)
    one[2:4, 2:5] = True
    path = saved(segmentation([(1, 2, one), (2, 2, one)]), tmp_path / "a.dcm")
    with pytest.raises(ScanError, match=r"'liver' and 'lesion' overlap in 6 voxels") as refusal:
        read_labels(path, image, {})
    assert refusal.value.reason == "contradiction"
    assert read_labels(path, image, {"liver": 4, "lesion": 4}).voxels.sum() == 24
    assert read_labels(path, image, {"liver": 4}).voxels.sum() == 24
    twice = saved(segmentation([(1, 2, one), (2, 2, one)], names=("nodule", "nodule")), tmp_path / "b.dcm")
    assert read_labels(twice, image, {"nodule": 1}).voxels.sum() == 6


SHIFTED, SCALED, TURNED = LPS.copy(), LPS.copy(), LPS.copy()
SHIFTED[2, 3] += 1.25
SCALED[0, 0] *= 1.5
TURNED[:3, :3] = LPS[:3, :3] @ [[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]]


@pytest.mark.parametrize("lps", [SHIFTED, SCALED, TURNED, LPS + np.array([[0, 0, 0, 8]] * 3 + [[0] * 4])])
def test_another_grid_is_refused_with_both(lps: np.ndarray, image: Volume, tmp_path: Path) -> None:
    path = saved(segmentation(frames_of(painted()), lps=lps), tmp_path / "a.dcm")
    with pytest.raises(ScanError, match=r"(?s)frame of 7 x 6 pixels.*image's 7×6×5 voxels.*Save them") as refusal:
        read_labels(path, image, {})
    assert refusal.value.reason == "grids_differ"


def test_rounded_positions_are_no_other_grid(image: Volume, tmp_path: Path) -> None:
    lps = LPS + np.array([[0, 0, 0, 0.01]] * 3 + [[0] * 4])
    path = saved(segmentation(frames_of(painted()), lps=lps), tmp_path / "a.dcm")
    np.testing.assert_array_equal(read_labels(path, image, {}).voxels[0], painted())


def test_labels_of_another_frame_of_reference_or_series_are_refused(image: Volume, tmp_path: Path) -> None:
    source = pydicom.dcmread(image.provenance.files[0])
    data = segmentation(frames_of(painted()))
    data.FrameOfReferenceUID = source.FrameOfReferenceUID
    data.ReferencedSeriesSequence = [item(SeriesInstanceUID=source.SeriesInstanceUID)]
    assert read_labels(saved(data, tmp_path / "a.dcm"), image, {}).provenance.notes == ()
    data.ReferencedSeriesSequence = [item(SeriesInstanceUID="1.2.9")]
    with pytest.raises(ScanError, match="belongs to another series") as refusal:
        read_labels(saved(data, tmp_path / "b.dcm"), image, {})
    assert refusal.value.reason == "contradiction"
    data.FrameOfReferenceUID = "1.2.8"
    with pytest.raises(ScanError, match="belongs to another frame of reference"):
        read_labels(saved(data, tmp_path / "c.dcm"), image, {})
    bare = replace(image, provenance=Provenance())
    notes = read_labels(tmp_path / "b.dcm", bare, {}).provenance.notes
    assert len(notes) == 2 and "not compared" in notes[0]


def test_names_are_matched_and_a_slip_of_the_pen_is_no_background(image: Volume, tmp_path: Path) -> None:
    names = ("Left_Kidney", "couch")
    path = saved(segmentation(frames_of(painted()), names=names), tmp_path / "a.dcm")
    labels = read_labels(path, image, {"left kidney": 5})
    assert set(np.unique(labels.voxels)) == {0, 5} and any("couch" in note for note in labels.provenance.notes)
    for wanted in ({"left kidny": 1, "couch": 2}, {"spleen": 1}):
        with pytest.raises(ScanError, match=r"'Left_Kidney', 'couch'; the dataset declares .*Names must agree"):
            read_labels(path, image, wanted)


def test_damage_is_refused(image: Volume, tmp_path: Path) -> None:
    path = saved(segmentation(frames_of(painted())), tmp_path / "a.dcm")
    content = path.read_bytes()
    for cut in (len(content) - 6, len(content) * 2 // 3, 400, 140, 3):
        (tmp_path / "cut.dcm").write_bytes(content[:cut])
        with pytest.raises(ScanError):
            read_labels(tmp_path / "cut.dcm", image, {})
    data = segmentation(frames_of(painted()))
    data.PerFrameFunctionalGroupsSequence.append(data.PerFrameFunctionalGroupsSequence[0])
    with pytest.raises(ScanError, match="frames are described"):
        read_labels(saved(data, tmp_path / "more.dcm"), image, {})
    del data.SharedFunctionalGroupsSequence
    with pytest.raises(ScanError, match="say where it lies") as refusal:
        read_labels(saved(data, tmp_path / "nowhere.dcm"), image, {})
    assert refusal.value.reason == "no_geometry"


@pytest.mark.parametrize("seed", range(3))
def test_flipped_bytes_are_labels_or_refused_and_nothing_else(seed: int, image: Volume, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    whole = [
        saved(segmentation(frames_of(painted())), tmp_path / "seg.dcm"),
        saved(structures({"x": [circle(3, 2, 2, 2)]}), tmp_path / "rs.dcm"),
    ]
    for number in range(120):
        content = bytearray(whole[number % 2].read_bytes())
        for place in rng.integers(len(content), size=rng.integers(1, 9)):
            content[place] = rng.integers(256)
        (tmp_path / "bad.dcm").write_bytes(content)
        names_in(tmp_path / "bad.dcm")
        try:
            read_labels(tmp_path / "bad.dcm", image, {})
        except ScanError as refusal:
            assert refusal.reason != "values" or "fractions" in str(refusal)


def test_a_slice_is_no_label(image: Volume) -> None:
    with pytest.raises(ScanError, match=r"cannot be read as labels.*modality CT"):
        read_labels(Path(image.provenance.files[0]), image, {})


# contours


def test_a_contour_holds_the_voxels_whose_centres_it_encloses(image: Volume, tmp_path: Path) -> None:
    data = structures({"GTV": [circle(3, 2.5, 2, 1.9)], "node": [circle(1, 1, 0, 0.6), circle(5, 4, 4, 0.6)]})
    labels = read_labels(saved(data, tmp_path / "a.dcm"), image, {"gtv": 1, "node": 2})
    i, j = np.mgrid[:7, :6]
    np.testing.assert_array_equal(labels.voxels[0, :, :, 2], (i - 3) ** 2 + (j - 2.5) ** 2 < 1.9**2)
    assert labels.voxels[0, 1, 1, 0] == 2 == labels.voxels[0, 5, 4, 4] and (labels.voxels == 2).sum() == 2


def test_a_contour_within_another_is_a_hole_and_the_same_twice_is_one(image: Volume, tmp_path: Path) -> None:
    ring = [circle(3, 2.5, 2, 2.6), circle(3, 2.5, 2, 0.9)]
    labels = read_labels(saved(structures({"wall": ring}), tmp_path / "a.dcm"), image, {})
    again = read_labels(saved(structures({"wall": [*ring, ring[0]]}), tmp_path / "b.dcm"), image, {})
    i, j = np.mgrid[:7, :6]
    away = np.hypot(i - 3, j - 2.5)
    np.testing.assert_array_equal(labels.voxels[0, :, :, 2], (away < 2.6) & (away >= 0.9))
    np.testing.assert_array_equal(again.voxels, labels.voxels)


def test_a_region_in_another_frame_of_reference_is_refused(image: Volume, tmp_path: Path) -> None:
    own = pydicom.dcmread(image.provenance.files[0]).FrameOfReferenceUID
    data = structures({"x": [circle(3, 2, 2, 2)], "y": [circle(3, 2, 2, 1)]})
    for item_ in data.StructureSetROISequence:
        item_.ReferencedFrameOfReferenceUID = own
    data.ReferencedFrameOfReferenceSequence = [item(FrameOfReferenceUID=own), item(FrameOfReferenceUID="1.2.8")]
    assert read_labels(saved(data, tmp_path / "a.dcm"), image, {"x": 1}).voxels.any()
    data.StructureSetROISequence[1].ReferencedFrameOfReferenceUID = "1.2.8"
    with pytest.raises(ScanError, match="another frame of reference"):
        read_labels(saved(data, tmp_path / "b.dcm"), image, {"x": 1})


def test_contours_between_slices_are_refused_and_rounding_is_not(image: Volume, tmp_path: Path) -> None:
    path = saved(structures({"x": [circle(3, 2, 2.04, 2)]}), tmp_path / "a.dcm")
    assert read_labels(path, image, {}).voxels[0, :, :, 2].any()
    for k in (2.5, 5, -1):
        with pytest.raises(ScanError, match=r"contour of 'x' lies between the slices") as refusal:
            read_labels(saved(structures({"x": [circle(3, 2, k, 2)]}), tmp_path / "b.dcm"), image, {})
        assert refusal.value.reason == "grids_differ"


def test_points_and_open_lines_enclose_nothing_and_are_told(image: Volume, tmp_path: Path) -> None:
    labels = read_labels(saved(structures({"x": [circle(3, 2, 2, 2)]}, "POINT"), tmp_path / "a.dcm"), image, {})
    assert not labels.voxels.any() and "POINT" in labels.provenance.notes[-1]


def test_a_region_nobody_wants_may_lie_anywhere(image: Volume, tmp_path: Path) -> None:
    data = structures({"GTV": [circle(3, 2.5, 2, 1.9)], "iso": [circle(3, 2, 2.5, 9)]})
    labels = read_labels(saved(data, tmp_path / "a.dcm"), image, {"GTV": 1})
    assert labels.voxels.any() and any("iso" in note for note in labels.provenance.notes)


def test_centres_on_a_line_belong_to_one_side_only() -> None:
    """Two areas that share an edge through pixel centres share no pixel and miss none."""
    left, right = np.array([(0, 0), (3, 0), (3, 4), (0, 4.0)]), np.array([(3, 0), (6, 0), (6, 4), (3, 4.0)])
    one, other = inside([left], (5, 7)), inside([right], (5, 7))
    assert not (one & other).any() and one.sum() == other.sum() == 12
    np.testing.assert_array_equal(inside([left, right], (5, 7)), one | other)


# real files


@pytest.mark.parametrize("modality", ["CT", "MR_T1"])
def test_tumours_of_ibsi_are_voxel_for_voxel_those_of_its_nifti_masks(modality: str, shared: Path) -> None:
    zoo = shared / "data" / "zoo"
    image = read(zoo / f"dicom_ibsi_STS019_{modality}" / "image")
    labels = read_labels(zoo / f"dicom_ibsi_STS019_{modality}" / "rtstruct" / "RS.dcm", image, {})
    mask = nibabel.load(zoo / "dicom_ibsi_STS019_nifti_reference" / f"{modality}_mask.nii.gz")
    ijk = np.indices(image.geometry.shape).reshape(3, -1)
    voxels = nibabel.affines.apply_affine(np.linalg.inv(mask.affine) @ image.geometry.affine, ijk.T)
    theirs = np.asarray(mask.dataobj)[tuple(np.rint(voxels.T).astype(int))].reshape(image.geometry.shape)
    assert theirs.any() and (labels.voxels[0] != theirs).sum() == 0


@pytest.mark.parametrize("name", ["24x38x3/seg/label.seg", "sparse-labelmap-noppv.dcm", "sparse-labelmap-ppv5.dcm"])
def test_segmentations_of_dcmqi_are_what_highdicom_reads(name: str, shared: Path) -> None:
    folder = shared / "data" / "zoo" / "dicom_seg_dcmqi"
    image = read(folder / "24x38x3" / "image")
    labels = read_labels(folder / name, image, {"liver": 1})
    data = highdicom.seg.segread(folder / name)
    theirs = np.zeros(image.geometry.shape, bool)
    for plane, group in zip(data.pixel_array, data.PerFrameFunctionalGroupsSequence, strict=True):
        start = np.array(group.PlanePositionSequence[0].ImagePositionPatient, dtype=float) * (-1, -1, 1)
        theirs[:, :, round(image.geometry.to_voxel(start)[2])] |= plane.T == 1
    np.testing.assert_array_equal(labels.voxels[0] == 1, theirs)


def test_overlapping_segments_of_dcmqi_are_refused_by_name(shared: Path) -> None:
    folder = shared / "data" / "zoo" / "dicom_seg_dcmqi"
    image = read(folder / "ct-3slice")
    with pytest.raises(ScanError, match=r"'GREEN' and 'ORANGE' overlap"):
        read_labels(folder / "partial_overlaps.dcm", image, {})
    assert read_labels(folder / "partial_overlaps.dcm", image, {"light blue": 1}).voxels.any()


@pytest.mark.parametrize("packing", ["", "_deflate", "_j2k", "_rle"])
def test_one_liver_in_four_packings_is_one_liver(packing: str, shared: Path) -> None:
    folder = shared / "data" / "zoo" / "dicom_pydicom_data_files"
    data = highdicom.seg.segread(folder / "liver.dcm")
    volume = data.get_volume(combine_segments=True)
    affine = np.diag([-1, -1, 1, 1]) @ np.asarray(volume.affine)[:, [2, 1, 0, 3]]
    grid = Geometry(shape=volume.array.shape[::-1], affine=affine)
    image = Volume(voxels=np.zeros((1, *grid.shape), np.int16), geometry=grid, channels=("ct",))
    labels = read_labels(folder / f"liver{packing}.dcm", image, {})
    np.testing.assert_array_equal(labels.voxels[0], volume.array.T)


# data sets


def made_dataset(root: Path, wanted: Callable[[int], Dataset], folder: bool = False) -> Path:
    for number in range(2):
        series_in(root / "imagesTr" / f"case_{number}", seed=number)
        name = f"case_{number}/labels.dcm" if folder else f"case_{number}.dcm"
        saved(wanted(number), root / "labelsTr" / name)
    return root


@pytest.mark.parametrize("folder", [False, True])
def test_series_and_their_segmentations_are_a_dataset(folder: bool, tmp_path: Path) -> None:
    root = made_dataset(tmp_path, lambda _: segmentation(frames_of(painted())), folder)
    dataset = open_dataset(root)
    assert [(label.name, label.value, label.type.meaning) for label in dataset.labels] == [
        ("liver", 1, "Liver"),
        ("lesion", 2, "Lesion"),
    ]
    case = dataset.read(dataset.cases[1])
    assert case.id == "case_1" and case.labels is not None
    np.testing.assert_array_equal(case.labels.voxels[0], painted())
    facts = take_fingerprint(dataset).cases["case_0"]
    assert facts.voxels == {"liver": int((painted() == 1).sum()), "lesion": int((painted() == 2).sum())}


def test_names_whose_numbers_differ_from_case_to_case_are_numbered_anew(tmp_path: Path) -> None:
    def wanted(number: int) -> Dataset:
        names = ("liver", "lesion") if number == 0 else ("Lesion", "liver")
        return segmentation(frames_of(painted()), names=names)

    dataset = open_dataset(made_dataset(tmp_path, wanted))
    values = {label.name.lower(): label.value for label in dataset.labels}
    assert sorted(values) == ["lesion", "liver"] and sorted(values.values()) == [1, 2]
    first, second = (dataset.read(files).labels for files in dataset.cases)
    assert first is not None and second is not None
    np.testing.assert_array_equal(first.voxels == values["liver"], second.voxels == values["lesion"])


def test_a_table_names_series_and_contours_too(tmp_path: Path) -> None:
    for number in range(2):
        series_in(tmp_path / f"scan {number}", seed=number)
        saved(structures({"GTV": [circle(3, 2.5, 2, 1.9)]}), tmp_path / f"rs{number}.dcm")
    (tmp_path / "cases.csv").write_text("id,CT,labels\na,scan 0,rs0.dcm\nb,scan 1,rs1.dcm\n")
    dataset = open_dataset(tmp_path / "cases.csv")
    assert dataset.channels == ("CT",) and [label.name for label in dataset.labels] == ["GTV"]
    assert take_fingerprint(dataset).cases["b"].voxels["GTV"] > 0
