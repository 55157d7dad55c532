"""What a picture promises: the scan untouched, colours that stand for numbers, that every eye tells apart, parts by number."""

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from scipy.spatial.transform import Rotation

from pipeline.outputs import _rows, measurements, overlay, saliency
from pipeline.outputs._drawing import GAP, MARGIN, QUIET, WIDTH, blank_row, png, width_of, write
from pipeline.outputs._heat import CLEAR_BELOW, MOST_OPACITY, colours, opacity
from pipeline.outputs._planes import (
    AXIAL,
    CORONAL,
    PLANES,
    View,
    findings,
    grey_window,
    is_ct,
    panel,
    projected,
    shades,
    turn,
)
from pipeline.report import Explanation, Result, millilitres
from preprocessing.declared import PALETTE, label_table
from preprocessing.volume import Geometry, Provenance, Volume

TABLE = label_table({"organ": 1, "lesion": 2})
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = Rotation.from_euler("xyz", (8, -12, 22), degrees=True).as_matrix() * (0.9, 1.2, 2.4)
OBLIQUE[:3, 3] = (5, -3, 9)
GRIDS = {
    "30×45×61, LPS": ((30, 45, 61), np.diag([-1.0, -1.0, 1.0, 1])),
    "anisotropic": ((34, 27, 9), np.diag([0.7, 0.9, 5.0, 1])),
    "oblique": ((21, 26, 15), OBLIQUE),
}


def a_result(shape: tuple[int, ...] = (34, 27, 9), affine: np.ndarray = OBLIQUE, seed: int = 0) -> Result:
    """An organ, and lesions of many sizes in it and beside."""
    rng = np.random.default_rng(seed)
    grid = Geometry(shape=(shape[0], shape[1], shape[2]), affine=affine)
    found = np.zeros(shape, np.uint8)
    found[4:-6, 5:-4, 2:-1] = 1
    field = ndimage.gaussian_filter(rng.normal(size=shape), 1.2)
    found[field > np.quantile(field, 0.93)] = 2
    grey = rng.normal(40, 120, shape).astype(np.float32)
    return Result(
        case_id="case",
        scan=Volume(voxels=grey[None], geometry=grid, channels=("t1",)),
        labels=Volume(voxels=found[None], geometry=grid, channels=("labels",)),
        label_table=TABLE,
        package_id="ab" * 32,
        package_name="demo",
    )


def explanation(codes: np.ndarray, peak: float = 1e-3, label: str = "organ", **other: object) -> Explanation:
    made = {"part": None, "method": "hirescam", "layer": "down.2", "unit": "logits per ml", "score": 3.0}
    return Explanation(label=label, codes=codes.astype(np.int8), scale=peak / 127, **{**made, **other})


def slope_of(shape: tuple[int, ...], low: int = 0) -> np.ndarray:
    """A map that rises along the first axis from `low` to 127."""
    rising = np.rint(np.linspace(low, 127, shape[0])).astype(np.int8)
    return np.broadcast_to(rising[:, None, None], shape).copy()


def with_heat(result: Result, *explanations: Explanation, full: float | None = None) -> View:
    result = replace(result, explanations=explanations)
    return replace(turn(result, window=(40, 400)), heat=overlay.heat(result, explanations[0], full))


def pixels(view: View, index: int, bare: bool = False) -> np.ndarray:
    """An axial slice, one pixel per voxel where the grid is square."""
    image, _ = panel(view, AXIAL, index, box=view.grey.shape[:2], fill=0.0, bare=bare)
    return np.asarray(image).astype(int)


SQUARE = np.diag([1.0, 1.0, 2.0, 1])


# the scan untouched


@pytest.mark.parametrize("name", GRIDS)
def test_the_twin_without_overlays_is_the_windowed_scan_and_nothing_else(name: str) -> None:
    view = turn(a_result(*GRIDS[name]))
    for plane in PLANES:
        image, _ = panel(view, plane, 4, box=(300, 300), fill=0.5, bare=True)
        flat = np.moveaxis(view.grey, plane.through, 0)[4].T[::-1, ::-1]
        expected = Image.fromarray(shades(np.ascontiguousarray(flat), view.window))
        np.testing.assert_array_equal(
            np.asarray(image)[..., 0], np.asarray(expected.resize(image.size, Image.Resampling.BILINEAR))
        )
        assert (np.ptp(np.asarray(image), axis=2) == 0).all()


