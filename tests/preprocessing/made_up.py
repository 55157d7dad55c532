"""Datasets as a fingerprint tells them, and a machine to plan for: what the tests of plans and rules share."""

from preprocessing.plan import CaseFacts, Fingerprint, Label
from preprocessing.rules import Machine

LIVER = Label(value=1, name="liver", colour=(1, 2, 3))
LAPTOP = Machine(memory_gb=8.0, cores=4, has_gpu=False)


def facts(shape=(100, 100, 100), spacing=(1.0, 1.0, 1.0), kept=1.0, intensities=((0.0, 1.0),)) -> CaseFacts:
    """`kept`: the share of voxels left without the zero border, which lies along the last axis."""
    cropped = (*shape[:2], max(1, round(shape[2] * kept)))
    return CaseFacts(shape=shape, spacing_mm=spacing, cropped=cropped, intensities=intensities, voxels={"liver": 10})


def a_dataset(*cases: CaseFacts, channels=("T1",)) -> Fingerprint:
    return Fingerprint(
        name="made",
        channels=channels,
        labels=(LIVER,),
        cases={f"case_{n}": case for n, case in enumerate(cases)},
        dataset="abc",
    )
