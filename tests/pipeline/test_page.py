"""The page of a case: what it says, that nothing in it runs but what it names, and that the copy it shows is true."""

import base64
import io
import json
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.faithfulness import Faithfulness
from pipeline.maps import KINDS, MapWriter
from pipeline.outputs import _viewer, measurements, overlay, page
from pipeline.outputs._drawing import png
from pipeline.outputs._viewer import copies
from pipeline.report import Explanation, Result
from preprocessing.phantoms import body, scan
from preprocessing.plan import Label, Plan
from preprocessing.steps import Trail
from preprocessing.volume import Geometry, Provenance, Volume

TABLE = (
    Label(value=1, name="liver", colour=(0, 114, 178)),
    Label(value=2, name="kidney", colour=(230, 159, 0)),
    Label(value=3, name="lesion", colour=(0, 158, 115)),
)
TEXTS = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onload='x", "</style><b>", "&lt;i&gt;")
PASSED = Faithfulness(
    deletion=0.08, deletion_random=0.93, deletion_mask=0.02, insertion=0.96, insertion_random=0.12, insertion_mask=1.0,
    energy=0.66, energy_chance=0.02, context=0.34, randomisation=0.11, randomisation_overlap=0.01,
    randomisation_scale=0.4, stability=0.97,
)  # fmt: skip
FAILED = replace(PASSED, deletion=0.91, failed=("taking its voxels away is no better than chance",))

needs_niivue = pytest.mark.skipif(bool(_viewer.missing()), reason=_viewer.missing())


@cache
def a_result() -> Result:
    """A phantom with three lesions of which two are found, and maps of each kind."""
    affine = np.diag([3.0, 3.0, 4.0, 1.0])
    shape = (34, 30, 26)
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    image, found = scan(body(9), Geometry(shape=shape, affine=affine), seed=9)
    labels = found.voxels.copy()
    labels[0, 2:4, 3:5, 4:6], labels[0, 30, 20, 20] = 3, 3
    codes = np.zeros(shape, np.int8)
    codes[2:4, 3:5, 4:6], codes[20:22, 10:12, 10:12] = 127, -50
    made = {"method": "hirescam", "layer": "up.2", "unit": "share of the score", "score": 8.0}
    return Result(
        case_id="phantom",
        scan=image,
        labels=replace(found, voxels=labels),
        label_table=TABLE,
        package_id="ab" * 32,
        package_name="demo",
        confidence={"liver": 0.97, "kidney": 0.9},
        seconds={"read": 0.5},
        explanations=(
            Explanation(label="lesion", part=None, codes=codes, scale=3e-5, faithfulness=PASSED, health=0.71, **made),
            Explanation(label="lesion", part=2, codes=codes, scale=2e-5, faithfulness=FAILED, **made),
            Explanation(label="kidney", part=None, codes=codes * 0, scale=0.0, blank="it has no score here", **made),
        ),
    )


def written(result: Result, folder: Path, config: page.Config | None = None) -> str:
    (path,) = page.write(result, folder, config or page.Config())
    return path.read_text(encoding="utf-8")