def test_where_heat_is_clear_and_no_contour_runs_grey_is_the_windowed_scan_to_the_last_digit() -> None:
    result = a_result((40, 30, 3), SQUARE)
    codes = slope_of(result.scan.geometry.shape)
    view = with_heat(result, explanation(codes))
    drawn, bare = pixels(view, 1), pixels(view, 1, bare=True)
    seen_codes, seen_labels = (each[:, :, 1].T[::-1, ::-1] for each in (codes, view.labels))
    clear = (seen_codes < 127 * CLEAR_BELOW) & (seen_labels == 0)
    assert clear.sum() > 30
    np.testing.assert_array_equal(drawn[clear], bare[clear])
    windowed = np.rint(np.clip((view.grey[:, :, 1].T[::-1, ::-1].astype(float) + 160) / 400, 0, 1) * 255)
    np.testing.assert_array_equal(bare[..., 0], windowed)


def test_the_scan_is_seen_through_the_strongest_heat() -> None:
    result = a_result((40, 30, 3), SQUARE)
    result = replace(result, labels=result.labels.with_voxels(np.zeros_like(result.labels.voxels)))
    view = with_heat(result, explanation(np.full(result.scan.geometry.shape, 127)))
    drawn, bare = pixels(view, 1)[..., 0], pixels(view, 1, bare=True)[..., 0]
    share = np.polyfit(bare.ravel(), drawn.ravel(), 1)[0]
    assert share == pytest.approx(1 - MOST_OPACITY, abs=0.01)


@pytest.mark.parametrize("name", GRIDS)
def test_millimetres_are_true_within_a_hundredth_on_every_grid(name: str) -> None:
    view = turn(a_result(*GRIDS[name]))
    for plane in PLANES:
        image, scale = panel(view, plane, 3, box=(2000, 2000), fill=0)
        extent = np.array(view.grey.shape) * view.geometry.spacing
        for length, axis in ((image.width, plane.across), (image.height, plane.down)):
            assert length / scale == pytest.approx(extent[axis], rel=0.01)


@pytest.mark.parametrize("name", GRIDS)
def test_a_contour_lies_on_its_own_edge_within_a_pixel(name: str) -> None:
    result = a_result(*GRIDS[name])
    found = np.zeros_like(result.labels.voxels)
    found[0, 5:-7, 8:-5, 2:-2] = 2
    result = replace(result, labels=result.labels.with_voxels(found))
    view = turn(replace(result, scan=result.scan.with_voxels(np.zeros_like(result.scan.voxels))))
    (((part,),)) = findings(result)
    for plane in PLANES:
        image, scale = panel(view, plane, part.centre[plane.through], box=(400, 400), fill=0)
        rows, columns = np.nonzero(np.asarray(image).any(axis=2))
        for drawn, axis in ((columns, plane.across), (rows, plane.down)):
            per_voxel, count = scale * view.geometry.spacing[axis], view.geometry.shape[axis]
            first, last = part.box[axis]  # of an axis that rises to the left or upwards
            assert drawn.min() == pytest.approx((count - 1 - last) * per_voxel, abs=1)
            assert drawn.max() + 1 == pytest.approx((count - first) * per_voxel, abs=1)


def test_letters_follow_the_affine_when_a_scan_is_stored_the_other_way_round() -> None:
    result = a_result((20, 24, 5), SQUARE)
    mirrored = np.diag([-1.0, 1.0, 1.0, 1.0])
    mirrored[0, 3] = 19
    geometry = Geometry(shape=(20, 24, 5), affine=SQUARE @ mirrored)
    turned = [each.with_voxels(each.voxels[:, ::-1], geometry) for each in (result.scan, result.labels)]
    same = replace(result, scan=turned[0], labels=turned[1])
    config = overlay.Config(parts=0)  # the order of two parts of one size depends on how voxels are stored
    assert png(overlay.picture(result, config)) == png(overlay.picture(same, config))
    lied = [each.with_voxels(each.voxels, geometry) for each in (result.scan, result.labels)]
    one, other = turn(result), turn(replace(result, scan=lied[0], labels=lied[1]))
    np.testing.assert_array_equal(one.grey, other.grey[::-1])


