"""Maps are written on the scan's own grid, with what is known of them; what failed or is blank is never shown as sound."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import nibabel
import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from pipeline.attribution import METHODS
from pipeline.explanation import Choice
from pipeline.faithfulness import Faithfulness
from pipeline.outputs import saliency
from pipeline.outputs._drawing import ALARM, INK
from pipeline.outputs.saliency import Config
from pipeline.report import Explanation, Result
from preprocessing import files
from preprocessing.declared import label_table
from preprocessing.records import BadRecord, decode, encode
from preprocessing.volume import Geometry, Volume

TABLE = label_table({"organ": 1, "lesion": 2})
AFFINE = np.eye(4)
AFFINE[:3, :3] = Rotation.from_euler("xyz", (8, -12, 22), degrees=True).as_matrix() * (0.9, 1.2, 2.4)
AFFINE[:3, 3] = (5, -3, 9)
PASSED = Faithfulness(
    deletion=0.1, deletion_random=0.9, deletion_mask=0.05, insertion=0.9, insertion_random=0.2, insertion_mask=0.95,
    energy=0.7, energy_chance=0.02, context=0.2, randomisation=0.1, randomisation_overlap=0.01, randomisation_scale=0.5,
    stability=0.95,
)  # fmt: skip
FAILED = replace(PASSED, deletion=0.91, failed=("taking its voxels away is no better than chance",))


def explanation(codes: np.ndarray, **other: object) -> Explanation:
    made = {
        "label": "lesion", "part": None, "method": "hirescam", "layer": "down.2", "scale": 1.3e-5, "score": 3.0,
        "unit": "logits per ml", "faithfulness": PASSED,
    }  # fmt: skip
    return Explanation(codes=codes, **{**made, **other})


@pytest.fixture(scope="module")
def found() -> Result:
    shape = (19, 23, 11)
    rng = np.random.default_rng(0)
    labels = np.zeros(shape, np.uint8)
    labels[3:15, 4:18, 2:9], labels[5:8, 6:9, 3:6], labels[11:13, 12:14, 6:8] = 1, 2, 2
    codes = rng.integers(-127, 128, shape).astype(np.int8)
    grid = Geometry(shape=shape, affine=AFFINE)
    return Result(
        case_id="case",
        scan=Volume(voxels=rng.normal(size=(1, *shape)).astype(np.float32), geometry=grid, channels=("t1",)),
        labels=Volume(voxels=labels[None], geometry=grid, channels=("labels",)),
        label_table=TABLE,
        package_id="ab" * 32,
        package_name="demo",
        explanations=(
            explanation(codes),
            explanation(codes, part=2, faithfulness=FAILED, warnings=("health 0.02: do not believe it",)),
            explanation(codes * 0, label="organ", scale=0.0, score=None, faithfulness=None, blank="there is no score"),
            explanation(
                np.abs(codes), label="", method="attention", score=None, faithfulness=None, health=float("nan")
            ),
        ),
    )


@pytest.fixture(scope="module")
def written(found: Result, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return saliency.write(found, tmp_path_factory.mktemp("case"), Config())


def document(written: list[Path]) -> dict:
    return json.loads(next(path for path in written if path.name == "saliency.json").read_text(encoding="utf-8"))


def test_every_map_is_a_volume_a_picture_and_a_row(written: list[Path]) -> None:
    assert [path.name for path in written] == [
        "saliency-lesion-hirescam.nii.gz", "saliency-lesion-hirescam.png",
        "saliency-lesion-2-hirescam.nii.gz", "saliency-lesion-2-hirescam.png",
        "saliency-organ-hirescam.nii.gz", "saliency-organ-hirescam.png",
        "saliency-attention-down.2.nii.gz", "saliency-attention-down.2.png", "saliency.json",
    ]  # fmt: skip
    rows = document(written)["explanations"]
    named = [name for row in rows for name in (row["file"], row["picture"])]
    assert named == [path.name for path in written[:-1]]


def test_a_volume_holds_codes_times_scale_on_exactly_the_scans_grid(found: Result, written: list[Path]) -> None:
    for path, each in zip(written[::2], found.explanations, strict=False):
        image = nibabel.load(path)
        assert image.get_data_dtype() == np.int8
        np.testing.assert_array_equal(image.dataobj.get_unscaled(), each.codes)
        np.testing.assert_allclose(image.get_fdata(), each.codes * each.scale, rtol=1e-6)
        np.testing.assert_allclose(image.affine, AFFINE, atol=1e-6)
        assert int(image.header["sform_code"]) == 1
        assert files.read(path).geometry.matches(found.scan.geometry)


def test_a_blank_map_is_all_zero_and_its_row_says_why(written: list[Path]) -> None:
    assert not nibabel.load(written[4]).get_fdata().any()
    row = document(written)["explanations"][2]
    assert row["blank"] == "there is no score" and row["standing"] == "blank: there is no score" and row["scale"] == 0


def test_a_map_that_failed_is_shown_as_failed_in_table_and_picture(found: Result, written: list[Path]) -> None:
    passed, failed, blank, _ = document(written)["explanations"]
    assert passed["standing"] == "passed" and passed["failed"] == []
    assert failed["failed"] == ["taking its voxels away is no better than chance"]
    assert failed["standing"].startswith("failed") and failed["warnings"] == ["health 0.02: do not believe it"]
    assert blank["failed"] == [] and blank["faithfulness"] is None
    alarm = [(np.asarray(Image.open(path)) == colour(ALARM)).all(axis=2).sum() for path in written[1:8:2]]
    assert alarm[0] == 0 and alarm[1] > 1000 and alarm[2] > 1000 and alarm[3] == 0


def colour(words: str) -> tuple[int, ...]:
    return tuple(int(words[n : n + 2], 16) for n in (1, 3, 5))


def test_a_map_that_passed_says_so_in_ink_as_large_as_a_failure(written: list[Path]) -> None:
    head = np.asarray(Image.open(written[1]))[24:130, 1000:]
    assert (head == colour(INK)).all(axis=2).sum() > 1000


def test_every_number_and_word_of_a_row_is_explained_beside_it(written: list[Path]) -> None:
    content = document(written)
    words, row = content["words"], content["explanations"][0]
    told = {*row, *row["faithfulness"]} - {"name", "file", "picture", "label", "method", "layer"}
    assert told <= set(words)
    assert {field.name for field in fields(Faithfulness)} <= {*row["faithfulness"], *row}
    assert {field.name for field in fields(Explanation)} - set(row) == {"codes"}
    assert "not for diagnosis" in words["caution"]


def test_what_is_no_number_is_null(written: list[Path]) -> None:
    attention = document(written)["explanations"][3]
    assert attention["health"] is None and attention["score"] is None


def test_the_same_maps_are_written_to_the_same_bytes(found: Result, written: list[Path], tmp_path: Path) -> None:
    for one, other in zip(written, saliency.write(found, tmp_path, Config()), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_two_labels_whose_names_make_one_file_name_keep_both(found: Result, tmp_path: Path) -> None:
    first = found.explanations[0]
    twice = tuple(replace(first, label=name, codes=first.codes * sign) for name, sign in (("a b", 1), ("a/b", -1)))
    paths = saliency.write(replace(found, explanations=twice), tmp_path, Config())
    assert [path.name for path in paths[::2]] == [
        "saliency-a_b-hirescam.nii.gz", "saliency-a_b-hirescam~2.nii.gz", "saliency.json",
    ]  # fmt: skip
    one, other = (nibabel.load(path).get_fdata() for path in (paths[0], paths[2]))
    np.testing.assert_array_equal(one, -other)


def test_a_case_without_explanations_has_a_table_that_is_empty(found: Result, tmp_path: Path) -> None:
    (path,) = saliency.write(replace(found, explanations=()), tmp_path, Config())
    assert json.loads(path.read_text())["explanations"] == []


def test_a_method_that_does_not_exist_is_refused_before_the_first_scan() -> None:
    assert get_args(saliency.Method) == METHODS
    with pytest.raises(BadRecord, match="hirescam"):
        decode(Config, {"method": "hirecam"}, where="output_options.saliency")


def test_what_is_asked_of_this_output_is_what_the_explaining_is_told() -> None:
    asked = decode(Config, {"method": "occlusion", "labels": ["lesion"], "parts": 5}, where="output_options.saliency")
    assert Choice(**{**encode(asked), "labels": tuple(asked.labels)}) == Choice(
        method="occlusion", labels=("lesion",), parts=5
    )
    assert {field.name: field.default for field in fields(Config)} == {
        field.name: field.default for field in fields(Choice)
    }
