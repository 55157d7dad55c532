"""plan: a dataset is looked at, and the rules say what to do with it."""

from pathlib import Path

from preprocessing import datasets
from preprocessing.plan import Plan, make_plan
from preprocessing.reading import STRICT, Reading

from .config import refuse_unknown_match
from .data import measure_machine
from .progress import Progress, silent


def plan(
    dataset: Path, out: Path | None = None, device: str = "auto", progress: Progress = silent,
    reading: Reading = STRICT,
) -> Plan:  # fmt: skip
    """Fingerprint a dataset and plan for it and for this machine; written to `out` when given."""
    opened = datasets.open_dataset(dataset, reading)
    refuse_unknown_match(reading, opened.channels)
    fingerprint = datasets.take_fingerprint(opened, lambda done, of: progress("look at every case", done, of))
    made = make_plan(fingerprint, measure_machine(device))
    if out:
        made.write(out)
    return made
