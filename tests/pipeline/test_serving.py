"""A registered package is a model of MLflow's on any machine that has hilum: paths in, a table and label maps out."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest

from pipeline.batch import open_package, segment
from pipeline.config import Segment
from pipeline.errors import UsageError
from pipeline.package import ModelPackage
from pipeline.registry import LOADER, Measured, register
from pipeline.serving import Served, paths
from pipeline.tracking import open_run
from tests.pipeline.servers import REPOSITORY, free_port, serving, stop

pytestmark = pytest.mark.slow  # a server and processes

ELSEWHERE = """
import json, pickle, sys

def refuse(*_, **__):
    raise AssertionError("something was unpickled")

import mlflow
mlflow.set_tracking_uri(sys.argv[1])
before, pickle.load, pickle.loads = (pickle.load, pickle.loads), refuse, refuse
model = mlflow.pyfunc.load_model("models:/liver@best")
pickle.load, pickle.loads = before
scans = json.loads(sys.argv[2])
table = model.predict(scans)
stated = model.predict(scans, {"out": "stated", "outputs": "measurements"})
print(json.dumps([table.to_dict("records"), stated.to_dict("records"), list(stated.columns)]))
"""


@pytest.fixture(scope="module")
def address(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server over http with the package `liver` in it, called the best."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    port = free_port()
    server = serving(uri, port)
    try:
        address = f"http://127.0.0.1:{port}"
        run = open_run(uri=address, experiment="tests", run_name="a run", params={}, tags={})
        best = Measured(dice={"liver": 0.8}, cases=frozenset({"a"}), trainings=(run.run_id,), dataset="ab" * 32)
        register(tiny, "liver", uri=address, run_id=run.run_id, measured=best)
        run.finish("FINISHED")
        yield address
    finally:
        stop(server)


def test_mlflow_loads_and_predicts_on_another_machine_without_a_pickle(
    address: str, tiny: Path, scan_file: Callable[..., Path], tmp_path: Path
) -> None:
    scans = [str(scan_file(tmp_path / "in" / f"{name}.nii.gz", seed)) for seed, name in enumerate(("one", "two"))]
    broken = tmp_path / "in" / "broken.nii.gz"
    broken.write_bytes(Path(scans[0]).read_bytes()[:300])
    machine = tmp_path / "another machine"
    machine.mkdir()
    environment = os.environ | {
        "HILUM_HOME": str(machine / "home"),
        "HOME": str(machine),
        "PYTHONPATH": str(REPOSITORY),
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    words = [sys.executable, "-c", ELSEWHERE, address, json.dumps([*scans, str(broken)])]
    done = subprocess.run(words, cwd=machine, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    table, stated, columns = json.loads(done.stdout.strip().splitlines()[-1].replace("NaN", "null"))
    assert columns == [
        "case",
        "labels",
        "liver ml",
        "lesion ml",
        "liver confidence",
        "lesion confidence",
        "warnings",
        "error",
    ]

    rows = {row["case"]: row for row in table}
    assert set(rows) == {"one", "two", "broken"}
    assert rows["broken"]["error"] and not rows["broken"]["labels"] and not rows["one"]["error"]
    assert rows["one"]["labels"] == str(machine / "segmented" / "one" / "labels.nii.gz")
    assert {row["labels"] for row in stated} == {
        "",
        *(str(machine / "stated" / n / "labels.nii.gz") for n in ("one", "two")),
    }
    assert (machine / "stated" / "one" / "measurements.csv").exists() or list(
        (machine / "stated" / "one").glob("meas*")
    )

    ours = segment([Path(scan) for scan in scans], tiny, tmp_path / "ours", Segment(outputs=("labels",)))
    for row in ours.rows:
        assert row.report is not None
        assert rows[row.case_id]["liver ml"] == pytest.approx(row.report.volumes_ml["liver"])
        theirs, own = (
            nibabel.load(file)
            for file in (rows[row.case_id]["labels"], tmp_path / "ours" / row.case_id / "labels.nii.gz")
        )
        np.testing.assert_array_equal(np.asarray(theirs.dataobj), np.asarray(own.dataobj))


def test_the_same_version_is_a_package_for_segment(address: str, tiny: Path) -> None:
    assert open_package("models:/liver@best", address).id == ModelPackage.load(tiny).id


def test_a_second_call_tells_of_its_own_scans_alone(tiny: Path, scan_file: Callable[..., Path], tmp_path: Path) -> None:
    served = Served(tiny)
    first, second = (scan_file(tmp_path / f"{name}.nii.gz", seed) for seed, name in enumerate("ab"))
    out = {"out": str(tmp_path / "out")}
    assert list(served.predict([first], out)["case"]) == ["a"]
    assert list(served.predict([str(second)], out)["case"]) == ["b"]
    again = served.predict(str(first), out)
    assert list(again["case"]) == ["a"] and again["error"][0] == "" and Path(again["labels"][0]).exists()


def test_paths_come_as_people_and_mlflow_give_them() -> None:
    from pandas import DataFrame

    wanted = [Path("a.nii"), Path("b")]
    for given in (["a.nii", "b"], wanted, np.array(["a.nii", "b"]), DataFrame({"scan": ["a.nii", "b"]})):
        assert paths(given) == wanted
    assert paths("a.nii") == paths(Path("a.nii")) == [Path("a.nii")]
    with pytest.raises(UsageError, match="list of paths"):
        paths([])


def test_the_loader_that_versions_name_is_there() -> None:
    from importlib import import_module

    assert callable(import_module(LOADER)._load_pyfunc)
