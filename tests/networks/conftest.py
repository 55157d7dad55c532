"""What tests of several networks need."""

from collections.abc import Callable
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch


@pytest.fixture
def unchecked():
    """Without the checks of shapes that the tests put around every function: a compiler cannot see through them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def published(shared: Path) -> Callable[[str], dict[str, torch.Tensor]]:
    """Inputs, weights and results of published modules, by the name of the file that holds them."""

    def read(name: str) -> dict[str, torch.Tensor]:
        if not (shared / "fixtures" / name).is_file():
            pytest.skip(f"the numbers of published modules ({name}) are not on this machine")
        with np.load(shared / "fixtures" / name) as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    return read
