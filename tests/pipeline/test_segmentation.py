"""One scan to one report: what is warned of is what a reader should know."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.config import Segment
from pipeline.engines.torch import engine
from pipeline.package import ModelPackage
from pipeline.postprocessing import Chosen, Largest
from pipeline.prediction import Inference
from pipeline.scan import Scan
from pipeline.segmentation import Model, segment_case
from preprocessing import files
from preprocessing.plan import Label, Plan
from preprocessing.steps import Orient, Pad
from preprocessing.volume import Geometry, Volume

REGIONS = (
    Label(value=1, name="whole", colour=(1, 2, 3), parts=(1, 2, 3)),
    Label(value=2, name="core", colour=(1, 2, 3), parts=(2, 3)),
    Label(value=3, name="active", colour=(1, 2, 3), parts=(3,)),
)


class Brightness(nn.Module):
    """1 is the whole, 2 the core, 3 what is active."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([20 * (x - level) for level in (0.5, 1.5, 2.5)], dim=1)


@pytest.fixture
def largest_whole(tiny: Path, make_plan: Callable[..., Plan]) -> Model:
    """Finds regions by their brightness and keeps the largest part of the whole."""
    plan = replace(make_plan(), labels=REGIONS, steps=(Orient(), Pad(shape=(16, 16, 16))), spacing_mm=(1.0, 1.0, 1.0))
    rule = Chosen(
        rule=Largest(label="whole"), dice_before={}, dice_after={}, cases=5, better=5, worse=0, folds=("0",)
    )  # fmt: skip
    package = ModelPackage.load(tiny)
    package = replace(package, record=replace(package.record, plan=plan, postprocessing=(rule,)))
    return Model(package=package, engines=[engine(Brightness(), torch.device("cpu"))])


@pytest.mark.parametrize(
    ("brightness", "count", "warned"),
    [(1, 8, []), (2, 40, ["whole (15% of it)", "core (16% of it)"])],
    ids=["much of the rim alone", "much of both"],
)
def test_what_rules_took_of_a_region_is_compared_with_the_whole_region(
    brightness: int, count: int, warned: list[str], largest_whole: Model, tmp_path: Path
) -> None:
    voxels = np.zeros((16, 16, 16), np.float32)
    voxels[2:8, 2:8, 2:8], voxels[8, 2, 2:8] = 2, 1
    voxels[11:, 11:, 11:] = np.where(np.arange(125) < count, brightness, 0).reshape(5, 5, 5)  # far from the rest
    geometry = Geometry(shape=(16, 16, 16), affine=np.eye(4))
    files.write(Volume(voxels=voxels[None], geometry=geometry, channels=("mr",)), tmp_path / "scan.nii.gz")
    scan = Scan(case_id="scan", paths=(tmp_path / "scan.nii.gz",))
    report = segment_case(scan, largest_whole, tmp_path, Segment(outputs=("labels",)), Inference(device="cpu"))
    assert report.volumes_ml == pytest.approx({"whole": 0.222, "core": 0.216, "active": 0})
    removals = [warning for warning in report.warnings if "removed" in warning]
    assert len(removals) == len(warned)
    assert all(words in warning for words, warning in zip(warned, removals, strict=True))
