"""What is reported was never chosen by; a killed training goes on; MLflow knows every figure and nobody's name."""

import csv
import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from networks import UnknownNetwork
from pipeline.config import SlideTraining
from pipeline.errors import Interrupted, UsageError
from pipeline.slides import sheet
from pipeline.slides.answering import answer, bag_of
from pipeline.slides.package import SlidePackage
from pipeline.slides.training import train_slides
from pipeline.tracking import connect
from preprocessing.records import BadRecord
from tests.pipeline.slides.planted import write_cohort, write_rows, write_slide

HIDDEN = "anna-b-"
"""Every slide's and patient's name begins so: it must be found in no store of runs."""


def settings(store: Path, **more) -> SlideTraining:
    quick = {
        "network": "abmil",
        "folds": 3,
        "inner_folds": 2,
        "epochs": 8,
        "batch": 2,
        "learning_rate": 1e-2,
        "device": "cpu",
    }
    return SlideTraining(**(quick | {"tracking_uri": f"sqlite:///{store / 'runs.db'}"} | more))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Twelve patients with two slides each. Nobody writes into it."""
    return write_cohort(tmp_path_factory.mktemp("cohort"), patients=12, slides_each=2, before=HIDDEN)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of runs that all trainings here share: to make one takes seconds."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def trained(cohort, store: Path, tmp_path_factory: pytest.TempPathFactory) -> SlidePackage:
    """A package of that cohort. Nobody writes into it."""
    return train_slides(*cohort, tmp_path_factory.mktemp("packages") / "planted", settings(store))


def rows(package: SlidePackage, name: str) -> list[dict[str, str]]:
    with (package.folder / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def until(part: str, then: BaseException) -> Callable[..., None]:
    """A progress that is cut short when the training comes to that part."""

    def progress(stage: str, done: float, of: float, note: str = "") -> None:
        assert 0 < done <= of
        if note.startswith(part):
            raise then

    return progress


def test_what_was_planted_is_found_in_slides_of_patients_nobody_had_seen(trained, tmp_path: Path):
    assert trained.record.scores.macro_auroc.value > 0.9 and trained.record.scores.slides == 24
    networks, said = trained.networks(), {}
    for name, planted in (("new-without", ()), ("new-with", range(3))):
        bag = bag_of(write_slide(tmp_path, name, planted))
        said[name] = answer(networks, trained.record.temperature, bag)
    assert said["new-with"].probabilities[1] > 0.5 and said["new-with"].predicted == 1
    assert said["new-with"].probabilities[1] > said["new-without"].probabilities[1]
    for_tumour = said["new-with"].shares[:, 1]
    assert for_tumour[:3].mean() > 3 * for_tumour[3:].mean(), "and where it was planted"


def test_every_slide_is_measured_once_with_its_patient_on_one_side_and_the_table_says_so(trained):
    splits, said = rows(trained, "splits.csv"), rows(trained, "predictions.csv")
    assert len(splits) == len(said) == 24
    for row in splits:
        mates = [other for other in splits if other["patient"] == row["patient"]]
        for column in ("outer fold", "member", *(f"inner part in fold {n}" for n in range(3))):
            assert len({other[column] for other in mates}) == 1, "a patient's slides go together"
        assert [row[f"inner part in fold {n}"] == "" for n in range(3)] == [
            str(n) == row["outer fold"] for n in range(3)
        ]
    assert [(row["slide"], row["outer fold"]) for row in said] == [(row["slide"], row["outer fold"]) for row in splits]


def test_the_scores_that_are_told_follow_from_the_table_of_predictions(trained):
    said = rows(trained, "predictions.csv")
    won = pairs = 0.0
    for one in (row for row in said if row["label"] == "tumour"):
        for other in (row for row in said if row["label"] == "normal" and row["outer fold"] == one["outer fold"]):
            mine, theirs = float(one["probability tumour"]), float(other["probability tumour"])
            won += (mine > theirs) + 0.5 * (mine == theirs)
            pairs += 1
    scores = trained.record.scores
    assert scores.macro_auroc.value == pytest.approx(won / pairs, abs=1e-6)
    recall = [
        np.mean([row["decided"] == name for row in said if row["label"] == name]) for name in trained.record.classes
    ]
    assert scores.macro_balanced_accuracy.value == pytest.approx(np.mean(recall), abs=1e-6)
    for row in said:
        logits = np.array([float(row[f"logit {name}"]) for name in trained.record.classes])
        powers = np.exp(logits / trained.record.temperatures[int(row["outer fold"])])
        assert float(row["probability tumour"]) == pytest.approx(powers[1] / powers.sum(), abs=1e-5)


def test_the_package_says_what_it_was_made_of(trained):
    record = trained.record
    assert record.network == "mil_abmil" and (record.folds, record.inner_folds) == (3, 2)
    assert record.slides == {"normal": 12, "tumour": 12} and record.patients == {"normal": 6, "tumour": 6}
    assert [(m.slides_trained, m.patients_trained, m.patients_held_out, m.epochs) for m in record.members] == [
        (12, 6, 6, 8)
    ] * 2
    assert record.training["seed"] == 0 and len({member.seed for member in record.members}) == 2
    assert sorted(path.name for path in trained.folder.iterdir()) == [
        "card.md", "package.json", "predictions.csv", "splits.csv", "weights-member0.safetensors", "weights-member1.safetensors",
    ]  # fmt: skip
    assert not trained.folder.with_name("planted.training").exists()


def test_mlflow_has_a_run_above_one_for_each_outer_fold_with_curves_scores_and_pictures(trained, store):
    client = connect(f"sqlite:///{store / 'runs.db'}")
    above = client.get_run(trained.record.run_id)
    experiment = above.info.experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert set(runs) == {"mil_abmil, nested", "fold 0", "fold 1", "fold 2", "members"}
    for name in ("fold 0", "fold 1", "fold 2", "members"):
        assert runs[name].data.tags["mlflow.parentRunId"] == above.info.run_id
        assert runs[name].info.status == "FINISHED"
    assert above.data.metrics["nested/macro_auroc"] == trained.record.scores.macro_auroc.value
    assert "nested/macro_f1_low" in above.data.metrics and "temperature" in runs["fold 1"].data.metrics
    curve = client.get_metric_history(runs["fold 2"].info.run_id, "inner1/held_out_loss")
    assert [point.step for point in curve] == list(range(8))
    files = {file.path for file in client.list_artifacts(above.info.run_id)}
    assert {"card.md", "report", "images", "settings.json"} <= files
    assert above.data.tags["mlflow.note.content"].startswith("# planted")
    assert above.inputs.dataset_inputs[0].dataset.digest == trained.record.dataset[:12]


def test_no_slide_and_no_patient_is_named_in_the_store_of_runs_or_on_the_card(trained, store):
    files = [path for path in store.rglob("*") if path.is_file()]
    assert any(path.suffix == ".html" for path in files)
    assert [path.name for path in files if HIDDEN.encode() in path.read_bytes()] == []
    assert HIDDEN not in (trained.folder / "card.md").read_text()
    assert HIDDEN in (trained.folder / "predictions.csv").read_text()


def test_slides_of_an_outer_fold_have_no_part_in_what_measures_them(cohort, trained, store, tmp_path: Path):
    features, labels = cohort
    measured = {row["slide"] for row in rows(trained, "splits.csv") if row["outer fold"] == "0"}
    changed = Path(shutil.copytree(features, tmp_path / "features"))
    for slide in measured:
        shutil.rmtree(changed / slide)
        write_slide(changed, slide, range(9), tiles=30)
    weights, told = [], []
    client = connect(f"sqlite:///{store / 'runs.db'}")
    for name, folder in (("one", features), ("other", changed)):
        with pytest.raises(Interrupted):
            train_slides(folder, labels, tmp_path / name, settings(store), until("fold1", Interrupted("enough")))
        workshop = tmp_path / f"{name}.training"
        weights.append({path.name: path.read_bytes() for path in workshop.glob("fold0-inner*.safetensors")})
        told.append(client.get_run(job(workshop)["runs"]["fold 0"]).data.metrics)
    assert len(weights[0]) == 2 and weights[0] == weights[1]
    assert told[0]["temperature"] == told[1]["temperature"] and told[0]["outer/nll"] != told[1]["outer/nll"]


def test_a_killed_training_goes_on_from_its_finished_networks_to_the_same_weights(
    cohort, trained, store, tmp_path: Path
):
    out, workshop = tmp_path / "planted", tmp_path / "planted.training"
    with pytest.raises(Interrupted):
        train_slides(*cohort, out, settings(store), until("fold1-inner1", Interrupted("SIGTERM")))
    kept = {path: path.stat().st_mtime_ns for path in workshop.glob("*.safetensors")}
    assert len(kept) == 3 and not out.exists()
    client = connect(f"sqlite:///{store / 'runs.db'}")
    (run_id,) = [run for part, run in job(workshop)["runs"].items() if part == "nested"]
    assert client.get_run(run_id).info.status == "KILLED"
    with pytest.raises(UsageError, match="--resume"):
        train_slides(*cohort, out, settings(store))
    with pytest.raises(UsageError, match="epochs"):
        train_slides(*cohort, out, settings(store, resume=True, epochs=7))
    with pytest.raises(Interrupted):
        train_slides(*cohort, out, settings(store, resume=True), until("member0, epoch 2", Interrupted("SIGTERM")))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "nothing finished is trained again"
    package = train_slides(*cohort, out, settings(store, resume=True))
    for name in ("weights-member0.safetensors", "weights-member1.safetensors", "predictions.csv", "splits.csv"):
        assert package.record.files[name] == trained.record.files[name]
    assert package.record.run_id == run_id and client.get_run(run_id).info.status == "FINISHED"
    curve = client.get_metric_history(package_run(client, run_id, "members"), "member0/loss")
    assert [point.step for point in curve] == list(range(8)), "no point is told twice"
    assert not workshop.exists()


def job(workshop: Path) -> dict:
    return json.loads((workshop / "job.json").read_text())


def package_run(client, parent: str, name: str) -> str:
    experiment = client.get_run(parent).info.experiment_id
    return next(
        run.info.run_id
        for run in client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
        if run.info.run_name == name
    )


def test_a_training_killed_when_all_but_telling_was_done_keeps_its_package(cohort, store, tmp_path, monkeypatch):
    out, quick = tmp_path / "late", {"epochs": 1, "folds": 2}

    def killed(*_) -> str:
        raise Interrupted("SIGTERM")

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(sheet, "page", killed)
        train_slides(*cohort, out, settings(store, **quick))
    before = SlidePackage.load(out)
    after = train_slides(*cohort, out, settings(store, resume=True, **quick))
    assert after == before and not out.with_name("late.training").exists()
    client = connect(f"sqlite:///{store / 'runs.db'}")
    assert "report" in {file.path for file in client.list_artifacts(after.record.run_id)}


def test_a_resumed_training_of_other_labels_is_refused(cohort, store, tmp_path: Path):
    features, labels = cohort
    out = tmp_path / "mine"
    with pytest.raises(Interrupted):
        train_slides(features, labels, out, settings(store), until("fold0-inner0, epoch 1", Interrupted("SIGTERM")))
    mine = list(csv.reader(labels.read_text().splitlines()))[1:-2]
    with pytest.raises(UsageError, match="other slides, features or labels"):
        train_slides(features, write_rows(tmp_path / "fewer.csv", mine), out, settings(store, resume=True))


def test_shuffled_labels_are_told_from_chance_by_nothing(store, tmp_path: Path):
    features, labels = write_cohort(tmp_path, patients=30)
    table = list(csv.reader(labels.read_text().splitlines()))[1:]
    names = [label for *_, label in table]
    random.Random(5).shuffle(names)
    shuffled = write_rows(tmp_path / "shuffled.csv", [(*row[:2], name) for row, name in zip(table, names, strict=True)])
    found = train_slides(features, shuffled, tmp_path / "chance", settings(store, epochs=3)).record.scores.macro_auroc
    assert found.value == pytest.approx(0.5, abs=0.2) and found.interval[0] < 0.5 < found.interval[1]


def test_mistakes_are_told_before_anything_is_written(cohort, store, tmp_path: Path):
    for wrong, error, words in (
        ({"network": "acmill"}, UnknownNetwork, "mil_acmil"),
        ({"network_options": {"breadth": 3}}, BadRecord, "breadth"),
        ({"network_options": {"width": -1}}, UsageError, "width"),
        ({"network_options": {"faithful": True, "hidden": 0}}, UsageError, "hidden"),
        ({"device": "abacus"}, UsageError, "cpu"),
        ({"network": "tile_context"}, UsageError, "x_um"),
        ({"patient_column": "nobody"}, UsageError, "--patient_column"),
    ):
        with pytest.raises(error, match=words):
            train_slides(*cohort, tmp_path / "out", settings(store, **wrong))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "thesis.txt").write_text("do not lose")
    with pytest.raises(UsageError, match="--out"):
        train_slides(*cohort, tmp_path, settings(store))


def test_no_slide_is_named_in_the_log(cohort, store, tmp_path: Path, caplog):
    with caplog.at_level(logging.INFO), pytest.raises(Interrupted):
        train_slides(*cohort, tmp_path / "out", settings(store), until("fold0-inner1", Interrupted("SIGTERM")))
    assert "fold0-inner0: epoch" in caplog.text and HIDDEN not in caplog.text
