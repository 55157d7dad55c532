"""What is written of a result lies right, measures right, and reads right, whatever way the scan was stored."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from PIL import Image
from scipy import ndimage
from scipy.spatial.transform import Rotation

from pipeline import outputs
from pipeline.errors import UsageError
from pipeline.outputs import labels, measurements, overlay, page
from pipeline.outputs._drawing import ALARM, WIDTH, png
from pipeline.outputs._planes import AXIAL, PLANES, Finding, View, find, findings, panel, turn
from pipeline.report import Result
from preprocessing import files
from preprocessing.phantoms import body, scan
from preprocessing.plan import Label
from preprocessing.volume import Geometry, ScanError, Volume

TABLE = (
    Label(value=1, name="liver", colour=(0, 114, 178)),
    Label(value=2, name="kidney", colour=(230, 159, 0)),
    Label(value=3, name="lesion", colour=(0, 158, 115)),
)
ORIENTATIONS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]


def result_of(grey: np.ndarray, found: np.ndarray, affine: np.ndarray, table: tuple[Label, ...] = TABLE) -> Result:
    grid = Geometry(shape=grey.shape, affine=affine)
    return Result(
        case_id="case",
        scan=Volume(voxels=grey[None], geometry=grid, channels=("t1",)),
        labels=Volume(voxels=found[None], geometry=grid, channels=("labels",)),
        label_table=table,
        package_id="ab" * 32,
        package_name="demo",
    )


def grid(seed: int) -> Geometry:
    """Oblique, anisotropic, its axes in an order of their own."""
    turn = Rotation.from_euler("xyz", (8, -12, 15 + seed), degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = (turn * (2.0, 2.2, 3.5))[:, [2, 0, 1]] * (1, -1, -1)
    shape = (22, 48, 38)
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    return Geometry(shape=shape, affine=affine)


@cache
def phantom_result(seed: int = 9) -> Result:
    image, found = scan(body(seed), grid(seed), seed=seed)
    return Result(
        case_id=f"phantom_{seed:03d}",
        scan=image,
        labels=found,
        label_table=TABLE,
        package_id="ab" * 32,
        package_name="demo",
        confidence={"liver": 0.97, "kidney": 0.9},
        seconds={"read": 0.5},
    )


def stored_as(result: Result, order: tuple[int, ...], signs: tuple[int, ...]) -> Result:
    """The same patient, its voxels stored in another axis order and direction (by nibabel's own arithmetic)."""
    ornt = np.stack([np.argsort(order), np.array(signs)], axis=1).astype(float)
    turn = nibabel.orientations.inv_ornt_aff(ornt, result.scan.geometry.shape)

    def turned(volume: Volume) -> Volume:
        voxels = np.stack([nibabel.orientations.apply_orientation(channel, ornt) for channel in volume.voxels])
        grid = Geometry(shape=voxels.shape[1:], affine=volume.geometry.affine @ turn)
        return Volume(voxels=voxels, geometry=grid, channels=volume.channels, provenance=volume.provenance)

    return replace(result, scan=turned(result.scan), labels=turned(result.labels))


def test_outputs_are_found_by_their_file_names_and_not_imported() -> None:
    code = (
        "import sys; from pipeline.outputs import available; print(*available());"
        "assert not {'PIL', 'scipy'} & sys.modules.keys()"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"labels", "measurements", "overlay", "page"} <= set(said) and "_html" not in said


def test_an_unknown_output_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(outputs.UnknownOutput, match="overlay"):
        outputs.load("overly")
    assert outputs.load("labels") is labels


def test_labels_lie_on_exactly_the_scans_grid(tmp_path: Path) -> None:
    result = phantom_result()
    (path,) = labels.write(result, tmp_path, labels.Config())
    read = nibabel.load(path)
    np.testing.assert_allclose(read.affine, result.scan.geometry.affine, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(read.dataobj), result.labels.voxels[0])
    assert read.get_data_dtype() == np.uint8 and int(read.header["intent_code"]) == 1002


def test_labels_above_255_take_sixteen_bits(tmp_path: Path) -> None:
    found = np.zeros((3, 4, 5), np.uint16)
    found[1, 2, 3] = 300
    table = (Label(value=300, name="rare", colour=(1, 2, 3)),)
    (path,) = labels.write(result_of(found.astype(np.float32), found, np.eye(4), table), tmp_path, labels.Config())
    read = nibabel.load(path)
    assert read.get_data_dtype() == np.uint16 and np.asarray(read.dataobj)[1, 2, 3] == 300


def test_labels_as_nrrd_carry_the_names_colours_and_codes_that_slicer_reads(tmp_path: Path) -> None:
    result = phantom_result()
    (path,) = labels.write(result, tmp_path, labels.Config(format="nrrd"))
    assert path.name == "labels.seg.nrrd"
    image = SimpleITK.ReadImage(path)
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image).T, result.labels.voxels[0])
    np.testing.assert_allclose(files.read(path).geometry.affine, result.scan.geometry.affine, atol=1e-6)
    said = {key: image.GetMetaData(key) for key in image.GetMetaDataKeys() if key.startswith("Segment1")}
    assert (said["Segment1_Name"], said["Segment1_LabelValue"]) == ("kidney", "2")
    np.testing.assert_allclose([float(x) * 255 for x in said["Segment1_Color"].split()], TABLE[1].colour, atol=1e-3)
    assert "~SCT^91723000^Anatomical Structure~SCT^64033007^Kidney~^^~" in said["Segment1_Tags"]


