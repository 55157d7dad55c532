"""What is said of a case is what was found, and it is on the disk whole or not at all."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from pipeline.report import Explanation, Report, Result, UnreadableReport, as_json, millilitres, named, write_whole
from preprocessing.phantoms import body, scan
from preprocessing.plan import Label
from preprocessing.volume import Geometry, GeometryMismatch, Provenance, Volume

TABLE = (
    Label(value=1, name="liver", colour=(0, 114, 178)),
    Label(value=2, name="kidney", colour=(230, 159, 0)),
    Label(value=3, name="lesion", colour=(0, 158, 115)),
    Label(value=300, name="absent", colour=(204, 121, 167)),
)


def grid(seed: int) -> Geometry:
    """Oblique, anisotropic, its axes in an order of their own."""
    turn = Rotation.from_euler("xyz", (8, -12, 15 + seed), degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = (turn * (2.0, 2.2, 3.5))[:, [2, 0, 1]] * (1, -1, -1)
    shape = (22, 48, 38)
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2
    return Geometry(shape=shape, affine=affine)


def found(seed: int = 9) -> Result:
    image, labels = scan(body(seed), grid(seed), seed=seed)
    provenance = Provenance(
        sources=("scans/one.nii.gz",), sha256="12" * 32, reader="phantom", repairs=("The axes were named.",)
    )
    return Result(
        case_id=f"phantom_{seed:03d}",
        scan=replace(image, provenance=provenance),
        labels=labels,
        label_table=TABLE,
        package_id="ab" * 32,
        package_name="demo",
        confidence={"liver": 0.9},
        warnings=("Größe: 4,1 mm",),
        seconds={"read": 0.1, "predict": 2.5},
    )


def test_millilitres_are_those_of_the_ellipsoids() -> None:
    known = body(9).known_ml()
    volumes = found().volumes_ml
    assert volumes["liver"] == pytest.approx(known["liver"], rel=0.03)
    assert volumes["kidney"] == pytest.approx(known["kidney"], rel=0.05)
    assert volumes["absent"] == 0


def test_a_region_has_the_millilitres_of_the_regions_in_it() -> None:
    apart = found()
    parts = {"liver": (1, 2, 3), "kidney": (2, 3), "lesion": (3,), "absent": (4,)}
    volumes = replace(apart, label_table=tuple(replace(each, parts=parts[each.name]) for each in TABLE)).volumes_ml
    alone = apart.volumes_ml
    assert volumes["liver"] == pytest.approx(alone["liver"] + alone["kidney"] + alone["lesion"])
    assert volumes["kidney"] == pytest.approx(alone["kidney"] + alone["lesion"])
    assert (volumes["lesion"], volumes["absent"]) == (alone["lesion"], 0)


def test_labels_on_another_grid_are_no_result_of_this_scan() -> None:
    result = found()
    elsewhere = grid(4)
    labels = Volume(voxels=np.zeros((1, *elsewhere.shape), np.uint8), geometry=elsewhere, channels=("labels",))
    with pytest.raises(GeometryMismatch, match="own grid"):
        replace(result, labels=labels)


def test_a_report_read_back_says_what_was_written(tmp_path: Path) -> None:
    report = Report.of(found(), [tmp_path / "labels.nii.gz", "overlay.png"], ("labels", "overlay"))
    path = report.write(tmp_path)
    assert Report.read(path) == Report.read(tmp_path) == report
    assert report.files == ("labels.nii.gz", "overlay.png")
    said = json.loads(path.read_text(encoding="utf-8"))
    assert (
        said["status"] == "done" and said["sources"] == ["scans/one.nii.gz"] and said["warnings"] == ["Größe: 4,1 mm"]
    )
    np.testing.assert_allclose(said["grid"]["affine"], found().scan.geometry.affine)
    assert [each.name for each in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"case_id": 3}', "null", "\x00\x00"])
def test_a_damaged_report_is_no_report(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content, encoding="utf-8")
    with pytest.raises(UnreadableReport, match=r"(?s)is not a report.*is needed.*segment the case again"):
        Report.read(tmp_path)


def test_bytes_that_are_no_text_are_no_report(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UnreadableReport):
        Report.read(tmp_path)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_whole(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(os, "fsync", full)
        write_whole(path, "new")
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(OSError):  # a folder cannot be replaced by a file
        write_whole(target, "new")
    assert path.read_text() == "old"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["folder", "report.json"]


def test_a_file_name_that_is_no_unicode_can_be_written_and_read(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.json", as_json({"caf\udce9": 1}))
    assert json.loads((tmp_path / "a.json").read_text()) == {"caf\udce9": 1}


@pytest.mark.parametrize(
    ("ml", "words"),
    [
        (0, "0 ml"),
        (1180.4, "1180 ml"),
        (23.44, "23.4 ml"),
        (1.316, "1.32 ml"),
        (0.052, "0.0520 ml"),
        (1e-7, "0.00000 ml"),
    ],
)
def test_millilitres_are_written_with_the_digits_that_count(ml: float, words: str) -> None:
    assert millilitres(ml) == words


MAP = Explanation(
    label="lesion", part=None, method="hirescam", layer="down.2", codes=np.zeros((2, 2, 2), np.int8), scale=0.0,
    unit="logits per ml", score=None,
)  # fmt: skip


def test_two_maps_of_one_name_are_told_apart() -> None:
    maps = [replace(MAP, label=label) for label in ("a b", "a/b", "c")]
    assert [name for name, _ in named(maps)] == ["a_b-hirescam", "a_b-hirescam~2", "c-hirescam"]


@pytest.mark.parametrize(
    "what, said",
    [({"blank": "nothing was found"}, "blank: nothing was found"), ({}, "not tested")],
)
def test_a_map_says_where_it_stands(what: dict[str, str], said: str) -> None:
    assert replace(MAP, **what).standing == said
