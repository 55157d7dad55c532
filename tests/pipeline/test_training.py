"""A training ends in a package and an honest MLflow run, however often it is killed on the way."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline import registry, tracking
from pipeline.batch import open_package, segment
from pipeline.config import Segment, Train
from pipeline.errors import Interrupted, UsageError
from pipeline.fitting import Training, Watch
from pipeline.training import train
from pipeline.workshop import Workshop
from preprocessing import dicom, files
from preprocessing.datasets import DatasetError
from preprocessing.phantoms import CHANNELS, LABELS, body, geometry, scan
from preprocessing.plan import Plan
from tests.pipeline.servers import free_port, serving, stop

EPOCHS = 4
WORDS = {"epochs": EPOCHS, "steps_per_epoch": 3, "network_options": {"width": 4, "blocks": [1, 1]}, "folds": 3}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six small patients in nnU-Net's layout."""
    folder = tmp_path_factory.mktemp("phantoms")
    for seed in range(1, 7):
        image, labels = scan(body(seed), geometry(seed, extent_mm=(98, 78, 40)), seed=seed)
        for number, name in enumerate(CHANNELS):
            one = image.with_voxels(image.voxels[number : number + 1], channels=(name,))
            files.write(one, folder / "imagesTr" / f"p{seed}_{number:04d}.nii.gz")
        files.write(labels, folder / "labelsTr" / f"p{seed}.nii.gz", is_labels=True)
    described = {"name": "few", "channel_names": {"0": "t1", "1": "t2"}, "labels": {"background": 0} | LABELS}
    (folder / "dataset.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for the module: MLflow takes seconds to make one."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, store: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of a training nobody disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "package"
    train(dataset, out, Train(**WORDS, tracking_uri=store, cache=out.parent / "cache"))
    return out


def run_of(package: Path, store: str):
    from mlflow import MlflowClient

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow's own libraries; tracking.py is quiet about them too
        client = MlflowClient(tracking_uri=store)
    return client, client.get_run(open_package(package).record.folds["0"].run_id)


def test_a_training_leaves_a_package_and_nothing_else(undisturbed: Path) -> None:
    assert sorted(path.name for path in undisturbed.iterdir()) == [
        "card.md",
        "package.json",
        "weights-fold0.safetensors",
    ]
    assert not undisturbed.with_name("package.training").exists()
    fold = open_package(undisturbed).record.folds["0"]
    assert (fold.epochs, fold.cases_trained, fold.cases_held_out) == (EPOCHS, 4, 2)
    assert set(fold.dice) <= set(LABELS)


def test_mlflow_holds_curves_pictures_plan_dataset_and_a_registered_package(undisturbed: Path, store: str) -> None:
    client, run = run_of(undisturbed, store)
    assert run.info.status == "FINISHED"
    steps = {
        key: [point.step for point in client.get_metric_history(run.info.run_id, key)]
        for key in ("train/loss", "val/loss", "val/dice_mean")
    }
    assert steps["train/loss"] == list(range(EPOCHS))
    assert {0, EPOCHS - 1} <= set(steps["val/loss"]) and steps["val/loss"] == steps["val/dice_mean"]
    assert {"plan.yaml", "fingerprint.json", "settings.json", "images", "model"} <= {
        f.path for f in client.list_artifacts(run.info.run_id)
    }
    assert [used.dataset.name for used in run.inputs.dataset_inputs] == ["few"]
    assert {"network", "patch", "batch"} <= set(run.data.params) and len(run.data.params) <= 6
    assert run.data.tags["code"] and run.data.tags["dataset"]
    fetched = open_package("models:/few@latest", store)
    assert fetched.id == open_package(undisturbed).id


def artifacts(client, run_id: str, folder: str | None = None) -> set[str]:
    return {entry.path for entry in client.list_artifacts(run_id, folder)}


def test_the_same_cases_are_drawn_at_every_look_and_three_are_pages_at_the_end(undisturbed: Path, store: str) -> None:
    client, run = run_of(undisturbed, store)
    drawn = Counter(
        path.split("+")[0] for path in artifacts(client, run.info.run_id, "images") if path.endswith(".png")
    )
    at_first = {name: drawn[f"images/validation~{name} at first"] for name in ("worst", "best")}
    assert min(at_first.values()) >= 2 and len(set(at_first.values())) == 1
    assert drawn["images/held_out~worst"] == drawn["images/held_out~best"] == 1
    report = {"report/held_out.csv", "report/held_out.html", "report/worst.html", "report/best.html"}  # of two cases
    assert artifacts(client, run.info.run_id, "report") == report
    assert {"card.md", "environment.txt"} <= artifacts(client, run.info.run_id)
    fold = open_package(undisturbed).record.folds["0"]
    for name in ("worst", "best"):
        page = Path(client.download_artifacts(run.info.run_id, f"report/{name}.html")).read_text()
        (key,) = (key for key in fold.held_out.cases if f"<h1>{key}</h1>" in page)
        means = {each: np.mean(list(dice.values())) for each, dice in fold.held_out.cases.items()}
        assert means[key] == {"worst": min, "best": max}[name](means.values())


def test_the_best_version_is_named_and_tells_its_scores(undisturbed: Path, store: str) -> None:
    client, run = run_of(undisturbed, store)
    version = next(v for v in client.search_model_versions("name = 'few'") if v.run_id == run.info.run_id)
    fold = open_package(undisturbed).record.folds["0"]
    assert float(version.tags["dice_mean"]) == pytest.approx(np.mean(list(fold.dice.values())), abs=1e-3)
    assert version.tags["held_out_cases"] == "2" and version.tags["best"]
    assert version.description.startswith("# few")
    assert client.get_registered_model("few").aliases["best"]


def test_no_case_and_no_path_is_named_in_mlflow(undisturbed: Path, store: str, dataset: Path) -> None:
    client, run = run_of(undisturbed, store)
    told = json.dumps(run.to_dictionary(), default=str)
    told += "".join(f.path for f in client.list_artifacts(run.info.run_id, "images"))
    assert str(dataset) not in told
    told += Path(client.download_artifacts(run.info.run_id, "fingerprint.json")).read_text()
    assert not any(f"p{seed}." in told or f'"p{seed}"' in told for seed in range(1, 7))


def test_a_package_from_the_registry_segments(undisturbed: Path, store: str, dataset: Path, tmp_path: Path) -> None:
    scans = [dataset / "imagesTr"]
    batch = segment(scans, "models:/few@latest", tmp_path / "out", Segment(tracking_uri=store, outputs=("labels",)))
    assert [row.status for row in batch.rows] == ["done"] * 6
    assert {row.case_id for row in batch.rows} == {f"p{seed}" for seed in range(1, 7)}


def command(dataset: Path, out: Path, store: str, *more: str) -> list[str]:
    words = [sys.executable, "-m", "pipeline", "train", str(dataset), "--out", str(out), "--tracking_uri", store]
    words += ["--cache", str(out.parent / "cache"), "--network_options", json.dumps(WORDS["network_options"])]
    words += [f"--{name}={WORDS[name]}" for name in ("epochs", "steps_per_epoch", "folds")]
    return [*words, *more]


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    assert path.exists(), f"{path.name} never came; exit code {process.poll()}"


@pytest.mark.slow
def test_killed_twice_and_resumed_a_training_ends_as_if_nothing_had_happened(
    dataset: Path, undisturbed: Path, store: str, tmp_path: Path
) -> None:
    out = tmp_path / "package"
    workshop = tmp_path / "package.training" / "fold0"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}  # as this process
    with subprocess.Popen(command(dataset, out, store), env=environment) as process:
        wait_for(workshop / "job.json", process)  # before the first epoch is complete
        process.kill()
    with subprocess.Popen(command(dataset, out, store, "--resume"), env=environment) as process:
        wait_for(workshop / "last.ckpt", process)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    job = json.loads((workshop / "job.json").read_text())
    assert job["run_id"] in tracking.end_the_dead(store)

    train(dataset, out, Train(**WORDS, tracking_uri=store, cache=out.parent / "cache", resume=True))

    client, run = run_of(out, store)
    assert run.info.run_id == job["run_id"] and run.info.status == "FINISHED" and tracking.ENDED not in run.data.tags
    steps = Counter(point.step for point in client.get_metric_history(run.info.run_id, "train/loss"))
    assert steps == Counter(range(EPOCHS)), "every epoch once"
    assert_equal_to_the_bit(out, undisturbed)