def test_a_region_in_an_nrrd_is_called_by_what_is_left_of_it(tmp_path: Path) -> None:
    (path,) = labels.write(nested(), tmp_path, labels.Config(format="nrrd"))
    header = path.read_bytes().split(b"\n\n")[0].decode()
    assert [header.split(f"Segment{n}_Name:=")[1].split("\n")[0] for n in range(3)] == [
        "liver without kidney and lesion", "kidney without lesion", "lesion",
    ]  # fmt: skip


def test_labels_of_a_sheared_scan_have_no_place_in_nrrd(tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[0, 2] = 0.3
    found = np.ones((3, 4, 5), np.uint8)
    result = result_of(found.astype(np.float32), found, affine)
    with pytest.raises(ScanError, match=r"sheared.*\.nii\.gz"):
        labels.write(result, tmp_path, labels.Config(format="nrrd"))
    (path,) = labels.write(result, tmp_path, labels.Config())
    np.testing.assert_allclose(nibabel.load(path).affine, affine)


def test_a_name_cannot_break_out_of_an_nrrd_header(tmp_path: Path) -> None:
    result = phantom_result()
    table = (replace(TABLE[0], name="a\n\nb:=c\nSegment9_Name:=x"), *TABLE[1:])
    (path,) = labels.write(replace(result, label_table=table), tmp_path, labels.Config(format="nrrd"))
    image = SimpleITK.ReadImage(path)
    assert image.GetMetaData("Segment0_Name").startswith("a b:=c") and not image.HasMetaDataKey("Segment9_Name")
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image).T, result.labels.voxels[0])


def seen(result: Result, window: tuple[float, float] | None = None) -> tuple[View, Finding]:
    return turn(result, window=window), find(result, findings(result))


@pytest.mark.parametrize("oblique", [False, True])
def test_a_scan_stored_in_any_of_48_ways_is_one_picture(oblique: bool) -> None:
    result = phantom_result(5)
    if not oblique:
        straight = Geometry(shape=result.scan.geometry.shape, affine=np.diag([2.0, 2.5, 3.5, 1.0]))
        result = replace(
            result,
            scan=result.scan.with_voxels(result.scan.voxels, straight),
            labels=result.labels.with_voxels(result.labels.voxels, straight),
        )
    pictures = set()
    for order, signs in ORIENTATIONS:
        view, finding = seen(stored_as(result, order, signs))
        for plane in PLANES:
            image, _ = panel(view, plane, finding.centre[plane.through], box=(90, 90), fill=0.2)
            pictures.add((plane.name, finding.name, finding.box, finding.centre, image.size, image.tobytes()))
    assert len(pictures) == 3


