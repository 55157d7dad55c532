"""Windows are blended as the formula says, and the decision is made on the scan's own grid."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from torch import nn

from pipeline.errors import UsageError
from pipeline.package import ModelPackage
from pipeline.prediction import Inference, Prediction, blended_logits, choose_device, decide, predict, segment_volume
from preprocessing.patches import bell, grid
from preprocessing.plan import Plan
from preprocessing.steps import Crop, prepare
from preprocessing.volume import Volume

CPU = torch.device("cpu")
PATCH = (16, 16, 16)


class Pointwise(nn.Module):
    """Logits of a voxel from that voxel alone: however windows are blended, the answer is that of the whole scan."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :1], x[:, :1] ** 2, 1 - x[:, :1]], dim=1)


class Placed(nn.Module):
    """Logits that depend on where in its window a voxel lies: blending shows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ramp = torch.linspace(-1, 1, x.shape[-1]).expand_as(x[:, :1])
        return torch.cat([x[:, :1] * ramp, x[:, :1] + ramp**2, ramp], dim=1)


def a_scan(*shape: int) -> torch.Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


def dense(scan: torch.Tensor, network: nn.Module, starts: list[tuple[int, int, int]]) -> np.ndarray:
    """sum_w b(x - w) f(x) / sum_w b(x - w), voxel by voxel in float64."""
    total, weight = np.zeros((3, *scan.shape[1:])), np.zeros(scan.shape[1:])
    b = np.einsum("i,j,k->ijk", *(bell(side).astype(np.float64) for side in PATCH))
    for i, j, k in starts:
        place = (slice(i, i + 16), slice(j, j + 16), slice(k, k + 16))
        total[(slice(None), *place)] += b * network(scan[(None, slice(None), *place)])[0].numpy()
        weight[place] += b
    return total / weight


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("shape", [(16, 16, 16), (17, 30, 41)])
def test_windows_are_blended_as_the_formula_says(overlap: float, shape: tuple[int, int, int]) -> None:
    scan, network = a_scan(*shape), Placed().eval()
    blended = blended_logits(scan, network, PATCH, 3, Inference(overlap=overlap), CPU)
    np.testing.assert_allclose(blended, dense(scan, network, grid(shape, PATCH, overlap)), atol=1e-4)


def test_where_windows_agree_the_answer_is_monais() -> None:
    scan = a_scan(20, 37, 16)
    ours = blended_logits(scan, Pointwise().eval(), PATCH, 3, Inference(), CPU)
    theirs = sliding_window_inference(scan[None], PATCH, 1, Pointwise(), overlap=0.5, mode="gaussian")
    torch.testing.assert_close(ours, theirs[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, Pointwise()(scan[None])[0], atol=1e-5, rtol=1e-5)


def test_flips_are_the_mean_over_all_eight_mirrorings() -> None:
    scan, network = a_scan(16, 16, 16), Placed().eval()
    flipped = blended_logits(scan, network, PATCH, 3, Inference(flips=True), CPU)
    mirrored = [[axis + 1 for axis in range(3) if on[axis]] for on in product((False, True), repeat=3)]
    alone = [network(scan.flip(axes)[None])[0].flip(axes) for axes in mirrored]
    assert len(alone) == 8
    torch.testing.assert_close(flipped, torch.stack(alone).mean(0), atol=1e-5, rtol=1e-5)


def test_probabilities_sum_to_one_and_bear_the_names_of_the_classes(
    tiny: Path, make_scan: Callable[..., Volume]
) -> None:
    package = ModelPackage.load(tiny)
    prepared, _ = prepare(make_scan(), package.plan.steps)
    prediction = predict(prepared, package.networks(), package.plan, Inference(device="cpu"), package.id)
    assert prediction.probabilities.channels == ("background", "liver", "lesion")
    assert prediction.package_id == package.id
    np.testing.assert_allclose(prediction.probabilities.voxels.sum(0), 1, atol=1e-5)


def random_probabilities(prepared: Volume, plan: Plan) -> Volume:
    logits = np.random.default_rng(3).normal(0, 2, (plan.classes, *prepared.geometry.shape))
    exponents = np.exp(logits)
    names = ("background", *(label.name for label in plan.labels))
    return prepared.with_voxels((exponents / exponents.sum(0)).astype(np.float32), channels=names)


def test_the_decision_is_the_strongest_probability_on_the_scans_own_grid(
    make_plan: Callable[..., Plan], make_scan: Callable[..., Volume]
) -> None:
    plan, scan = make_plan(), make_scan(4)
    prepared, trail = prepare(scan, plan.steps)
    probabilities = random_probabilities(prepared, plan)
    labels, confidence = decide(Prediction(probabilities=probabilities, package_id=""), trail, plan)

    undone = trail.undo(probabilities).voxels
    winner = undone.argmax(axis=0)
    np.testing.assert_array_equal(labels.voxels[0], np.array([0, 1, 7])[winner])
    np.testing.assert_array_equal(labels.geometry.affine, scan.geometry.affine)
    assert labels.voxels.dtype == np.uint8 and labels.channels == ("labels",)
    assert confidence == {
        "liver": pytest.approx(undone[1][winner == 1].mean(), abs=1e-3),
        "lesion": pytest.approx(undone[2][winner == 2].mean(), abs=1e-3),
    }


def test_what_was_cropped_away_is_background(make_plan: Callable[..., Plan], make_scan: Callable[..., Volume]) -> None:
    plan, scan = make_plan(), make_scan(0, shape=(24, 24, 24))
    voxels = np.zeros_like(scan.voxels)
    voxels[:, 8:16, 8:16, 8:16] = scan.voxels[:, 8:16, 8:16, 8:16]
    prepared, trail = prepare(scan.with_voxels(voxels), (Crop(margin=0),))
    everywhere = np.zeros((3, *prepared.geometry.shape), dtype=np.float32)
    everywhere[2] = 1
    probabilities = prepared.with_voxels(everywhere, channels=("background", "liver", "lesion"))
    labels, confidence = decide(Prediction(probabilities=probabilities, package_id=""), trail, plan)
    np.testing.assert_array_equal(labels.voxels != 0, voxels != 0)
    assert confidence == {"lesion": 1.0}


def test_the_same_scan_gives_the_same_labels_and_says_how_long_each_hop_took(
    tiny: Path, make_scan: Callable[..., Volume]
) -> None:
    package = ModelPackage.load(tiny)
    networks = package.networks()
    once, again = (
        segment_volume(make_scan(), networks, package.plan, Inference(device="cpu"), package.id) for _ in range(2)
    )
    np.testing.assert_array_equal(once.labels.voxels, again.labels.voxels)
    assert list(once.seconds) == ["prepare", "predict", "decide"] and min(once.seconds.values()) >= 0


@pytest.mark.parametrize("overlap", [-0.1, 1.0, 50.0])
def test_an_overlap_that_cannot_be_is_refused(overlap: float) -> None:
    with pytest.raises(UsageError, match="at least 0 and below 1"):
        Inference(overlap=overlap)


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU == choose_device("cpu")
    for name in ("cuda", "cuda:1", "gpu", ""):
        with pytest.raises(UsageError):
            choose_device(name)
