"""A plan says what is done to a scan; it is written, read, edited, and refused where it cannot be followed."""

from dataclasses import replace

import numpy as np
import pytest

from preprocessing.plan import Label, Plan, with_patch
from preprocessing.records import BadRecord
from preprocessing.rules import make_plan
from preprocessing.steps import Pad
from tests.preprocessing.made_up import LAPTOP, LIVER, a_dataset, facts


def test_another_window_brings_its_padding():
    plan = with_patch(make_plan(a_dataset(facts()), LAPTOP), (8, 16, 24))
    assert plan.patch == (8, 16, 24)
    assert plan.steps[-1] == Pad(shape=(8, 16, 24))


@pytest.mark.parametrize(("values", "kind"), [((1, 2), np.uint8), ((3, 7, 250), np.uint8), ((500, 2), np.uint16)])
def test_a_network_s_channel_finds_its_value_in_the_label_map(values, kind):
    labels = tuple(Label(value=v, name=f"label {v}", colour=(0, 0, 0)) for v in values)
    plan = replace(make_plan(a_dataset(facts()), LAPTOP), labels=labels)
    assert plan.classes == len(values) + 1
    assert plan.lookup.dtype == kind
    np.testing.assert_array_equal(plan.lookup[[0, *range(1, plan.classes)]], [0, *values])


@pytest.mark.parametrize(
    "change",
    [
        {"channels": ()},
        {"labels": ()},
        {"labels": (LIVER, LIVER)},
        {"labels": (LIVER, replace(LIVER, name="other"))},
        {"labels": (LIVER, replace(LIVER, value=2))},
        {"labels": (replace(LIVER, value=0),)},
        {"patch": (8, 0, 8)},
        {"batch": 0},
        {"spacing_mm": (1.0, -1.0, 1.0)},
    ],
    ids=str,
)
def test_a_plan_that_cannot_be_followed_is_refused(change):
    with pytest.raises(BadRecord, match="plan made"):
        replace(make_plan(a_dataset(facts()), LAPTOP), **change)


def test_the_digest_follows_what_changes_a_voxel_and_nothing_else():
    plan: Plan = make_plan(a_dataset(facts()), LAPTOP)
    assert replace(plan, batch=7, reasons={}, name="other").digest == plan.digest
    assert replace(plan, steps=plan.steps[:-1]).digest != plan.digest
    assert replace(plan, channels=("T2",)).digest != plan.digest