def test_the_whole_sheet_does_not_depend_on_how_the_scan_is_stored() -> None:
    result = phantom_result(5)
    sheets = {png(overlay.picture(stored_as(result, *ORIENTATIONS[n]))) for n in (0, 21, 38)}
    sheets.add(png(overlay.picture(result)))
    assert len(sheets) == 1


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_a_mark_appears_on_its_own_side_of_the_patient(order: tuple[int, ...], signs: tuple[int, ...]) -> None:
    """Patient right on the left, anterior on top or left, superior on top: told from millimetres alone."""
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    affine[list(order), range(3)] = np.array(signs) * (1.0, 1.5, 2.0)
    shape = (9, 11, 13)
    centre = affine[:3, :3] @ (np.array(shape) - 1) / 2
    mark = np.array([(8, 0, 0), (0, 10, 0), (0, 0, 12)]).max(axis=0) * 0.75
    voxel = tuple(int(v) for v in mark.round())
    offset = affine[:3, :3] @ voxel - centre  # RAS+ millimetres from the middle
    grey = np.zeros(shape, np.float32)
    grey[voxel] = 1
    found = grey.astype(np.uint8)
    view, finding = seen(result_of(grey, found, affine, TABLE[:1]), window=(0.5, 1))
    for plane in PLANES:
        image, scale = panel(view, plane, finding.centre[plane.through], box=(100, 100), fill=0.0)
        brightness = np.asarray(image, dtype=float).sum(axis=2)
        row, column = (np.average(axis, weights=brightness) for axis in np.mgrid[: image.height, : image.width])
        right, down = (column + 0.5) / scale - image.width / scale / 2, (row + 0.5) / scale - image.height / scale / 2
        assert right == pytest.approx(-offset[plane.across], abs=0.4)
        assert down == pytest.approx(-offset[plane.down], abs=0.4)


def test_planes_agree_with_nibabels_canonical_orientation() -> None:
    result = phantom_result(7)
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(result.scan.voxels[0], result.scan.geometry.affine))
    view = turn(result)
    np.testing.assert_array_equal(view.grey, np.asarray(image.dataobj))
    np.testing.assert_allclose(view.geometry.affine, image.affine, atol=1e-9)


def test_millimetres_are_true_along_both_edges() -> None:
    grey = np.zeros((40, 30, 7), np.float32)
    view = turn(result_of(grey, grey.astype(np.uint8), np.diag([0.7, 0.9, 5.0, 1])))
    for plane in PLANES:
        image, scale = panel(view, plane, 3, box=(400, 400), fill=0)
        extent = np.array(grey.shape) * (0.7, 0.9, 5.0)
        assert image.width == pytest.approx(extent[plane.across] * scale, abs=0.51)
        assert image.height == pytest.approx(extent[plane.down] * scale, abs=0.51)
        assert max(image.size) == 400


def test_grey_outside_every_label_is_the_windowed_scan_and_colour_stays_inside() -> None:
    rng = np.random.default_rng(0)
    grey = rng.normal(50, 100, (60, 50, 3)).astype(np.float32)
    found = np.zeros(grey.shape, np.uint8)
    found[10:30, 12:40, 1] = 1
    found[40:44, 20:24, 1] = 3
    view = turn(result_of(grey, found, np.eye(4)), window=(40, 400))
    image, scale = panel(view, AXIAL, 1, box=(60, 50), fill=0.2)
    assert scale == 1
    drawn = np.asarray(image)
    windowed = np.rint(np.clip((grey[::-1, ::-1, 1].T.astype(float) + 160) / 400, 0, 1) * 255)
    outside = found[::-1, ::-1, 1].T == 0
    np.testing.assert_array_equal(drawn[outside], np.repeat(windowed[..., None], 3, axis=2)[outside])
    edge = outside.size - outside.sum()
    assert 0 < (drawn[~outside].max(axis=1) != drawn[~outside].min(axis=1)).sum() <= edge
    corner = np.argwhere(~outside)[0]
    np.testing.assert_array_equal(
        drawn[tuple(corner)], TABLE[2].colour if found[59 - corner[1], 49 - corner[0], 1] == 3 else TABLE[0].colour
    )


