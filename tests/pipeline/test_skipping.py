"""Windows without a patient are not computed, and on real scans nothing of a patient is lost by that."""

from pathlib import Path

import numpy as np
import torch

from pipeline.finding import find_scans
from pipeline.prediction import Inference, segment_volume
from pipeline.scan import read_scan
from preprocessing.plan import Label, Plan
from preprocessing.reading import Reading
from preprocessing.steps import Normalise, Orient, Pad, Scale

PATCH = (32, 32, 8)


class Everything:
    """An engine that calls every voxel it is shown a label: what is background nobody looked at."""

    device, words = torch.device("cpu"), "everything"

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(windows[:, :1]), torch.ones_like(windows[:, :1])], dim=1)


def bright(voxels: np.ndarray) -> np.ndarray:
    """What no one takes for air: brighter than half of the brightest tissue."""
    return voxels > np.percentile(voxels, 98) / 2


def test_on_a_real_head_air_is_spared_and_no_bright_voxel_is(shared: Path) -> None:
    folders = sorted((shared / "data" / "brain-tumor-progression").glob("PGBM-001/*/*T1post*"))
    (scan,) = find_scans(folders[:1]).scans
    volume = read_scan(scan, ("mr",), Reading())
    plan = Plan(
        name="all", channels=("mr",), labels=(Label(value=1, name="seen", colour=(0, 0, 0)),),
        steps=(Orient(), Normalise(channels=(Scale(by="scan"),)), Pad(shape=PATCH)), spacing_mm=(1.0, 1.0, 1.0),
        patch=PATCH, batch=1,
    )  # fmt: skip
    found = segment_volume(volume, [Everything()], plan, Inference(device="cpu", overlap=0.0, body=True), "")
    assert found.windows.skipped >= 1, "a corner of a head's field of view is air"
    assert found.windows.computed > found.windows.skipped
    assert (found.labels.voxels == 0).sum() > 0 and not (bright(volume.voxels) & (found.labels.voxels == 0)).any()
