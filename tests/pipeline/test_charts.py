"""A chart holds every value it is given, at round numbers, and names are text in it."""

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.charts import LEFT, MOST_DOTS, WIDTH, axis, strips, whiskers


@settings(deadline=None)
@example([0.0, 1e-9])
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_every_value_lies_on_the_axis(values: list[float]) -> None:
    along = axis(values)
    assert all(before < after for before, after in pairwise(along.ticks)) and 2 <= len(along.ticks) <= 12
    assert all(LEFT - 0.1 <= along.at(value) <= WIDTH + 0.1 for value in values)


@pytest.mark.parametrize("values", [[1.0], [0.0], [0.0, 0.0]])
def test_values_that_are_all_the_same_have_an_axis_too(values: list[float]) -> None:
    assert axis(values, high=1.0).high == 1 and axis(values, low=0.0).low == 0


def test_a_case_is_a_dot_with_its_name() -> None:
    rows = {"<liver>": {"a<b": 0.5, "c": 0.9}, "rare": {}}
    drawn = strips(rows, axis([0.5, 0.9], high=1.0), "Dice")
    assert (
        drawn.count("<circle") == 2 and "a&lt;b: 0.5" in drawn and "&lt;liver&gt;" in drawn and "<liver>" not in drawn
    )


def test_of_very_many_cases_only_the_odd_ones_are_dots() -> None:
    values = {str(n): 0.8 + 0.001 * (n % 10) for n in range(MOST_DOTS)} | {"odd": 0.1}
    assert strips({"liver": values}, axis([0.1, 1.0]), "Dice").count("<circle") == 1


def test_a_mean_without_an_interval_is_a_point() -> None:
    drawn = whiskers({"one": (0.5, (0.4, 0.6)), "two": (0.7, None)}, axis([0.4, 0.7]), "Dice")
    assert drawn.count("<circle") == 2 and drawn.count('class="sure"') == 1
