"""A hospital's store is a Postgres: the same runs, and nobody reads its password."""

import importlib.util
import logging
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipeline.registry import fetch, register
from pipeline.tracking import TrackingError, end_the_dead, newest_page, open_run
from tests.pipeline.servers import free_port, serving, stop

INITDB = shutil.which("initdb") or next(map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
PASSWORD = "gruenkohl%40pinkel"
"""As an address spells gruenkohl@pinkel."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(INITDB is None, reason="no Postgres on this machine (apt install postgresql)"),
    pytest.mark.skipif(
        importlib.util.find_spec("psycopg2") is None, reason="psycopg2 is not installed (pip install psycopg2-binary)"
    ),
]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A Postgres of our own on loopback."""

    folder: Path
    port: int
    user: tuple[str, ...]
    """Words before each command: Postgres refuses to run as root."""

    @property
    def uri(self) -> str:
        return f"postgresql+psycopg2://hilum:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    def run(self, program: str, *words: str) -> None:
        assert INITDB is not None
        path = str(Path(INITDB).with_name(program))
        done = subprocess.run([*self.user, path, *words], capture_output=True, text=True, cwd=self.folder, check=False)
        assert done.returncode == 0, done.stderr

    def start(self) -> None:
        settings = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        log = str(self.folder / "log")
        self.run("pg_ctl", "start", "-w", "-D", str(self.folder / "data"), "-l", log, "-o", settings)

    def stop(self) -> None:
        self.run("pg_ctl", "stop", "-m", "immediate", "-D", str(self.folder / "data"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="hilum-postgres-"))
    (folder / "password").write_text(PASSWORD.replace("%40", "@"))
    user: tuple[str, ...] = ()
    if os.geteuid() == 0:
        user = ("runuser", "-u", "postgres", "--")
        for path in (folder, folder / "password"):
            os.chown(path, pwd.getpwnam("postgres").pw_uid, -1)
    made = Cluster(folder=folder, port=free_port(), user=user)
    words = ("-U", "hilum", "-A", "scram-sha-256", "--pwfile", str(folder / "password"), "--no-sync")
    made.run("initdb", "-D", str(folder / "data"), *words)
    made.start()
    try:
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_run_survives_a_restart_of_its_postgres(cluster: Cluster, tmp_path: Path, caplog) -> None:
    run = open_run(uri=cluster.uri, experiment="tests", run_name="a run", params={"network": "x"}, tags={})
    run.metrics({"train/loss": 0.0}, 0)
    assert run.flush()
    with caplog.at_level(logging.WARNING, logger="pipeline.tracking"):
        cluster.stop()
        run.metrics({"train/loss": 1.0}, 1)
        assert not run.flush()
        run.picture("case", np.zeros((16, 16, 3), np.uint8), 1)
    cluster.start()
    assert "gruenkohl" not in caplog.text and "127.0.0.1" in caplog.text
    assert run.settle(60)
    history = run._client.get_metric_history(run.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in history) == [(0, 0.0), (1, 1.0)]
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "package.json").write_text("{}")
    note = "word " * 2000  # more than a column of Postgres holds
    register(tmp_path / "package", "served", uri=cluster.uri, run_id=run.run_id, aliases=("best",), note=note)
    assert (fetch("models:/served@best", tmp_path / "cache", cluster.uri) / "package.json").read_text() == "{}"
    assert end_the_dead(cluster.uri) == []
    run.finish("FINISHED")


def test_nobody_reads_the_password(cluster: Cluster, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        server = serving(cluster.uri, port := free_port(), log=log)
    try:
        run = open_run(uri=f"http://127.0.0.1:{port}", experiment="served", run_name="a run", params={}, tags={})
        run.finish("FINISHED")
        listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        assert "gruenkohl" not in listed and "gruenkohl" not in (tmp_path / "log").read_text()
    finally:
        stop(server)
    wrong = cluster.uri.replace("pinkel", "rollmops")
    with pytest.raises(TrackingError) as refused:
        newest_page(wrong)
    assert "gruenkohl" not in str(refused.value) and "authentication failed" in str(refused.value)
