"""What a validator that nobody here wrote has against our objects."""

import shutil
import subprocess
from pathlib import Path

import pytest


def errors_in(path: Path) -> list[str]:
    """What David Clunie's validator has against the object."""
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy (Debian: dicom3tools) is not on this machine")
    said = subprocess.run(["dciodvfy", path], capture_output=True, text=True, errors="replace").stderr
    return [line for line in said.splitlines() if line.startswith("Error")]
