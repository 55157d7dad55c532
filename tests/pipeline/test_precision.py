"""bfloat16 is asked for, fits the processor, and is said; what is summed stays float32."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from networks import residual_unet
from pipeline import prediction
from pipeline.batch import segment
from pipeline.config import Segment
from pipeline.errors import PackageError, UsageError
from pipeline.prediction import Inference, blended_logits, refuse_slow_precision, segment_volume
from preprocessing import files
from preprocessing.plan import Plan
from preprocessing.volume import Volume

CPU = torch.device("cpu")
PATCH = (16, 16, 16)


def can_bfloat16() -> bool:
    try:
        refuse_slow_precision("bfloat16", CPU)
    except UsageError:
        return False
    return True


def test_bfloat16_changes_numbers_a_little_and_sums_them_in_float32() -> None:
    torch.manual_seed(0)
    config = residual_unet.fit(residual_unet.Config(width=4), patch=PATCH, spacing=(1.0, 1.0, 1.0))
    network = residual_unet.build(config, channels=1, classes=3).eval()
    scan = torch.randn(1, 20, 18, 16)
    exact, rounded = (
        blended_logits(scan, network, PATCH, 3, Inference(precision=precision), CPU)
        for precision in ("float32", "bfloat16")
    )
    assert exact.dtype == rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).abs().max() < 0.1 * exact.abs().max()


def test_a_processor_without_bfloat16_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    refuse_slow_precision("float32", CPU)
    with pytest.raises(UsageError, match=r"this processor does not compute in it.*Leave --precision out"):
        refuse_slow_precision("bfloat16", CPU)


def test_a_precision_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="'float8' is not known; one of float32, bfloat16"):
        Inference(precision="float8")


class Overflowing(torch.nn.Module):
    """One voxel of its answer is no number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.cat([x[:, :1], -x[:, :1], 1 - x[:, :1]], dim=1)
        logits[0, 1, 0, 0, 0] = float("inf")
        return logits


def test_an_answer_that_is_no_number_is_refused_not_guessed_from(
    make_plan: Callable[..., Plan], make_scan: Callable[..., Volume]
) -> None:
    with pytest.raises(PackageError, match="values that are no numbers"):
        segment_volume(make_scan(), [Overflowing()], make_plan(), Inference(device="cpu"), "0123")


@pytest.mark.skipif(not can_bfloat16(), reason="this processor has no bfloat16")
def test_the_report_says_what_was_computed_in(make_scan: Callable[..., Volume], tiny: Path, tmp_path: Path) -> None:
    files.write(make_scan(0, shape=(22, 24, 18)), tmp_path / "a.nii.gz")
    labels = []
    for precision in ("float32", "bfloat16"):
        segment([tmp_path / "a.nii.gz"], tiny, tmp_path / precision, Segment(precision=precision, device="cpu"))
        case = tmp_path / precision / "a"
        assert json.loads((case / "report.json").read_text())["precision"] == precision
        assert ("bfloat16" in (case / "page.html").read_text()) == (precision == "bfloat16")
        labels.append(files.read(case / "labels.nii.gz").voxels)
    assert np.mean(labels[0] == labels[1]) > 0.9