def test_a_contour_hugs_its_label_within_a_voxel_when_enlarged() -> None:
    i, j = np.mgrid[:30, :30]
    found = np.zeros((30, 30, 1), np.uint8)
    found[..., 0] = (i - 15) ** 2 + (j - 14) ** 2 < 81
    view = turn(result_of(np.zeros(found.shape, np.float32), found, np.eye(4)))
    image, scale = panel(view, AXIAL, 0, box=(300, 300), fill=0)
    drawn = np.argwhere(np.asarray(image)[..., 2] > 100)
    true = 30 * scale - np.array([14.5, 15.5]) * scale  # the centre, rows and columns falling
    radii = np.linalg.norm(drawn + 0.5 - true, axis=1) / scale
    assert radii.min() > 7.5 and radii.max() < 9.8


def test_where_labels_touch_the_smaller_one_is_framed_once() -> None:
    found = np.zeros((40, 40, 1), np.uint8)
    found[5:35, 5:35] = 3
    found[15:25, 15:25] = 1
    view = turn(result_of(np.zeros(found.shape, np.float32), found, np.eye(4)))
    image, _ = panel(view, AXIAL, 0, box=(400, 400), fill=0)
    row = [tuple(pixel) for pixel in np.asarray(image)[200] if pixel.any()]
    assert row == 2 * [TABLE[2].colour] + 4 * [TABLE[0].colour] + 2 * [TABLE[2].colour]


def test_a_lesion_smaller_than_a_pixel_is_still_seen() -> None:
    found = np.zeros((400, 400, 1), np.uint8)
    found[201, 133] = 2
    view = turn(result_of(np.zeros(found.shape, np.float32), found, np.eye(4)))
    image, _ = panel(view, AXIAL, 0, box=(50, 50), fill=0)
    pixels = np.argwhere((np.asarray(image) == TABLE[1].colour).all(axis=2))
    assert 1 <= len(pixels) <= 4
    np.testing.assert_allclose((pixels + 0.5).mean(axis=0), ((400 - 133.5) / 8, (400 - 201.5) / 8), atol=1)


def test_planes_pass_through_the_largest_part_or_the_label_asked_for() -> None:
    found = np.zeros((20, 20, 20), np.uint8)
    found[1:3, 1:3, 1:3] = 1
    found[5, 5:7, 5] = 3
    found[12:18, 12:18, 12:16] = 2
    result = result_of(np.zeros(found.shape, np.float32), found, np.eye(4))
    largest, asked = (find(result, findings(result), name) for name in ("", "lesion"))
    assert largest.label == TABLE[1] and largest.box == ((12, 17), (12, 17), (12, 15))
    assert asked.label == TABLE[2] and asked.centre == (5, 5, 5)
    with pytest.raises(UsageError, match="liver, kidney, lesion"):
        find(result, findings(result), "spleen")


REGIONS = tuple(replace(each, parts={1: (1, 2, 3), 2: (2, 3), 3: (3,)}[each.value]) for each in TABLE)


def nested() -> Result:
    """A box in a box in a box, the outer ones larger than what is left of them, and a bit of the innermost aside."""
    found = np.zeros((20, 20, 20), np.uint8)
    found[2:18, 2:18, 2:18], found[3:17, 3:17, 3:17], found[4:16, 4:16, 4:15] = 1, 2, 3
    found[19, 19, 19] = 3
    return result_of(np.zeros(found.shape, np.float32), found, np.diag([1.0, 1.0, 2.0, 1.0]), REGIONS)


def test_of_regions_the_planes_pass_through_the_whole_of_the_largest() -> None:
    view = turn(nested())
    assert view.rank[[1, 2, 3]].tolist() == [1, 2, 3], "the innermost is framed, the outermost against the background"
    largest, asked = (find(nested(), findings(nested()), name) for name in ("", "kidney"))
    assert largest.label == REGIONS[0] and largest.box == ((2, 17),) * 3
    assert asked.label == REGIONS[1] and asked.box == ((3, 16),) * 3