# windows


@pytest.mark.parametrize(
    ("modality", "channel", "expected"),
    [
        ("CT", "0", True),
        ("", "CT", True),
        ("", "ct", True),
        ("MR", "ct", False),
        ("", "t1", False),
        ("CT; PT", "CT", False),
    ],
)
def test_a_ct_is_known_by_what_its_file_or_its_channel_says(modality: str, channel: str, expected: bool) -> None:
    assert is_ct(modality, channel) is expected


def test_every_ct_has_the_same_window_and_says_so() -> None:
    result = a_result()
    ct = replace(result, scan=replace(result.scan, provenance=Provenance(modality="CT")))
    window = turn(ct).window
    assert (window.low, window.high) == (-160, 240) and "level 40, width 400, soft tissue" in str(window)
    assert "1st to 99th percentile" in str(turn(result).window)
    assert "level 600, width 100, as asked" in str(turn(ct, window=(600, 100)).window)


def test_a_ct_whose_numbers_are_no_hounsfield_units_is_shown_all_the_same() -> None:
    grey = np.random.default_rng(0).uniform(3000, 5000, (9, 9, 9))
    window = grey_window(grey, is_ct=True)
    assert 2900 < window.low < window.high < 5100 and "percentile" in window.origin


# heat


def test_heat_is_proportional_to_its_value() -> None:
    result = a_result((40, 30, 3), SQUARE)
    heat = with_heat(result, explanation(slope_of((40, 30, 3), low=-127))).heat
    assert heat is not None
    values = np.array([-127, -63.5, -12.7, 0, 12.7, 63.5, 127])
    np.testing.assert_allclose(heat.levels(values), values / 127)


def test_of_two_cases_on_one_scale_a_tenth_of_the_score_has_a_tenth_of_the_colour() -> None:
    result = a_result((40, 30, 3), SQUARE)
    strong, weak = (explanation(slope_of((40, 30, 3)), peak=peak) for peak in (2e-2, 2e-3))
    views = [with_heat(result, each, full=1e-2) for each in (strong, weak)]
    levels = [view.heat.levels(np.array([50.0]))[0] for view in views if view.heat is not None]
    assert levels[0] == pytest.approx(10 * levels[1])
    drawn = [pixels(view, 1) for view in (*views, with_heat(result, strong, full=1e-1))]
    assert np.abs(drawn[0] - drawn[1]).max() > 50
    np.testing.assert_allclose(drawn[1], drawn[2], atol=1)  # ten times the score on ten times the scale


def test_maps_of_one_case_share_one_scale_and_are_never_stretched() -> None:
    result = a_result((40, 30, 3), SQUARE)
    strong, weak = explanation(slope_of((40, 30, 3)), peak=1e-2), explanation(slope_of((40, 30, 3)), peak=1e-3, part=1)
    first, second = with_heat(result, strong, weak).heat, with_heat(result, weak, strong).heat
    assert first is not None and second is not None
    assert first.full == second.full == pytest.approx(1e-2)
    other = explanation(slope_of((40, 30, 3)), peak=5.0, method="attention", unit="the network's own weight")
    alone = with_heat(result, weak, other).heat
    assert alone is not None and alone.full == pytest.approx(1e-3), "what has another unit has another scale"


def test_a_blank_map_is_drawn_without_heat_and_says_why() -> None:
    result = a_result()
    blank = explanation(np.zeros(result.scan.geometry.shape), peak=0.0, blank="organ has no score here")
    assert with_heat(result, blank).heat is None
    words = [line for line, _ in _rows.standing_lines(blank)]
    assert words == ["BLANK, nothing is drawn: organ has no score here"]


def test_what_is_weak_is_clear_and_what_has_no_sign_never_shows_its_negatives() -> None:
    levels = np.linspace(-1, 1, 201)
    for is_signed in (True, False):
        shown = opacity(levels, is_signed)
        assert shown.max() == MOST_OPACITY and (shown[np.abs(levels) < CLEAR_BELOW] == 0).all()
        assert (np.diff(shown[levels >= 0]) >= 0).all()
    assert (opacity(levels, False)[levels < 0] == 0).all() and opacity(levels, True)[0] == MOST_OPACITY


# eyes