@pytest.mark.slow
def test_killed_while_its_server_is_away_a_training_loses_no_point(dataset: Path, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"  # of its own: what a server began, only a server can go on with
    out, port = tmp_path / "package", free_port()
    words = command(dataset, out, f"http://127.0.0.1:{port}", "--epochs=80", "--keep_seconds=0.2", "--model=away")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    workshop = tmp_path / "package.training" / "fold0"
    server = serving(store, port)
    try:
        with subprocess.Popen(words, env=environment) as process:
            wait_for(workshop / "last.ckpt", process)
            stop(server)
            time.sleep(1)
            wait_for_change(workshop / "last.ckpt", process)
            wait_for_change(workshop / "last.ckpt", process)
            process.kill()
        server = serving(store, port)
        assert json.loads((workshop / "job.json").read_text())["run_id"] in tracking.end_the_dead(store)
        with subprocess.Popen([*words, "--resume"], env=environment) as process:
            wait_for_change(workshop / "last.ckpt", process)
            stop(server)  # and a server that is away for a while
            time.sleep(1)
            server = serving(store, port)
            assert process.wait(300) == 0
    finally:
        stop(server)
    client, run = run_of(out, store)
    steps = Counter(point.step for point in client.get_metric_history(run.info.run_id, "train/loss"))
    assert steps == Counter(range(80)), "every epoch once"
    assert run.info.status == "FINISHED" and client.get_registered_model("away").aliases["best"]


def assert_equal_to_the_bit(package: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / "weights-fold0.safetensors") for folder in (package, other))
    assert ours.keys() == theirs.keys()
    assert not [name for name, weights in theirs.items() if not np.array_equal(ours[name], weights)]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    dataset: Path, undisturbed: Path, store: str, tmp_path: Path
) -> None:
    words = Train(**WORDS, tracking_uri=store, cache=undisturbed.parent / "cache")
    train(dataset, tmp_path / "again", words)
    assert_equal_to_the_bit(tmp_path / "again", undisturbed)
    train(dataset, tmp_path / "other", replace(words, seed=1, epochs=1))
    with pytest.raises(AssertionError):
        assert_equal_to_the_bit(tmp_path / "other", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("average", [0.0, 0.9])
def test_stopped_in_the_middle_of_an_epoch_it_goes_on_at_the_next_step(
    dataset: Path, undisturbed: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, average: float
) -> None:
    plan = open_package(undisturbed).plan
    replace(plan, recipe=replace(plan.recipe, average=average)).write(tmp_path / "plan.yaml")
    words = WORDS | {"epochs": 2, "plan": tmp_path / "plan.yaml", "keep_seconds": 1e-6}
    settings = Train(**words, tracking_uri=store, cache=undisturbed.parent / "cache")
    train(dataset, tmp_path / "whole", settings)
    steps = []

    def stopped(_: object, module: Training) -> None:
        steps.append(module.global_step)
        if module.global_step == 5:
            raise Interrupted("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(Watch, "_tell", stopped)
        with pytest.raises(Interrupted):
            train(dataset, tmp_path / "broken", settings)
        with pytest.raises(Interrupted):
            train(dataset, tmp_path / "broken", replace(settings, resume=True))
    assert steps == [1, 2, 3, 4, 5, 5], "the fifth was not kept yet: it is done again, and none before it"
    train(dataset, tmp_path / "broken", replace(settings, resume=True))
    assert_equal_to_the_bit(tmp_path / "broken", tmp_path / "whole")


def test_a_loss_that_is_not_finite_is_told_and_never_kept(
    dataset: Path, undisturbed: Path, store: str, tmp_path: Path
) -> None:
    settings = Train(**WORDS, tracking_uri=store, cache=undisturbed.parent / "cache", learning_rate=1e30)
    with pytest.raises(UsageError, match="Lower the"):
        train(dataset, tmp_path / "package", settings)


@pytest.mark.slow
def test_killed_at_many_random_moments_a_training_ends_as_if_nothing_had_happened(
    dataset: Path, store: str, tmp_path: Path
) -> None:
    """On two threads, whose sums must not depend on which of them comes first."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "2"}
    longer = ("--epochs=120", "--keep_seconds=0.2")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(command(dataset, whole, store, *longer), env=environment, check=True)
    rng = np.random.default_rng(20261121)
    kills = 0
    workshop = tmp_path / "broken.training" / "fold0"
    most = 20 if os.environ.get("HILUM_LONG") else 5
    while kills < most:
        resumed = ("--resume",) if (workshop / "job.json").exists() else ()
        with subprocess.Popen(command(dataset, broken, store, *longer, *resumed), env=environment) as process:
            if kills % 4:  # a quarter of the times while it still prepares, else some steps after it goes on
                wait_for_change(workshop / "last.ckpt", process)
            try:
                process.wait(rng.uniform(0.2, 4.0) if kills % 4 == 0 else rng.uniform(0, 0.5))
                break
            except subprocess.TimeoutExpired:
                process.kill()
        kills += 1
    assert kills >= most - 2, "it must be killed often to say anything"
    if not broken.exists():
        subprocess.run(command(dataset, broken, store, *longer, "--resume"), env=environment, check=True)
    assert_equal_to_the_bit(broken, whole)
    client, run = run_of(broken, store)
    steps = Counter(point.step for point in client.get_metric_history(run.info.run_id, "train/loss"))
    assert steps == Counter(range(120)), "every epoch once"


def wait_for_change(path: Path, process: subprocess.Popen, seconds: float = 60) -> None:
    before = path.stat().st_mtime_ns if path.exists() else 0
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        if path.exists() and path.stat().st_mtime_ns != before:
            return
        time.sleep(0.01)


@pytest.mark.slow
def test_two_processes_learn_as_one_with_twice_the_batch_and_so_do_two_tasks_of_slurm(
    dataset: Path, undisturbed: Path, store: str, tmp_path: Path
) -> None:
    plan = open_package(undisturbed).plan
    replace(plan, batch=2).write(tmp_path / "two.yaml")
    replace(plan, batch=4).write(tmp_path / "four.yaml")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}

    def words(name: str, plan_file: str, devices: int) -> list[str]:
        more = (f"--plan={tmp_path / plan_file}", f"--devices={devices}", "--device=cpu")
        return command(dataset, tmp_path / name, store, *more)

    subprocess.run(words("alone", "four.yaml", 1), env=environment, check=True)
    subprocess.run(words("pair", "two.yaml", 2), env=environment, check=True)
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
             "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1"}  # fmt: skip
    tasks = [
        subprocess.Popen(
            words("slurm", "two.yaml", 2),
            env=environment | slurm | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)},
        )
        for number in (1, 0)  # whoever comes first waits
    ]
    assert [task.wait(300) for task in tasks] == [0, 0]
    assert_equal_to_the_bit(tmp_path / "slurm", tmp_path / "pair")

    curves = [curve(tmp_path / name, store) for name in ("alone", "pair", "slurm")]
    assert curves[1] == curves[2] and len(curves[0]) == EPOCHS
    assert np.allclose(curves[0], curves[1], rtol=2e-3)
    one, other = (load_file(tmp_path / name / "weights-fold0.safetensors") for name in ("pair", "alone"))
    assert all(np.allclose(one[key], other[key], atol=5e-3) for key in one)


def curve(package: Path, store: str) -> list[float]:
    client, run = run_of(package, store)
    history = client.get_metric_history(run.info.run_id, "train/loss")
    return [point.value for point in sorted(history, key=lambda point: point.step)]


def test_stopped_between_package_and_registry_a_training_only_registers(
    dataset: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = WORDS | {"epochs": 1}
    settings = Train(**words, tracking_uri=store, cache=tmp_path / "cache", model="late", resume=True)

    def stopped(*_: object, **__: object) -> str:
        raise Interrupted("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(registry, "register", stopped)
        with pytest.raises(Interrupted):
            train(dataset, tmp_path / "package", settings)
    made = open_package(tmp_path / "package")
    assert train(dataset, tmp_path / "package", settings).id == made.id
    assert open_package("models:/late@latest", store).id == made.id
    assert run_of(tmp_path / "package", store)[1].info.status == "FINISHED"
    assert not (tmp_path / "package.training").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_stopped_training_says_so_and_keeps_what_it_needs_to_go_on(
    dataset: Path, store: str, tmp_path: Path, number: signal.Signals
) -> None:
    from mlflow import MlflowClient

    out = tmp_path / "package"
    workshop = Workshop(folder=tmp_path / "package.training" / "fold0")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    words = [*command(dataset, out, store), "--experiment", "stopped"]
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as process:
        wait_for(workshop.folder / "last.ckpt", process)
        process.send_signal(number)
        assert process.wait(60) == 130
        assert process.stderr is not None and "Traceback" not in process.stderr.read()
    run_id = workshop.resumed_job().run_id
    assert MlflowClient(tracking_uri=store).get_run(run_id).info.status == "KILLED"
    assert workshop.checkpoint is not None and not out.exists()


def test_an_unfinished_training_is_not_thrown_away_unasked(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "package.training" / "fold0").mkdir(parents=True)
    (tmp_path / "package.training" / "fold0" / "job.json").write_text("{}")
    with pytest.raises(UsageError, match="--resume"):
        train(dataset, tmp_path / "package", Train(**WORDS))


def test_a_finished_fold_is_not_trained_over(dataset: Path, undisturbed: Path) -> None:
    with pytest.raises(UsageError, match="already holds fold 0"):
        train(dataset, undisturbed, Train(**WORDS))


def test_a_second_fold_joins_the_package_and_follows_its_plan(
    dataset: Path, undisturbed: Path, store: str, tmp_path: Path
) -> None:
    out = tmp_path / "package"
    shutil.copytree(undisturbed, out)
    words = {name: value for name, value in WORDS.items() if name != "network_options"} | {"epochs": 1}
    before = open_package(out)
    package = train(dataset, out, Train(**words, fold=1, tracking_uri=store, cache=tmp_path / "cache"))
    assert sorted(package.record.folds) == ["0", "1"] and package.plan == before.plan
    assert len(package.networks()) == 2 and package.id != before.id

    client, first = run_of(out, store)
    above = client.get_run(first.data.tags["mlflow.parentRunId"])
    second = client.get_run(package.record.folds["1"].run_id)
    assert second.data.tags["mlflow.parentRunId"] == above.info.run_id and above.info.status == "FINISHED"
    every = registry.Measured.of(package.record)
    assert above.data.metrics["cv/dice_mean"] == pytest.approx(every.mean) and len(every.cases) == 4
    assert artifacts(client, above.info.run_id, "report") == {"report/held_out.html"}


def test_a_training_on_every_case_joins_the_folds(dataset: Path, undisturbed: Path, store: str, tmp_path: Path) -> None:
    out = tmp_path / "package"
    shutil.copytree(undisturbed, out)
    words = {name: value for name, value in WORDS.items() if name != "network_options"} | {"epochs": 1}
    package = train(dataset, out, Train(**words, fold="all", tracking_uri=store, cache=tmp_path / "cache"))
    fold = package.record.folds["all"]
    assert (fold.cases_trained, fold.cases_held_out, fold.dice) == (6, 0, {})
    assert (out / "weights-all.safetensors").exists() and len(package.networks()) == 2


CANARY = "Zwetschgenkuchen"


@pytest.fixture
def named(dataset: Path, tmp_path: Path) -> Path:
    """The same patients, named in every place that has room for a name: folders, files, DICOM and NIfTI headers."""
    import nibabel
    import pydicom

    root = tmp_path / f"{CANARY}-1"
    rows = ["id,labels,t1,t2,patient"]
    for seed in range(1, 5):
        case = f"{CANARY}-2-{seed}"
        for number, name in enumerate(CHANNELS):
            image = files.read(dataset / "imagesTr" / f"p{seed}_{number:04d}.nii.gz")
            series = dicom.write_series(image, root / case / name, description=f"{CANARY}-3", study=case)
            for path in series:
                header = pydicom.dcmread(path)
                header.PatientName, header.PatientID, header.AccessionNumber = (
                    f"{CANARY}-4^A",
                    f"{CANARY}-5",
                    CANARY[:16],
                )
                header.InstitutionName, header.ReferringPhysicianName = f"{CANARY}-6", f"{CANARY}-7"
                header.PatientComments, header.PatientBirthDate = f"{CANARY}-8", "19330131"
                header.save_as(path)
        (read,), _ = dicom.series_in(sorted((root / case / CHANNELS[0]).iterdir()))
        grid, drawn = dicom.read(read).geometry, files.read(dataset / "labelsTr" / f"p{seed}.nii.gz")
        # DICOM knows right-handed grids only: the slices of another come back in the opposite order
        voxels = drawn.voxels[0] if grid.matches(drawn.geometry) else drawn.voxels[0, :, :, ::-1]
        labels = nibabel.Nifti1Image(np.ascontiguousarray(voxels).astype(np.uint8), grid.affine)
        labels.header["descrip"] = f"{CANARY}-9".encode()
        nibabel.save(labels, root / f"{case}-labels.nii.gz")
        rows.append(f"{case},{case}-labels.nii.gz,{case}/t1,{case}/t2,{CANARY}-10-{seed}")
    (root / "few.csv").write_text("\n".join(rows))
    return root / "few.csv"


def test_nothing_in_mlflow_tells_who_a_patient_is(named: Path, tmp_path: Path) -> None:
    store = tmp_path / "store" / "mlflow.db"
    words = WORDS | {"epochs": 1, "folds": 2, "cache": tmp_path / "cache", "tracking_uri": f"sqlite:///{store}"}
    train(named, tmp_path / f"{CANARY}-out" / "package", Train(**words))
    stored = [path for path in store.parent.rglob("*") if path.is_file()]
    assert len([path for path in stored if path.name == "worst.html"]) == 1
    hidden = (CANARY.encode(), CANARY.encode("utf-16-le"), b"19330131")
    for path in stored:
        assert CANARY not in str(path.relative_to(store.parent))
        for content in unpacked(path.read_bytes()):
            assert not any(word.lower() in content.lower() for word in hidden), path.name


def unpacked(content: bytes) -> Iterator[bytes]:
    """A file, and what is packed into it as base64 or gzip, to any depth."""
    yield content
    if content[:2] == b"\x1f\x8b":
        yield from unpacked(zlib.decompress(content, wbits=31))
    for found in re.finditer(rb"[A-Za-z0-9+/]{200,}={0,2}", content):
        with suppress(ValueError):
            yield from unpacked(base64.b64decode(found[0], validate=True))


def test_a_dataset_that_does_not_fit_is_refused_even_with_a_plan(
    dataset: Path, undisturbed: Path, tmp_path: Path
) -> None:
    spoilt = tmp_path / "spoilt"
    shutil.copytree(dataset, spoilt)
    (spoilt / "labelsTr" / "p3.nii.gz").unlink()
    plan = tmp_path / "plan.yaml"
    open_package(undisturbed).plan.write(plan)
    with pytest.raises(DatasetError, match="p3"):
        train(spoilt, tmp_path / "package", Train(**WORDS, plan=plan))


def test_a_plan_for_other_labels_is_refused(dataset: Path, undisturbed: Path, tmp_path: Path) -> None:
    plan: Plan = open_package(undisturbed).plan
    replace(plan, labels=plan.labels[:2]).write(tmp_path / "plan.yaml")
    with pytest.raises(UsageError, match="hilum plan"):
        train(dataset, tmp_path / "package", Train(**WORDS, plan=tmp_path / "plan.yaml"))


def test_a_store_that_cannot_be_used_is_told_before_an_hour_is_spent(dataset: Path, tmp_path: Path) -> None:
    settings = Train(**WORDS, tracking_uri="http://127.0.0.1:9", cache=tmp_path / "cache")
    with pytest.raises(tracking.TrackingError):
        train(dataset, tmp_path / "package", settings)


def test_a_resumed_training_reads_its_scans_as_it_began(dataset: Path, tmp_path: Path) -> None:
    words = WORDS | {"tracking_uri": "http://127.0.0.1:9", "cache": tmp_path / "cache"}
    with pytest.raises(tracking.TrackingError):
        train(dataset, tmp_path / "package", Train(**words, allow=("nan", "tilt")))
    with pytest.raises(UsageError, match="reading"):
        train(dataset, tmp_path / "package", Train(**words, resume=True))
    with pytest.raises(tracking.TrackingError):
        train(dataset, tmp_path / "package", Train(**words, resume=True, allow=("tilt", "nan")))
