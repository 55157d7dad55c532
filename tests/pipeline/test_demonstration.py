"""The demo is what a stranger sees first: it must do what it says, from the command line, in a folder of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_demo_finds_unseen_patients_organs_and_lesions_and_the_lesions_of_unseen_slides(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "HILUM_HOME": str(tmp_path / "home")}
    words = [sys.executable, "-m", "pipeline", "demo", "--out", "demo"]
    told = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
    assert told.returncode == 0, told.stderr
    folder = tmp_path / "demo"
    # it trains for minutes, not for steps: alone on two cores 0.9, beside three other tests 0.7
    assert json.loads((folder / "evaluation.json").read_text())["mean_dice"] >= 0.5
    for case in sorted(path.name for path in (folder / "unseen").iterdir()):
        assert (folder / "segmented" / case / "report.json").exists()
        assert case in (folder / "segmented" / "index.html").read_text()
    assert "unseen slides given their class: 4 of 4; the tile that decides lies on a lesion in 2 of 2" in told.stdout
    assert (folder / "slides" / "classified" / "index.html").exists()
    assert str(Path("demo") / "segmented" / "index.html") in told.stdout
    assert not (tmp_path / "home" / "mlflow.db").exists(), "the demo stays inside its folder"
