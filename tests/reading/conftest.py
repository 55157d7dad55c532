"""Thousands of files are read here: shapes are checked by the tests of each part, and left unchecked to be done in time."""

import os
from collections.abc import Iterator

import jaxtyping
import pytest


@pytest.fixture(scope="module", autouse=True)
def unchecked_shapes() -> Iterator[None]:
    """HILUM_CHECK_SHAPES=1 checks them here too, which takes thrice the time."""
    if os.environ.get("HILUM_CHECK_SHAPES"):
        yield
        return
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
