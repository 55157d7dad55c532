"""Windows are blended as the formula says, and the decision is made on the scan's own grid."""

import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from torch import nn

from pipeline.decision import Confidence, Ground, Judge, Likely, decide, probabilities
from pipeline.errors import UsageError
from pipeline.package import ModelPackage
from pipeline.postprocessing import Largest, NoHoles, NoSmaller, clean
from pipeline.prediction import Asked, Inference, blended_logits, choose_device, segment_volume
from preprocessing.patches import bell, grid
from preprocessing.plan import Label, Plan
from preprocessing.records import BadRecord
from preprocessing.steps import Crop, Normalise, Orient, Pad, Resample, Scale, Step, Trail, prepare
from preprocessing.volume import Volume

from .dense import dense

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


def formula(scan: torch.Tensor, network: nn.Module, starts: list[tuple[int, int, int]]) -> np.ndarray:
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
    np.testing.assert_allclose(blended, formula(scan, network, grid(shape, PATCH, overlap)), atol=1e-4)


def test_where_windows_agree_the_answer_is_monais() -> None:
    scan = a_scan(20, 37, 16)
    ours = blended_logits(scan, Pointwise().eval(), PATCH, 3, Inference(), CPU)
    theirs = sliding_window_inference(scan[None], PATCH, 1, Pointwise(), overlap=0.5, mode="gaussian")
    torch.testing.assert_close(ours, theirs[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, Pointwise()(scan[None])[0], atol=1e-5, rtol=1e-5)


def test_only_what_training_mirrored_is_mirrored() -> None:
    scan, network = a_scan(16, 16, 16), Placed().eval()
    flipped = blended_logits(scan, network, PATCH, 3, Inference(flips=True, mirrors=(False, True, False)), CPU)
    alone = [network(scan[None])[0], network(scan.flip([2])[None])[0].flip([2])]
    torch.testing.assert_close(flipped, torch.stack(alone).mean(0), atol=1e-5, rtol=1e-5)


def test_flips_are_the_mean_over_all_eight_mirrorings() -> None:
    scan, network = a_scan(16, 16, 16), Placed().eval()
    flipped = blended_logits(scan, network, PATCH, 3, Inference(flips=True), CPU)
    mirrored = [[axis + 1 for axis in range(3) if on[axis]] for on in product((False, True), repeat=3)]
    alone = [network(scan.flip(axes)[None])[0].flip(axes) for axes in mirrored]
    assert len(alone) == 8
    torch.testing.assert_close(flipped, torch.stack(alone).mean(0), atol=1e-5, rtol=1e-5)


def test_probabilities_are_the_dense_paths_and_leave_the_rest_to_the_background(
    tiny: Path, make_scan: Callable[..., Volume]
) -> None:
    package, scan = ModelPackage.load(tiny), make_scan()
    networks, how = package.networks(), Inference(device="cpu")
    found = segment_volume(scan, networks, package.plan, how, package.id, asked=Asked(probabilities=True, exact=True))
    assert found.maps is not None and found.maps.labels == ("liver", "lesion") and found.maps.kinds == ()
    with torch.no_grad():
        background, *others = dense(scan, networks, package.plan, how).scores
    maps = [found.maps.probability(name).voxels for name in found.maps.labels]
    for map_, other in zip(maps, others, strict=True):
        np.testing.assert_allclose(map_, other.voxels, atol=1e-5)
    np.testing.assert_allclose(1 - sum(maps), background.voxels, atol=1e-5)


def class_names(plan: Plan) -> tuple[str, ...]:
    labels = tuple(label.name for label in plan.labels)
    return labels if plan.has_regions else ("background", *labels)


def random_probabilities(prepared: Volume, plan: Plan) -> Volume:
    logits = np.random.default_rng(3).normal(0, 2, (plan.classes, *prepared.geometry.shape))
    exponents = np.exp(logits)
    return prepared.with_voxels((exponents / exponents.sum(0)).astype(np.float32), channels=class_names(plan))


def decided(likely: Volume, trail: Trail, plan: Plan, axis: int = 0) -> tuple[Volume, dict[str, float]]:
    """As if networks had said so, two rows at a time."""

    def rows() -> Iterator[Likely]:
        scores = torch.from_numpy(np.array(likely.voxels)).movedim(axis + 1, 1)
        for first in range(0, scores.shape[1], 2):
            yield Likely(first=first, scores=scores[:, first : first + 2], beside={})

    ground = Ground.under(likely.geometry, trail, axis, (0, 0, 0), likely.geometry.shape)
    made = decide(rows(), ground, Judge(plan=plan, temperatures=(1.0,)))
    labels = made.labels(likely)
    return labels, made.confidence.of(labels, labels)


def test_the_decision_is_the_strongest_probability_on_the_scans_own_grid(
    make_plan: Callable[..., Plan], make_scan: Callable[..., Volume]
) -> None:
    plan, scan = make_plan(), make_scan(4)
    prepared, trail = prepare(scan, plan.steps)
    probabilities = random_probabilities(prepared, plan)
    labels, confidence = decided(probabilities, trail, plan)

    undone = trail.undo(probabilities).voxels
    winner = undone.argmax(axis=0)
    np.testing.assert_array_equal(labels.voxels[0], np.array([0, 1, 7])[winner])
    np.testing.assert_array_equal(labels.geometry.affine, scan.geometry.affine)
    assert labels.voxels.dtype == np.uint8 and labels.channels == ("labels",)
    assert confidence == {
        "liver": pytest.approx(undone[1][winner == 1].mean(), abs=1e-3),
        "lesion": pytest.approx(undone[2][winner == 2].mean(), abs=1e-3),
    }


MR = Normalise(channels=(Scale(by="scan"),))
FINER, COARSER, THICK = (
    Resample(spacing_mm=spacing) for spacing in ((1.1, 1.3, 2.0), (3.0, 2.5, 4.0), (2.0, 2.0, 1.0))
)
TRAILS: dict[str, tuple[Step, ...]] = {
    "nothing": (),
    "as planned": (Orient(), Crop(margin=1), COARSER, MR, Pad(shape=(16, 7, 16))),
    "as nnU-Net": (Orient(), Crop(margin=0), MR, FINER, Pad(shape=(40, 16, 16))),
    "thick slices": (Orient(), replace(THICK, separate=2), MR, Pad(shape=(16, 16, 40))),
    "no resampling": (Orient(), Crop(margin=1), MR, Pad(shape=(16, 30, 16))),
    "cropped after resampling": (Orient(), FINER, Crop(margin=0), MR),
    "grown before resampling": (Orient(), Pad(shape=(20, 20, 20)), COARSER, MR),
    "cut, then grown": (Orient(), Crop(margin=0), MR, Pad(shape=(16, 30, 16))),
}


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("has_regions", [False, True], ids=["classes", "regions"])
@pytest.mark.parametrize("steps", TRAILS.values(), ids=TRAILS)
def test_whatever_the_trail_the_decision_is_that_of_every_class_brought_back(
    steps: tuple[Step, ...], has_regions: bool, axis: int, make_plan: Callable[..., Plan],
    make_scan: Callable[..., Volume],
) -> None:  # fmt: skip
    labels = tuple(replace(label, parts=(label.value,) if has_regions else ()) for label in make_plan().labels)
    plan, scan = replace(make_plan(), labels=labels), make_scan(3)
    voxels = np.zeros_like(scan.voxels)
    voxels[:, 2:-3, 4:, 1:-2] = scan.voxels[:, 2:-3, 4:, 1:-2]
    prepared, trail = prepare(scan.with_voxels(voxels), steps)
    random = np.random.default_rng(2).uniform(0, 1, (plan.classes, *prepared.geometry.shape)) ** 0.5
    likely = prepared.with_voxels(random.astype(np.float32), channels=class_names(plan))
    found, confidence = decided(likely, trail, plan, axis)

    back = [
        trail.undo(likely.with_voxels(one[None], channels=("one",)), outside=float(number == 0 and not has_regions))
        for number, one in enumerate(likely.voxels)
    ]
    every = np.stack([one.voxels[0] for one in back])
    if has_regions:
        every = np.stack([np.zeros_like(every[0]), *every])
    wins = (every > 0.5) * np.arange(len(every))[:, None, None, None] if has_regions else every
    number = wins.argmax(0)
    best = np.take_along_axis(every, number[None], axis=0)[0]
    np.testing.assert_array_equal(found.voxels[0], plan.lookup[number])
    expected = {label.name: best[number == n].mean() for n, label in enumerate(labels, start=1)}
    assert confidence == pytest.approx(expected, abs=6e-5)
    assert found.geometry.matches(back[0].geometry)
    assert found.voxels.flags.c_contiguous and len(np.unique(found.voxels)) > 1


@pytest.mark.parametrize("late", [COARSER, Orient()], ids=["resample", "orient"])
def test_a_plan_that_turns_or_resamples_after_resampling_is_refused(late: Step, make_plan: Callable[..., Plan]) -> None:
    with pytest.raises(BadRecord, match=f"{late.kind} were met after resample.*may follow it.*Put them first"):
        replace(make_plan(), steps=(FINER, MR, late))


def test_classes_never_lie_on_the_scans_own_grid_all_at_once(
    make_plan: Callable[..., Plan], make_scan: Callable[..., Volume]
) -> None:
    many = tuple(Label(value=value, name=f"organ {value}", colour=(1, 2, 3)) for value in range(1, 60))
    plan = replace(make_plan(), labels=many, steps=(Orient(), Resample(spacing_mm=(9.0, 9.0, 12.0))))
    scan = make_scan(0, shape=(64, 60, 50))
    prepared, trail = prepare(scan, plan.steps)
    likely = random_probabilities(prepared, plan)
    tracemalloc.start()
    decided(likely, trail, plan)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 4 * scan.voxels.size  # bytes of ten float32 maps; there are sixty classes


def test_what_was_cropped_away_is_background(make_plan: Callable[..., Plan], make_scan: Callable[..., Volume]) -> None:
    plan, scan = make_plan(), make_scan(0, shape=(24, 24, 24))
    voxels = np.zeros_like(scan.voxels)
    voxels[:, 8:16, 8:16, 8:16] = scan.voxels[:, 8:16, 8:16, 8:16]
    prepared, trail = prepare(scan.with_voxels(voxels), (Crop(margin=0),))
    everywhere = np.zeros((3, *prepared.geometry.shape), dtype=np.float32)
    everywhere[2] = 1
    probabilities = prepared.with_voxels(everywhere, channels=("background", "liver", "lesion"))
    labels, confidence = decided(probabilities, trail, plan)
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


# temperature


def test_logits_are_divided_by_the_temperature_before_folds_are_averaged(
    make_plan: Callable[..., Plan], make_scan: Callable[..., Volume]
) -> None:
    plan, scan = replace(make_plan(), steps=(Normalise(channels=(Scale(by="scan"),)), Pad(shape=PATCH))), make_scan()
    prepared, trail = prepare(scan, plan.steps)
    networks, how = [Pointwise(), Placed()], Inference(device="cpu")
    logits = [blended_logits(prepared.to_tensor(), network, PATCH, 3, how, CPU) for network in networks]
    for temperatures in ((2.0, 0.5), (1.0, 1.0)):
        found = segment_volume(
            scan, networks, plan, how, "", temperatures=temperatures, asked=Asked(probabilities=True, exact=True)
        )
        likely = sum((one / t).softmax(0) for one, t in zip(logits, temperatures, strict=True)) / 2
        expected = trail.undo(prepared.with_voxels(likely.numpy(), channels=class_names(plan)))
        assert found.maps is not None
        for number, name in enumerate(("liver", "lesion"), start=1):
            np.testing.assert_allclose(found.maps.probability(name).voxels[0], expected.voxels[number], atol=1e-6)


def test_a_temperature_moves_the_confidence_and_not_the_decision(
    tiny: Path, make_scan: Callable[..., Volume], make_plan: Callable[..., Plan]
) -> None:
    package, scan = ModelPackage.load(tiny), make_scan()
    plan = replace(package.plan, steps=package.plan.steps[2:])  # no resampling: probabilities are not mixed
    how = Inference(device="cpu")
    cold, hot = (
        segment_volume(scan, package.networks(), plan, how, "", temperatures=(temperature,))
        for temperature in (0.5, 4.0)
    )
    np.testing.assert_array_equal(cold.labels.voxels, hot.labels.voxels)
    assert cold.confidence and all(cold.confidence[name] > hot.confidence[name] for name in cold.confidence)


# regions


@pytest.fixture
def regions(make_plan: Callable[..., Plan]) -> Plan:
    """The whole, painted first, and what lies in it."""
    labels = (
        Label(value=2, name="whole", colour=(1, 2, 3), parts=(1, 2, 3)),
        Label(value=1, name="core", colour=(1, 2, 3), parts=(1, 3)),
        Label(value=3, name="active", colour=(1, 2, 3), parts=(3,)),
    )
    return replace(make_plan(), labels=labels)


def test_regions_have_a_probability_of_their_own_and_no_background(regions: Plan) -> None:
    logits = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(probabilities(logits, regions, 2.0), torch.sigmoid(logits / 2))


def test_of_regions_later_ones_are_painted_over_earlier_ones_on_the_scans_own_grid(
    regions: Plan, make_scan: Callable[..., Volume]
) -> None:
    scan = make_scan(4)
    prepared, trail = prepare(scan, regions.steps)
    voxels = np.random.default_rng(5).uniform(0, 1, (3, *prepared.geometry.shape)).astype(np.float32)
    likely = prepared.with_voxels(voxels, channels=("whole", "core", "active"))
    labels, confidence = decided(likely, trail, regions)
    undone = trail.undo(likely).voxels
    expected, strength = np.zeros(scan.geometry.shape), np.zeros(scan.geometry.shape)
    for number, value in enumerate((2, 1, 3)):
        expected = np.where(undone[number] > 0.5, value, expected)
        strength = np.where(undone[number] > 0.5, undone[number], strength)
    np.testing.assert_array_equal(labels.voxels[0], expected)
    assert labels.voxels.dtype == np.uint8 and labels.geometry.matches(scan.geometry)
    for name, values in (("whole", (2, 1, 3)), ("core", (1, 3)), ("active", (3,))):
        assert confidence[name] == pytest.approx(strength[np.isin(expected, values)].mean(), abs=1e-4)
        assert confidence[name] > 0.5


def test_outside_what_was_cropped_there_is_no_region(regions: Plan, make_scan: Callable[..., Volume]) -> None:
    scan = make_scan(0, shape=(24, 24, 24))
    voxels = np.zeros_like(scan.voxels)
    voxels[:, 8:16, 8:16, 8:16] = scan.voxels[:, 8:16, 8:16, 8:16]
    prepared, trail = prepare(scan.with_voxels(voxels), (Crop(margin=0),))
    everywhere = np.ones((3, *prepared.geometry.shape), dtype=np.float32)
    likely = prepared.with_voxels(everywhere, channels=("whole", "core", "active"))
    labels, confidence = decided(likely, trail, regions)
    np.testing.assert_array_equal(labels.voxels == 3, voxels != 0)
    assert confidence == {"whole": 1.0, "core": 1.0, "active": 1.0}


def test_regions_are_segmented_from_scan_to_labels(regions: Plan, make_scan: Callable[..., Volume]) -> None:
    found = segment_volume(make_scan(), [Pointwise()], regions, Inference(device="cpu", flips=True), "")
    assert set(np.unique(found.labels.voxels)) <= {0, 1, 2, 3} and found.confidence
    assert all(0.5 < value <= 1 for value in found.confidence.values())


# rules


def test_rules_are_applied_to_the_labels_and_told(tiny: Path, make_scan: Callable[..., Volume]) -> None:
    package, scan = ModelPackage.load(tiny), make_scan()
    how, networks = Inference(device="cpu"), package.networks()
    raw = segment_volume(scan, networks, package.plan, how, "")
    rules = (NoHoles(label="lesion"), Largest(label="liver"), NoSmaller(label="lesion", ml=0.1))
    found = segment_volume(scan, networks, package.plan, how, "", rules=rules)
    labels, changes = clean(raw.labels, rules, package.plan)
    np.testing.assert_array_equal(found.labels.voxels, labels.voxels)
    assert found.changes == changes and len(changes) == 3 and raw.changes == ()
    assert any(change.removed_ml for change in changes)


@pytest.mark.parametrize("axis", [0, 2])
def test_confidence_counts_what_won_and_was_kept(
    axis: int, make_plan: Callable[..., Plan], make_scan: Callable[..., Volume]
) -> None:
    plan, scan = make_plan(), make_scan()
    before, after = np.zeros((2, 1, *scan.geometry.shape), np.uint8)
    before[0, 0, 0, :4], after[0, 0, 0, 2:6] = 1, 1  # two removed, two kept, two filled in
    after[0, 0, 1, 0] = before[0, 0, 1, 0] = 7
    strength = np.random.default_rng(0).uniform(0.5, 1, scan.geometry.shape).astype(np.float32)
    ground = Ground.under(scan.geometry, Trail(taken=()), axis, (0, 0, 0), scan.geometry.shape)
    confidence = Confidence(plan=plan, ground=ground, keeps=True)
    numbers = np.where(before[0] == 7, 2, before[0])
    for row, (one, sure) in enumerate(zip(*(np.moveaxis(each, axis, 0) for each in (numbers, strength)), strict=True)):
        confidence.add(row, one, sure)
    labels, was = (scan.with_voxels(each, channels=("x",)) for each in (after, before))
    expected = {"liver": strength[0, 0, 2:4].mean(), "lesion": strength[0, 1, 0]}
    assert confidence.of(labels, was) == pytest.approx(expected, abs=1e-4)