def test_a_region_is_measured_with_the_regions_in_it(tmp_path: Path) -> None:
    result = nested()
    whole, middle, inner = measurements.measure(result)
    assert [each.voxels for each in (whole, middle, inner)] == [16**3 + 1, 14**3 + 1, 12 * 12 * 11 + 1]
    assert [each.volume_ml for each in (whole, middle, inner)] == pytest.approx(list(result.volumes_ml.values()))
    assert [each.components for each in (whole, middle, inner)] == [2, 2, 2]
    assert whole.largest_component_ml == pytest.approx(16**3 * 0.002)
    assert whole.bounding_box_mm == ((1.5, 1.5, 3.0), (19.5, 19.5, 39.0))
    (path,) = page.write(result, tmp_path, page.Config())
    assert "8.19 ml" in path.read_text() and "5.49 ml" in path.read_text()


def test_the_window_is_that_of_the_volume() -> None:
    result = phantom_result()
    view = turn(result)
    assert (view.window.low, view.window.high) == pytest.approx(tuple(np.percentile(result.scan.voxels[0], (1, 99))))
    second = turn(result, "t2")
    assert second.window.high == pytest.approx(float(np.percentile(result.scan.voxels[1], 99)))
    with pytest.raises(UsageError, match="t1, t2"):
        turn(result, "flair")


def test_the_same_case_gives_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for module in (overlay, measurements, page):
            written += module.write(phantom_result(), tmp_path / name, module.Config())
    for one, two in zip(written[:3], written[3:], strict=True):
        assert one.read_bytes() == two.read_bytes()
    with Image.open(written[0]) as sheet:
        assert sheet.size[0] == WIDTH


@pytest.mark.parametrize(
    ("shape", "fill"), [((1, 1, 1), 0.0), ((64, 48, 1), 7.0), ((3, 200, 150), np.nan), ((5, 5, 900), -1024.0)]
)
def test_nothing_found_in_an_odd_scan_still_makes_a_picture(shape: tuple[int, int, int], fill: float) -> None:
    grey = np.full(shape, fill, np.float32)
    result = result_of(grey, np.zeros(shape, np.uint8), np.diag([1.0, 1.0, 3.0, 1]))
    result = replace(result, case_id="ein sehr langer Name mit Größe und 中文 " * 8, warnings=("w" * 500,) * 4)
    sheet = overlay.picture(result)
    alarm = tuple(int(ALARM[n : n + 2], 16) for n in (1, 3, 5))
    assert (np.asarray(sheet) == alarm).all(axis=2).any()
    assert sheet.height < 1600


def test_the_picture_of_a_repaired_scan_says_that_it_was_repaired() -> None:
    sound = phantom_result()
    was = replace(sound.scan.provenance, repairs=("2 missing slices were interpolated.",))
    repaired = replace(sound, scan=replace(sound.scan, provenance=was))
    alarm = tuple(int(ALARM[n : n + 2], 16) for n in (1, 3, 5))
    lines = [(np.asarray(overlay.picture(each)) == alarm).all(axis=2).any() for each in (sound, repaired)]
    assert lines == [False, True]


@pytest.mark.slow
def test_a_hundred_labels_all_stand_in_the_legend() -> None:
    found = np.arange(105, dtype=np.uint8)[None, None].repeat(2, 0).repeat(2, 1)
    table = tuple(Label(value=v, name=f"rib_{v}", colour=(v, 255 - v, 128)) for v in range(1, 105))
    result = result_of(found.astype(np.float32), found, np.eye(4), table)
    sheet = np.asarray(overlay.picture(result, overlay.Config(parts=0)))
    swatches = [ndimage.label((sheet == label.colour).all(axis=2))[0] for label in table]
    assert all(np.bincount(each.ravel())[1:].max() > 200 for each in swatches)


