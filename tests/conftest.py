"""What every test stands on: shapes checked, memory poisoned, phantoms with known answers."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# pipeline, networks, preprocessing only: under the hook a triton kernel cannot compile
install_import_hook(
    ["pipeline", "networks", "preprocessing"], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real scans beside the repository. Not part of hilum: a user's machine has none, and the tests skip."""
    folder = Path(os.environ.get("HILUM_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip("the folder of real scans (../shared/data, or HILUM_SHARED) is not on this machine")
    return folder


@pytest.fixture(autouse=True)
def home_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes into the user's own store of runs."""
    monkeypatch.setenv("HILUM_HOME", str(tmp_path_factory.getbasetemp() / "hilum-home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
