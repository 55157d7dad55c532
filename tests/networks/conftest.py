"""What tests of several networks need."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked():
    """Without the checks of shapes that the tests put around every function: a compiler cannot see through them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
