"""Labelled tiles become a package that names the class of every tile; no patient teaches and is measured."""

import csv
import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import SlideTraining
from pipeline.errors import UsageError
from pipeline.slides import feature_file
from pipeline.slides.answering import bag_of
from pipeline.slides.feature_file import FeatureFile
from pipeline.slides.package import SlidePackage
from pipeline.slides.tile_answering import answer_tiles
from pipeline.slides.tile_table import LabelledTiles, read_tiles
from pipeline.slides.tile_training import Desk, train_tiles
from tests.pipeline.slides.planted import RECIPE, write_rows

HEAD = ("slide", "patient", "x_um", "y_um", "label")
SIDE = 8
QUICK = dict(
    network="tile_context", network_options={"context": 3, "width": 16, "heads": 4, "layers": 1, "dropout": 0.0},
    folds=2, inner_folds=2, epochs=40, batch=1, learning_rate=1e-2, device="cpu",
)  # fmt: skip


def write_slide(folder: Path, name: str, recipe=RECIPE) -> tuple[FeatureFile, np.ndarray]:
    """A square of tiles, each saying 1 or 0; its class is what most of its four neighbours say, never what it says."""
    rng = np.random.default_rng(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
    says = rng.integers(0, 2, (SIDE, SIDE))
    around = np.pad(2 * says - 1, 1)
    sums = around[:-2, 1:-1] + around[2:, 1:-1] + around[1:-1, :-2] + around[1:-1, 2:]
    features = rng.normal(0, 0.1, (SIDE * SIDE, recipe.dimensions)).astype(np.float16)
    features[:, 0] += 2 * says.ravel() - 1
    grid = np.stack([np.arange(SIDE * SIDE) % SIDE, np.arange(SIDE * SIDE) // SIDE], axis=1)
    (folder / name).mkdir(parents=True)
    file = feature_file.write(
        folder / name / feature_file.FILE_NAME, slide_id=name, slide_sha256=hashlib.sha256(name.encode()).hexdigest(),
        slide_microns_per_pixel=(0.5, 0.5), resolution_from="file", size_um=(1000.0, 1000.0), recipe=recipe,
        features=features, positions_um=grid * recipe.step_um + 40.0, grid=grid,
        tissue=np.ones(SIDE * SIDE, np.float32),
    )  # fmt: skip
    return file, np.sign(sums).ravel()


def write_cohort(folder: Path, patients: int = 6) -> tuple[Path, Path]:
    """Features and a table that names a place inside each tile whose neighbours do not disagree."""
    rows = []
    for patient in range(patients):
        file, classes = write_slide(folder / "features", f"s{patient}")
        rows += [
            (
                f"s{patient}",
                f"p{patient}",
                *(file.positions_um[n] + 30).astype(str),
                "dense" if classes[n] > 0 else "loose",
            )
            for n in np.flatnonzero(classes)
        ]
    return folder / "features", write_rows(folder / "TILES.csv", rows, HEAD)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[SlidePackage, Path, Path]:
    folder = tmp_path_factory.mktemp("tiles")
    features, labels = write_cohort(folder)
    settings = SlideTraining(**QUICK, tracking_uri=f"sqlite:///{folder / 'runs.db'}")
    return train_tiles(features, labels, folder / "package", settings), features, labels


def test_what_only_neighbours_tell_is_learned_and_measured_on_patients_that_taught_nothing(trained) -> None:
    package, _, labels = trained
    record = SlidePackage.load(package.folder).record
    assert record.kind == "tiles" and record.network == "tile_context" and record.classes == ("dense", "loose")
    rows = list(csv.DictReader(labels.read_text().splitlines()))
    assert record.scores.slides == len(rows) and record.scores.patients == 6
    assert sum(record.slides.values()) == len(rows)
    assert record.scores.macro_auroc.value > 0.9
    assert "tile by tile" in (package.folder / "card.md").read_text()


def test_no_patient_teaches_and_is_measured(trained) -> None:
    package, *_ = trained
    splits = list(csv.DictReader((package.folder / "splits.csv").read_text().splitlines()))
    assert {row["outer fold"] for row in splits} == {"0", "1"} and len(splits) == 6
    for member, one in enumerate(package.record.members):
        held = [row for row in splits if row["member"] == str(member)]
        assert one.patients_held_out == len(held) and one.patients_trained == 6 - len(held)
        assert one.slides_held_out == sum(int(row["tiles"]) for row in held)


def test_the_package_names_the_class_of_every_tile_of_a_new_slide(trained, tmp_path) -> None:
    package, *_ = trained
    file, classes = write_slide(tmp_path, "new")
    answered = answer_tiles(package.networks(), package.record.temperature, bag_of(file))
    assert answered.probabilities.shape == (SIDE * SIDE, 2)
    np.testing.assert_allclose(answered.probabilities.sum(1), 1)
    clear = classes != 0
    assert (answered.predicted[clear] == np.where(classes[clear] > 0, 0, 1)).mean() > 0.85


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_a_resumed_training_ends_there_too(trained, tmp_path) -> None:
    package, features, labels = trained
    settings = dict(QUICK, tracking_uri=f"sqlite:///{tmp_path / 'runs.db'}")

    class Killed(Exception):
        pass

    def kill(phase, done, total, words) -> None:
        if words.startswith("member0"):
            raise Killed

    with pytest.raises(Killed):
        train_tiles(features, labels, tmp_path / "again", SlideTraining(**settings), kill)
    begun = []
    again = train_tiles(
        features,
        labels,
        tmp_path / "again",
        SlideTraining(**settings, resume=True),
        lambda *said: begun.append(said[3]),
    )
    assert {words.partition(",")[0] for words in begun} == {"member0", "member1"}
    for one, other in zip(package.networks(), again.networks(), strict=True):
        for name, weight in one.state_dict().items():
            assert torch.equal(weight, other.state_dict()[name])


def test_a_neighbourhood_read_alone_is_answered_as_in_its_slide(trained, tmp_path) -> None:
    package, *_ = trained
    file, _ = write_slide(tmp_path, "new")
    tiles = np.array([0, 9, 63])
    desk = Desk(LabelledTiles(id="new", patient="p", file=file, tiles=tiles, labels=np.zeros(3, np.int64)), 1)
    bags, centres = desk.some(torch.tensor([2, 0]))
    assert len(bags.features) == 8  # two corners, four tiles each
    networks = package.networks()
    whole = answer_tiles(networks, 1.0, bag_of(file)).logits
    np.testing.assert_allclose(answer_tiles(networks, 1.0, bags, centres).logits, whole[[63, 0]], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: [(*rows[0][:4], "loose" if rows[0][4] == "dense" else "dense"), *rows], "two classes"),
        (lambda rows: [(s, p, str(float(x) * 1000), y, c) for s, p, x, y, c in rows], "not in pixels"),
        (lambda rows: [(*rows[0][:2], "left", *rows[0][3:]), *rows], "two numbers"),
        (lambda rows: [(rows[0][0], "somebody", *rows[0][2:]), *rows[1:]], "one patient"),
        (lambda rows: [("s9", *rows[0][1:]), *rows], "slides features"),
        (lambda rows: [row for row in rows if row[1] < "p2"], "fewer than 3 patients"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_with_the_remedy(tmp_path, change, words) -> None:
    features, labels = write_cohort(tmp_path, patients=4)
    rows = [tuple(row) for row in csv.reader(labels.read_text().splitlines())][1:]
    with pytest.raises(UsageError, match=words):
        read_tiles(features, write_rows(tmp_path / "wrong.csv", change(rows), HEAD))


def test_a_table_without_places_is_refused(tmp_path) -> None:
    features, _ = write_cohort(tmp_path, patients=3)
    with pytest.raises(UsageError, match="where its tile lies"):
        read_tiles(features, write_rows(tmp_path / "wrong.csv", [("s0", "p0", "dense")]))


def test_places_without_a_tile_take_no_part_and_are_told_of(tmp_path, caplog) -> None:
    features, labels = write_cohort(tmp_path, patients=3)
    rows = [tuple(row) for row in csv.reader(labels.read_text().splitlines())][1:]
    before = read_tiles(features, labels)
    with caplog.at_level("WARNING"):
        table = read_tiles(features, write_rows(tmp_path / "more.csv", [*rows, ("s0", "p0", "3", "3", "dense")], HEAD))
    assert f"1 of {len(rows) + 1} places" in caplog.text
    assert table.digest == before.digest


def test_tiles_that_overlap_are_refused(tmp_path) -> None:
    for name in ("a", "b", "c"):
        write_slide(tmp_path / "features", name, replace(RECIPE, step_um=56.0))
    rows = [(name, name, "45", str(45 + 56 * n), "ab"[n]) for name in "abc" for n in range(2)]
    with pytest.raises(UsageError, match="overlap"):
        read_tiles(tmp_path / "features", write_rows(tmp_path / "t.csv", rows, HEAD))