def test_measurements_agree_with_simpleitk_on_an_oblique_grid() -> None:
    result = phantom_result()
    geometry = result.scan.geometry
    assert geometry.is_oblique
    flip = np.diag([-1.0, -1.0, 1.0])
    image = SimpleITK.GetImageFromArray(result.labels.voxels[0].T)
    image.SetSpacing(geometry.spacing)
    image.SetOrigin((flip @ geometry.affine[:3, 3]).tolist())
    image.SetDirection((flip @ geometry.direction).ravel().tolist())
    shapes = SimpleITK.LabelShapeStatisticsImageFilter()
    shapes.Execute(image)
    for each in measurements.measure(result):
        assert each.voxels == shapes.GetNumberOfPixels(each.value)
        assert each.volume_ml == pytest.approx(shapes.GetPhysicalSize(each.value) / 1000)
        np.testing.assert_allclose(each.centroid_mm, flip @ shapes.GetCentroid(each.value), atol=1e-6)
        parts = SimpleITK.ConnectedComponent(image == each.value, True)
        shapes_of_parts = SimpleITK.LabelShapeStatisticsImageFilter()
        shapes_of_parts.Execute(parts)
        sizes = [shapes_of_parts.GetPhysicalSize(part) / 1000 for part in shapes_of_parts.GetLabels()]
        assert each.components == len(sizes) and each.largest_component_ml == pytest.approx(max(sizes))


def test_a_bounding_box_holds_every_corner_of_every_voxel() -> None:
    result = phantom_result()
    geometry = result.scan.geometry
    for each in measurements.measure(result):
        voxels = np.argwhere(result.labels.voxels[0] == each.value)
        corners = (voxels[:, None] + np.array(list(itertools.product((-0.5, 0.5), repeat=3)))).reshape(-1, 3)
        points = geometry.to_world(corners)
        assert each.bounding_box_mm is not None
        np.testing.assert_allclose(each.bounding_box_mm[0], points.min(axis=0), atol=1e-9)
        np.testing.assert_allclose(each.bounding_box_mm[1], points.max(axis=0), atol=1e-9)


def test_every_part_is_measured_by_itself_and_the_largest_is_the_first() -> None:
    result = phantom_result()
    for each in measurements.measure(result):
        assert [part.number for part in each.parts] == list(range(1, each.components + 1))
        assert sum(part.voxels for part in each.parts) == each.voxels
        assert each.parts[0].volume_ml == each.largest_component_ml == max(part.volume_ml for part in each.parts)
        middle = np.average([part.centroid_mm for part in each.parts], axis=0, weights=[p.voxels for p in each.parts])
        np.testing.assert_allclose(middle, each.centroid_mm, atol=1e-6)


def test_a_label_that_was_not_found_is_measured_as_nothing(tmp_path: Path) -> None:
    result = phantom_result()
    result = replace(result, label_table=(*TABLE, Label(value=9, name="spleen", colour=(0, 0, 0))))
    (path,) = measurements.write(result, tmp_path, measurements.Config())
    said = json.loads(path.read_text(encoding="utf-8"))["labels"]
    assert said["spleen"] == {
        "value": 9,
        "voxels": 0,
        "volume_ml": 0.0,
        "components": 0,
        "largest_component_ml": 0.0,
        "bounding_box_mm": None,
        "centroid_mm": None,
        "mean_confidence": None,
        "parts": [],
    }
    assert said["liver"]["mean_confidence"] == 0.97 and said["lesion"]["mean_confidence"] is None
    assert said["liver"]["volume_ml"] == pytest.approx(result.volumes_ml["liver"])


def test_a_real_hippocampus_is_drawn_and_measured(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "hippocampus"
    image = nibabel.load(folder / "imagesTr" / "hippocampus_001.nii.gz")
    found = nibabel.load(folder / "labelsTr" / "hippocampus_001.nii.gz")
    table = (TABLE[0], TABLE[1])
    result = result_of(np.asarray(image.dataobj), np.asarray(found.dataobj).astype(np.uint8), image.affine, table)
    (path,) = overlay.write(result, tmp_path, overlay.Config())
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet)
    assert all((pixels == label.colour).all(axis=2).sum() > 500 for label in table)