# Machado, Oliveira & Fernandes (2009), severity 1, for linear RGB
EYES = {
    "every cone": np.eye(3),
    "red-blind": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "green-blind": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def lab(rgb: np.ndarray, eye: str) -> np.ndarray:
    """CIE 1976 L*a*b* of what such an eye sees."""
    share = np.asarray(rgb, dtype=float) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    xyz = np.clip(linear @ EYES[eye].T, 0, 1) @ TO_XYZ.T / (0.95047, 1, 1.08883)
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


@pytest.mark.parametrize("eye", EYES)
def test_any_two_colours_of_labels_are_told_apart_by_every_eye(eye: str) -> None:
    seen = lab(np.array(PALETTE), eye)
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)) >= 20


@pytest.mark.parametrize("eye", EYES)
def test_heat_for_and_heat_against_are_told_apart_by_every_eye(eye: str) -> None:
    levels = np.linspace(0.2, 1, 17)
    one, other = (lab(colours(sign * levels, True), eye) for sign in (1, -1))
    assert np.linalg.norm(one - other, axis=-1).min() >= 20


@pytest.mark.parametrize("eye", EYES)
def test_stronger_heat_is_always_brighter(eye: str) -> None:
    levels = np.linspace(0, 1, 101)
    assert (np.diff(lab(colours(levels, False), eye)[:, 0]) > 0).all()
    for sign in (1, -1):
        assert (np.diff(lab(colours(sign * levels[1:], True), eye)[:, 0]) > 0).all()


# parts and projection


def says(image: Image.Image, words: str, right: int, size: int = 15) -> bool:
    """Whether these words end at this column, on whatever row."""
    stamp, draw = blank_row(20, width_of(words, size))
    write(draw, (stamp.width, 10), words, size, QUIET, "rm")
    seen, expected = np.asarray(image)[:, right - stamp.width : right], np.asarray(stamp)[2:18]
    return any(np.array_equal(seen[top : top + 16], expected) for top in range(len(seen) - 16))


def test_parts_bear_the_numbers_and_millilitres_of_the_measurements() -> None:
    result = a_result((30, 45, 31), OBLIQUE)
    measured = {each.name: each for each in measurements.measure(result)}
    for parts in findings(result, most=8):
        label = parts[0].label
        assert label is not None and parts[0].of == measured[label.name].components
        for part, other in zip(parts, measured[label.name].parts[:8], strict=True):
            assert part.number == other.number and part.ml == pytest.approx(other.volume_ml)
            place = turn(result).geometry.to_voxel(other.centroid_mm)
            assert all(low - 0.5 <= at <= high + 0.5 for at, (low, high) in zip(place, part.box, strict=True))


def test_the_montage_shows_parts_of_every_label_in_turn_with_their_millilitres() -> None:
    result = a_result((30, 45, 31), OBLIQUE)
    organ, lesions = findings(result, most=16)
    assert len(organ) == 1 and lesions[0].of > 16
    view = turn(result)
    assert _rows.montage(view, [organ, lesions], 0) is None
    assert _rows.montage(view, [organ], 16) is None, "one part alone is in the planes already"
    two, many = (_rows.montage(view, [lesions, organ], most) for most in (2, 16))
    assert two is not None and many is not None and many.height > 1.5 * two.height
    for place, part in enumerate((lesions[0], organ[0])):  # the largest of each, not the two largest of the first
        assert says(two, millilitres(part.ml), place * (_rows.TILE + GAP) + _rows.TILE, 16)


def test_a_projection_holds_the_brightest_voxel_and_the_smallest_label_on_every_line_of_sight() -> None:
    result = a_result((30, 45, 31), np.diag([1.0, 1.0, 1.5, 1]))
    view = turn(result)
    flat, window = projected(view, CORONAL)
    np.testing.assert_array_equal(flat.grey, view.grey.max(axis=1).T[::-1, ::-1])
    labels = view.labels.transpose(1, 0, 2)
    expected = np.where((labels == 2).any(axis=0), 2, np.where((labels == 1).any(axis=0), 1, 0))
    np.testing.assert_array_equal(flat.labels, expected.T[::-1, ::-1])
    assert window.low == view.window.low and window.high >= view.window.high