class Markup(HTMLParser):
    """Every tag, attribute and word of a page; scripts apart."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.scripts: list[tuple[str | None, str]] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs).get("type"), ""))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and self.lasttag == "script" and self.cdata_elem == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        else:
            self.words += data

    @property
    def links(self) -> list[str]:
        return [
            value
            for _, attributes in self.tags
            for key, value in attributes.items()
            if key in ("src", "href") and value
        ]


def hostile_result() -> Result:
    result = a_result()
    provenance = Provenance(sources=TEXTS, sha256=TEXTS[0], reader=TEXTS[1], repairs=TEXTS)
    failed = replace(FAILED, failed=TEXTS, noted=TEXTS)
    first, second, blank = result.explanations
    return replace(
        result,
        case_id=TEXTS[1],
        scan=replace(result.scan, provenance=provenance, channels=TEXTS[:2]),
        label_table=tuple(replace(label, name=name) for label, name in zip(TABLE, TEXTS[:3], strict=True)),
        package_name=TEXTS[4],
        package_id=TEXTS[3],
        warnings=TEXTS,
        seconds={TEXTS[2]: 1.0},
        explanations=(
            replace(first, label=TEXTS[2], unit=TEXTS[3], layer=TEXTS[0], warnings=TEXTS),
            replace(second, label=TEXTS[2], method=TEXTS[1], faithfulness=failed),
            replace(blank, label=TEXTS[0], blank=TEXTS[1]),
        ),
    )


@needs_niivue
def test_no_string_of_a_case_becomes_markup(tmp_path: Path) -> None:
    content = written(hostile_result(), tmp_path)
    markup = Markup(content)
    tags = [tag for tag, _ in markup.tags]
    assert tags.count("img") == 1 and "i" not in tags and tags.count("html") == tags.count("style") == 1
    assert not [name for _, attributes in markup.tags for name in attributes if name.startswith("on")]
    assert all(each in markup.words for each in TEXTS)
    running = [content for kind, content in markup.scripts if kind is None]
    assert running == [(_viewer.HERE / "viewer.js").read_text(encoding="utf-8")]
    assert {kind for kind, _ in markup.scripts} == {None, "application/json", "text/plain"}


@pytest.mark.parametrize("viewer", [pytest.param(True, marks=needs_niivue), False])
def test_a_page_needs_nothing_but_itself(tmp_path: Path, viewer: bool) -> None:
    result = replace(a_result(), warnings=("look again",))
    config = page.Config(picture=overlay.Config(channel="t2"), viewer=viewer)
    content = written(result, tmp_path, config)
    markup = Markup(content)
    (picture,) = markup.links
    assert picture.startswith("data:image/png;base64,")
    policy = next(
        a["content"] for t, a in markup.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None and "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert ("script-src 'none'" in policy) != viewer
    assert not re.search(r"https?://", content.replace(picture, ""))
    drawn = png(overlay.picture(result, config.picture))
    assert base64.b64decode(picture.partition(",")[2]) == drawn and Image.open(io.BytesIO(drawn)).format == "PNG"
    for words in ("look again", "liver", "0.97", "not for diagnosis", str(result.scan.geometry), result.package_id):
        assert words in markup.words


@needs_niivue
def test_the_same_case_makes_the_same_page(tmp_path: Path) -> None:
    assert written(a_result(), tmp_path) == written(a_result(), tmp_path)


@needs_niivue
def test_every_part_has_its_row_and_its_place_and_its_map(tmp_path: Path) -> None:
    rows = re.findall(r'<tr data-mm="([^"]+)">(.*?)</tr>', written(a_result(), tmp_path))
    told = {" ".join(re.sub(r"<[^>]+>", " ", cells).split()[:2]): (at, cells) for at, cells in rows}
    lesions = measurements.measure(a_result())[2]
    assert lesions.components == len(lesions.parts) > 2
    for part in lesions.parts:
        at, cells = told[f"lesion {part.number}"]
        assert np.allclose([float(mm) for mm in at.split()], part.centroid_mm, atol=1e-3)
        assert ("data-map" in cells) == (part.number == 2)


def test_what_tests_say_of_a_map_stands_beside_it_and_a_blank_one_says_why(tmp_path: Path) -> None:
    markup = Markup(written(a_result(), tmp_path, page.Config(viewer=False)))
    for words in (
        "passed",
        "failed: taking its voxels away is no better",
        "blank: it has no score here",
        "chance 0.93",
    ):
        assert words in markup.words
    assert "not where disease is" in markup.words.casefold()


def test_without_niivue_the_page_shows_the_picture_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_viewer, "NIIVUE", replace(_viewer.NIIVUE, place=tmp_path / "nowhere.js"))
    markup = Markup(written(a_result(), tmp_path))
    assert "built without its viewer" in markup.words and "built without its viewer" in caplog.text
    assert len(markup.links) == 1 and not markup.scripts


@pytest.mark.parametrize("shape", [(1, 1, 1), (40, 30, 1), (3, 60, 50)])
@needs_niivue
def test_odd_scans_have_their_page_too(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    grid = Geometry(shape=shape, affine=np.diag([1.0, 1.0, 3.0, 1.0]))
    grey = np.full((1, *shape), np.nan, np.float32)
    result = replace(
        a_result(),
        scan=Volume(voxels=grey, geometry=grid, channels=("t1",)),
        labels=Volume(voxels=np.zeros((1, *shape), np.uint8), geometry=grid, channels=("labels",)),
        explanations=(),
    )
    assert "viewer-scan" in written(result, tmp_path)


# uncertainty, where it was asked for


def unsure_result(voxels: np.ndarray | None = None, kinds: tuple[str, ...] = ("entropy", "folds")) -> Result:
    """The phantom with maps of uncertainty: as given of the first kind, of all others 0."""
    result = a_result()
    grid = result.scan.geometry
    plan = Plan(
        name="x", channels=("t1",), labels=TABLE, steps=(), spacing_mm=(1, 1, 1), patch=(8, 8, 8), batch=1
    )  # fmt: skip
    given = np.full(grid.shape, 0.4, np.float32) if voxels is None else voxels
    writer = MapWriter.create(None, plan, grid, kinds)
    rows = {kind: torch.from_numpy(given * (number == 0)) for number, kind in enumerate(kinds)}
    writer.rows(0, None, rows)
    return replace(result, maps=writer.finish(Trail(taken=())))


def blocks(content: str) -> dict[str, bytes]:
    """The volumes a page holds."""
    return {
        name: base64.b64decode(packed)
        for name, packed in re.findall(r'<script type="text/plain" id="viewer-([\w-]+)">([^<]*)</script>', content)
    }


def facts_of(content: str) -> list[dict[str, Any]]:
    said = re.search(r'id="viewer-facts">(.*?)</script>', content)
    assert said is not None
    maps: list[dict[str, Any]] = json.loads(said[1])["maps"]
    return maps


@needs_niivue
def test_uncertainty_can_be_switched_on_behind_the_maps_and_its_voxels_are_the_scans(tmp_path: Path) -> None:
    unsure = np.random.default_rng(3).random(a_result().scan.geometry.shape).astype(np.float32)
    result = unsure_result(unsure)
    content = written(result, tmp_path)
    shown = facts_of(content)
    assert [facts["word"] for facts in shown] == ["map", "map", "unclear answer", "networks at odds"]
    assert shown[2]["full"] == pytest.approx(unsure.max(), abs=1 / 255) and not shown[2]["signed"]
    (tmp_path / "unsure.nii.gz").write_bytes(blocks(content)["map-2"])
    read = nibabel.load(tmp_path / "unsure.nii.gz")
    np.testing.assert_allclose(read.get_fdata(), unsure, atol=0.5 / 255 + 1e-6)
    np.testing.assert_allclose(read.affine, result.scan.geometry.affine, atol=1e-5)
    assert re.search(r'<button data-map="2"[^>]*>unclear answer', content)
    assert re.search(r"<button disabled>networks at odds.*?next to 0 in every voxel", content)


@needs_niivue
def test_what_is_next_to_nothing_does_not_glow(tmp_path: Path) -> None:
    faint = unsure_result(np.full(a_result().scan.geometry.shape, 0.01, np.float32))
    assert facts_of(written(faint, tmp_path))[2]["full"] == 0.1


def test_the_table_says_how_unsure_the_model_is_of_each_label_and_what_that_means(tmp_path: Path) -> None:
    markup = Markup(written(unsure_result(), tmp_path, page.Config(viewer=False)))
    for words in ("Where the model is unsure", "0.400", "0.000", *(KINDS[kind] for kind in ("entropy", "folds"))):
        assert words in markup.words
    assert "Where the model is unsure" not in Markup(written(a_result(), tmp_path, page.Config(viewer=False))).words


@needs_niivue
def test_a_page_with_uncertainty_keeps_to_its_size_too() -> None:
    noise = np.random.default_rng(0).random((34, 30, 26)).astype(np.float32)
    result = unsure_result(noise)
    free, without = _viewer.part(result, "", None), _viewer.part(a_result(), "", None)
    room = len(without.data)
    assert len(free.data) > room + 20_000
    tight = _viewer.part(result, "", None, room=room)
    assert len(tight.data) < room + 3_000 and "shown as one" in tight.html


# the copy that is shown


def ramp(shape: tuple[int, int, int], affine: np.ndarray) -> tuple[np.ndarray, Geometry]:
    """A scan whose grey value is where it lies: x + 100 y + 10000 z, in millimetres."""
    grid = Geometry(shape=shape, affine=affine)
    return grid.to_world(np.moveaxis(np.indices(shape), 0, -1)) @ [1.0, 100.0, 10000.0], grid


def test_a_small_scan_is_shown_as_it_is() -> None:
    grey, grid = ramp((9, 8, 7), np.diag([1.0, 2.0, 3.0, 1.0]))
    copy = copies.copy_of(grey, np.zeros(grey.shape, np.uint8), grid, low=-np.inf)
    assert copy.geometry.matches(grid) and copy.words == ""


def test_a_coarser_copy_lies_where_the_scan_lies() -> None:
    oblique = np.array([[0.9, -0.2, 0.1, 5], [0.2, 1.1, 0.0, -7], [0, 0.1, 2.5, 3], [0, 0, 0, 1]])
    grey, grid = ramp((24, 30, 12), oblique)
    copy = copies.copy_of(grey, np.zeros(grey.shape, np.uint8), grid, low=-np.inf, most=2000)
    assert np.prod(copy.geometry.shape) <= 2000 and max(copy.every) > 1 and "shown as one" in copy.words
    shown, scale = copies.scan(copy, grey)
    where = copy.geometry.to_world(np.moveaxis(np.indices(copy.geometry.shape), 0, -1)) @ [1.0, 100.0, 10000.0]
    whole = tuple(slice(0, n // every) for n, every in zip(grid.shape, copy.every, strict=True))
    assert np.abs(shown * scale - where)[whole].max() <= scale


def test_what_is_small_survives_in_a_coarser_copy() -> None:
    grid = Geometry(shape=(20, 20, 20), affine=np.eye(4))
    labels, codes = np.ones(grid.shape, np.uint8), np.zeros(grid.shape, np.int8)
    labels[7, 9, 11], codes[3, 3, 3], codes[2, 2, 2] = 2, -90, 40
    copy = copies.Copy(box=(slice(0, 20),) * 3, every=(2, 2, 2), of=grid)
    shown = copies.labels(copy, labels, TABLE[:2])
    assert shown[3, 4, 5] == 2 and (shown == 2).sum() == 1 and (shown == 1).sum() == 999
    assert copies.codes(copy, codes)[1, 1, 1] == -90


def test_a_large_scan_is_cropped_to_the_body_and_to_every_label() -> None:
    grey = np.full((60, 60, 60), -1000, np.int16)
    grey[20:40, 20:40, 20:40] = 50
    labels = np.zeros(grey.shape, np.uint8)
    labels[50, 30, 30] = 1
    grid = Geometry(shape=grey.shape, affine=np.eye(4))
    copy = copies.copy_of(grey, labels, grid, low=-160, most=50_000)
    assert copy.box == (slice(16, 55), slice(16, 44), slice(16, 44)) and copy.every == (1, 1, 1)
    assert "cropped to the body" in copy.words


@needs_niivue
def test_a_page_keeps_to_its_size() -> None:
    rng = np.random.default_rng(0)
    grid = Geometry(shape=(64, 64, 64), affine=np.eye(4))
    noise = Volume(voxels=rng.integers(-1000, 1000, (1, 64, 64, 64), dtype=np.int16), geometry=grid, channels=("ct",))
    labels = Volume(voxels=np.zeros((1, 64, 64, 64), np.uint8), geometry=grid, channels=("labels",))
    result = replace(a_result(), scan=noise, labels=labels, explanations=())
    free = _viewer.part(result, "", None)
    tight = _viewer.part(result, "", None, room=len(free.data) - 200_000)
    assert len(tight.data) < len(free.data) - 200_000 + 2_000
    assert "shown as one" in tight.html and "shown as one" not in free.html