def test_a_projection_of_heat_keeps_the_stronger_sign() -> None:
    result = a_result((9, 12, 5), SQUARE)
    codes = np.zeros((9, 12, 5), np.int8)
    codes[2, 3, 1], codes[2, 7, 1], codes[5, 5, 2] = 40, -90, 30
    flat, _ = projected(with_heat(result, explanation(codes)), CORONAL)
    assert flat.heat is not None
    seen = flat.heat[::-1, ::-1].T
    assert (seen[2, 1], seen[5, 2], np.count_nonzero(seen)) == (-90, 30, 2)


# the sheet


def test_a_sheet_with_heat_is_the_same_to_the_byte_every_time_and_differs_from_one_without() -> None:
    result = a_result((30, 27, 21), OBLIQUE)
    heated = replace(result, explanations=(explanation(slope_of((30, 27, 21), low=-50), label="organ"),))
    sheets = [png(overlay.picture(each)) for each in (heated, heated, result)]
    assert sheets[0] == sheets[1] != sheets[2]
    without = png(overlay.picture(heated, overlay.Config(heat=None)))
    assert without == sheets[2]


def test_a_heat_that_is_not_there_is_refused_by_name() -> None:
    result = a_result()
    result = replace(result, explanations=(explanation(np.zeros(result.scan.geometry.shape)),))
    with pytest.raises(overlay.UsageError, match="organ-hirescam"):
        overlay.picture(result, overlay.Config(heat="spleen"))


def test_every_sheet_says_what_it_is_not_for() -> None:
    result = a_result()
    each = explanation(slope_of(result.scan.geometry.shape))
    result = replace(result, explanations=(each,))
    overlays = [overlay.picture(result, anonymous=quiet) for quiet in (True, False)]
    assert all(says(sheet, "for research, not for diagnosis", WIDTH - MARGIN) for sheet in overlays)
    explained = saliency.picture(result, each, turn(result), findings(result))
    words = "where the network looked, not where disease is · for research, not for diagnosis"
    assert says(explained, words, WIDTH - MARGIN) and not says(overlays[0], words, WIDTH - MARGIN)


def test_planes_of_an_explanation_pass_through_its_strongest_voxel_even_beside_the_label() -> None:
    result = a_result((30, 27, 21), SQUARE)
    codes = np.zeros((30, 27, 21), np.int8)
    codes[1, 2, 19], codes[15, 12, 9] = -127, 60
    result = replace(result, explanations=(explanation(codes),))
    bare = np.asarray(saliency.picture(result, result.explanations[0], turn(result), findings(result)))
    strongest = replace(findings(result)[0][0], centre=(1, 2, 19))
    expected = np.asarray(_rows.planes(turn(result), strongest, 0.0, bare=True))
    expected = expected[:, : 3 * (_rows.COLUMN + GAP) - GAP]  # beside it stand the scores
    assert any(
        np.array_equal(bare[top : top + len(expected), MARGIN : MARGIN + expected.shape[1]], expected)
        for top in range(len(bare) - len(expected))
    )


def test_the_number_that_matters_is_read_on_a_thumbnail() -> None:
    """Twelve pixels high on one of 256: the height of the words on a good keyboard."""
    assert _rows.KEY * 256 / WIDTH >= 12


def test_an_anonymous_sheet_does_not_name_its_case() -> None:
    one, other = (replace(a_result(), case_id=name) for name in ("Meier^Anna", "x"))
    sheets = [[png(overlay.picture(each, anonymous=quiet)) for each in (one, other)] for quiet in (True, False)]
    assert sheets[0][0] == sheets[0][1] and sheets[1][0] != sheets[1][1]


def test_a_large_scan_is_drawn_in_seconds() -> None:
    """On a machine busy with other things: the processor's own seconds are counted."""
    shape = (256, 256, 200)
    found = np.zeros(shape, np.uint8)
    found[60:160, 80:170, 40:140], found[100:110, 100:112, 80:90] = 1, 2
    grid = Geometry(shape=shape, affine=np.diag([-0.8, -0.8, 1.5, 1]))
    grey = np.broadcast_to(np.arange(200, dtype=np.int16), shape)
    result = replace(
        a_result(),
        scan=Volume(voxels=grey[None], geometry=grid, channels=("ct",)),
        labels=Volume(voxels=found[None], geometry=grid, channels=("labels",)),
    )
    started = time.process_time()
    overlay.picture(result)
    assert time.process_time() - started < 3
