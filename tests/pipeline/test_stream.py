"""Streaming changes nothing but what is held: labels are those of the dense path, whatever the scan, plan and package."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.prediction import Asked, Inference, segment_volume
from pipeline.stream import HOST, Ladder, Region, Stream, Windows
from preprocessing.plan import Plan
from preprocessing.steps import Crop, Normalise, Orient, Pad, Resample, Scale, prepare
from preprocessing.volume import Geometry, Volume

from .dense import blended, confidence_in, dense

CPU = Inference(device="cpu")


class Mixed(nn.Module):
    """Logits that depend on a voxel, its neighbours and its place in the window: blending and mirroring show."""

    def __init__(self, classes: int, channels: int = 1, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.near = nn.Conv3d(channels, classes, 3, padding=1).requires_grad_(False)
            self.near.weight *= 3

    def forward(self, x: Tensor) -> Tensor:
        ramp = torch.linspace(-1, 1, x.shape[-1]) + torch.linspace(-1, 1, x.shape[-3])[:, None, None]
        return self.near(x) + 0.3 * ramp


class Counted:
    """An engine that tells how often it was asked, and of how many windows at once."""

    device = HOST

    def __init__(self, network: nn.Module) -> None:
        self.network, self.asked = network, []

    def __call__(self, windows: Tensor) -> Tensor:
        self.asked.append(len(windows))
        return self.network(windows)


def a_scan(shape: tuple[int, int, int], seed: int = 0, turn: int = 0, channels: int = 1) -> Volume:
    """Smooth noise in a dark frame, its axes turned one of 48 ways."""
    rng = np.random.default_rng(seed)
    voxels = rng.normal(0, 1, (channels, *shape)).astype(np.float32)
    for axis in (1, 2, 3):
        voxels = voxels + np.roll(voxels, 1, axis)
    frame = np.zeros(shape, bool)
    frame[tuple(slice(size // 5, size - size // 6) for size in shape)] = True
    rotation = np.eye(3)[list(np.array([(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])[turn % 6])]
    affine = np.eye(4)
    signs = [1 if turn >> (3 + bit) & 1 else -1 for bit in range(3)]
    affine[:3, :3] = rotation @ np.diag(signs) @ np.diag([1.0, 1.3, 2.0])
    return Volume(
        voxels=voxels * frame, geometry=Geometry(shape=shape, affine=affine), channels=tuple(map(str, range(channels)))
    )


def a_plan(make_plan: Callable[..., Plan], **fields) -> Plan:
    plan = make_plan()
    if fields.pop("regions", False):
        fields["labels"] = tuple(replace(label, parts=(label.value,)) for label in plan.labels)
    return replace(plan, **fields)


def steps(
    spacing: tuple[float, float, float] | None,
    separate: int | None,
    patch: tuple[int, int, int],
    margin: int | None,
    order: str,
):
    scale = Normalise(channels=(Scale(by="scan"),))
    crop = [] if margin is None else [Crop(margin=margin)]
    resample = [] if spacing is None else [Resample(spacing_mm=spacing, separate=separate)]
    middle = {
        "hilum": [*crop, *resample, scale],
        "nnunet": [*crop, scale, *resample],
        "late": [*resample, *crop, scale],
    }
    return (Orient(), *middle[order], Pad(shape=patch))


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_labels_are_those_of_the_dense_path_to_the_bit(make_plan: Callable[..., Plan], data: st.DataObject) -> None:
    sides = st.tuples(*[st.integers(5, 16)] * 3)
    patch = data.draw(st.tuples(*[st.sampled_from([1, 4, 7, 12])] * 3), "patch")
    spacing = data.draw(st.none() | st.tuples(*[st.sampled_from([0.8, 1.3, 2.0, 2.9])] * 3), "spacing")
    plan = a_plan(
        make_plan,
        regions=data.draw(st.booleans(), "regions"),
        patch=patch,
        steps=steps(
            spacing,
            data.draw(st.sampled_from([None, 0, 1, 2]), "separate"),
            patch,
            data.draw(st.sampled_from([None, 0, 2]), "margin"),
            data.draw(st.sampled_from(["hilum", "nnunet", "late"]), "order"),
        ),
        bell=data.draw(st.sampled_from(["hilum", "nnunet"]), "bell"),
    )
    folds = data.draw(st.integers(1, 3), "folds")
    engines = [Mixed(plan.classes, seed=fold) for fold in range(folds)]
    temperatures = data.draw(st.sampled_from([(), tuple(np.linspace(0.7, 2, folds).tolist())]), "temperatures")
    how = replace(
        CPU,
        overlap=data.draw(st.sampled_from([0.0, 0.3, 0.5, 0.8]), "overlap"),
        flips=data.draw(st.booleans(), "flips"),
        batch=1,
    )
    scan = a_scan(
        data.draw(sides, "shape"), data.draw(st.integers(0, 9), "seed"), data.draw(st.integers(0, 47), "turn")
    )
    found = segment_volume(scan, engines, plan, how, "", temperatures=temperatures)
    axis = windows_of(scan, plan, how).axis
    expected = dense(scan, engines, plan, how, temperatures, axis)
    np.testing.assert_array_equal(found.labels.voxels, expected.labels.voxels)
    assert found.labels.geometry.matches(scan.geometry) and found.labels.voxels.flags.c_contiguous
    confidence = confidence_in(found.labels, found.labels, expected.strength, plan)
    assert found.confidence == pytest.approx(confidence, abs=6e-5)


def windows_of(scan: Volume, plan: Plan, how: Inference) -> Windows:
    return Windows.over(prepare(scan, plan.steps)[0].geometry.shape, plan.patch, how.overlap, plan.bell)


# what is not computed


def uniform_below(scan: Volume, row: int) -> Volume:
    """One value from that row on."""
    voxels = scan.voxels + np.indices(scan.geometry.shape).sum(axis=0) % 2
    voxels[:, row:] = -2.5
    return scan.with_voxels(voxels)


UNCHANGED = Normalise(channels=(Scale(by="dataset", low=-9e3, high=9e3),))


def test_a_window_of_one_value_is_computed_once_per_fold_and_nothing_changes(make_plan: Callable[..., Plan]) -> None:
    plan = a_plan(make_plan, patch=(8, 8, 8), steps=(UNCHANGED,))
    scan = uniform_below(a_scan((40, 12, 12), turn=56), 12)
    engines = [Counted(Mixed(3, seed=fold)) for fold in range(2)]
    found = segment_volume(scan, engines, plan, CPU, "")
    windows = windows_of(scan, plan, CPU)
    alike = sum((scan.voxels[(0, *windows.place(start))] == -2.5).all() for start in windows.starts)
    assert found.windows.repeated == alike - 1 > 5 and found.windows.skipped == 0
    assert found.windows.computed == len(windows.starts) - alike + 1 == len(engines[0].asked) == len(engines[1].asked)
    expected = dense(scan, [engine.network for engine in engines], plan, CPU, axis=windows.axis)
    np.testing.assert_array_equal(found.labels.voxels, expected.labels.voxels)


def test_windows_of_air_are_background_and_not_computed(make_plan: Callable[..., Plan]) -> None:
    plan = a_plan(make_plan, channels=("CT",), patch=(8, 8, 8), steps=(UNCHANGED,))
    rng = np.random.default_rng(0)
    voxels = rng.normal(-1000, 20, (1, 40, 16, 16)).astype(np.float32)
    voxels[0, 4:18, 3:14, 3:14] = rng.normal(50, 30, (14, 11, 11))
    voxels[0, 8:14, 6:10, 6:10] = -1000  # a lung: air that body surrounds
    scan = a_scan((40, 16, 16), turn=56).with_voxels(voxels)
    engine = Counted(Mixed(3))
    found = segment_volume(scan, [engine], plan, replace(CPU, body=True), "")
    all_of_it = segment_volume(scan, [engine.network], plan, CPU, "")
    assert found.windows.skipped >= 18 and found.windows.skipped + found.windows.computed == all_of_it.windows.computed
    assert found.windows.body == "CT above -500 HU"
    assert len(engine.asked) == found.windows.computed
    np.testing.assert_array_equal(found.labels.voxels[0, :20], all_of_it.labels.voxels[0, :20])
    assert (all_of_it.labels.voxels[0, 32:] != 0).any() and not found.labels.voxels[0, 32:].any()


def test_where_no_window_is_air_looking_for_body_changes_nothing(make_plan: Callable[..., Plan]) -> None:
    plan = a_plan(make_plan, patch=(8, 8, 8), steps=(UNCHANGED, Pad(shape=(8, 8, 8))))
    scan = a_scan((20, 12, 9), turn=3)
    scan = scan.with_voxels(np.abs(scan.voxels) + 5 * (np.indices(scan.geometry.shape).sum(axis=0) % 2))
    looked, whole = (segment_volume(scan, [Mixed(3)], plan, replace(CPU, body=body), "") for body in (True, False))
    assert looked.windows.skipped == 0 and "above" in looked.windows.body
    np.testing.assert_array_equal(looked.labels.voxels, whole.labels.voxels)
    assert looked.confidence == whole.confidence


def test_outside_a_region_is_background_and_inside_it_the_answer_of_the_region_alone(
    make_plan: Callable[..., Plan],
) -> None:
    plan = a_plan(make_plan, patch=(8, 8, 8), steps=(UNCHANGED,))
    scan, region = a_scan((30, 20, 18), turn=56), Region(start=(4, 2, 3), stop=(20, 14, 13))
    found = segment_volume(scan, [Mixed(3)], plan, CPU, "", region=region)
    inside = tuple(slice(first, last) for first, last in zip(region.start, region.stop, strict=True))
    alone = scan.with_voxels(
        scan.voxels[(slice(None), *inside)], geometry=Geometry(shape=region.shape, affine=scan.geometry.affine)
    )
    expected = np.zeros_like(found.labels.voxels)
    expected[(0, *inside)] = segment_volume(alone, [Mixed(3)], plan, CPU, "").labels.voxels[0]
    np.testing.assert_array_equal(found.labels.voxels, expected)
    assert found.labels.voxels.any()


def test_a_region_smaller_than_a_window_grows_to_one_inside_the_scan() -> None:
    region = Region(start=(0, 10, 28), stop=(2, 12, 30))
    assert region.holding((8, 8, 8), (30, 20, 30)) == Region(start=(0, 7, 22), stop=(8, 15, 30))


# how it is gone through


@pytest.mark.parametrize("batch", [2, 5])
def test_several_windows_at_once_are_the_same_windows(batch: int, make_plan: Callable[..., Plan]) -> None:
    plan, scan = a_plan(make_plan, patch=(8, 8, 8)), a_scan((34, 20, 18))
    engine = Counted(Mixed(3))
    found = segment_volume(scan, [engine], plan, replace(CPU, batch=batch), "")
    one = segment_volume(scan, [engine.network], plan, CPU, "")
    assert max(engine.asked) == batch and sum(engine.asked) == one.windows.computed
    np.testing.assert_array_equal(found.labels.voxels, one.labels.voxels)


def test_only_rows_that_windows_still_reach_are_held() -> None:
    """And each once: asked for at any time, a slab has a window's rows, whatever the length of the scan."""
    for length in (16, 64):
        scan = np.zeros((1, length, 10, 9), np.float32)
        windows = Windows.over((length, 10, 9), (8, 8, 8), 0.5)
        stream = Stream(scan=scan, engines=[Mixed(3)], windows=windows, classes=3, axis=windows.axis)
        rows = [(some.first, some.logits[0].shape[1]) for some in stream.rows()]
        assert [slab.sums.shape for slab in stream._slabs] == [(3, 8, 10, 9)]
        assert rows[0][0] == 0 and sum(count for _, count in rows) == length


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_sums_in_a_file_are_the_sums(axis: int) -> None:
    scan = a_scan((14, 12, 13)).voxels
    windows = Windows.over((14, 12, 13), (6, 8, 4), 0.5)
    found = []
    for on_disk in (False, True):
        stream = Stream(
            scan=scan, engines=[Mixed(3)], windows=windows, classes=3, axis=axis, on_disk=on_disk, keeps=False
        )
        found.append(torch.cat([rows.logits[0] for rows in stream.rows()], dim=1))
    assert torch.equal(*found)


class Cramped(Counted):
    """A GPU with room for so many windows, and from some point on for none unless they are in half precision."""

    device = torch.device("cpu", 0)  # another one than the host's, as far as anybody can tell

    def __init__(self, network: nn.Module, room: int, breaks_at: int = 10**9) -> None:
        super().__init__(network)
        self.room, self.breaks_at, self.precisions = room, breaks_at, []

    def __call__(self, windows: Tensor) -> Tensor:
        if len(windows) > self.room or len(self.asked) == self.breaks_at:
            self.breaks_at = self.breaks_at if len(windows) > self.room else -1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().__call__(windows)

    def in_precision(self, precision: str) -> "Cramped":
        self.precisions.append(precision)
        return Cramped(self.network, self.room)


def test_without_memory_on_the_gpu_first_fewer_windows_then_sums_on_the_host(make_plan: Callable[..., Plan]) -> None:
    plan, scan = a_plan(make_plan, patch=(8, 8, 8)), a_scan((34, 20, 18))
    engine = Cramped(Mixed(3), room=1, breaks_at=7)
    found = segment_volume(scan, [engine], plan, replace(CPU, batch=4), "")
    expected = segment_volume(scan, [engine.network], plan, CPU, "")
    np.testing.assert_array_equal(found.labels.voxels, expected.labels.voxels)
    said = found.memory.words
    assert [words.split(": ")[1].split(" from")[0] for words in said] == [
        "2 window(s) at once", "1 window(s) at once", "windows were summed in the computer's memory",
    ]  # fmt: skip
    assert not engine.precisions


def test_half_precision_is_the_last_step_and_is_said(make_plan: Callable[..., Plan]) -> None:
    plan, scan = a_plan(make_plan, patch=(8, 8, 8)), a_scan((34, 20, 18))

    class Stubborn(Cramped):
        def __call__(self, windows: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    stubborn = Stubborn(Mixed(3), room=1)
    found = segment_volume(scan, [stubborn], plan, CPU, "")
    assert stubborn.precisions == ["bfloat16"] and "bfloat16" in found.memory.words[-1]
    assert "may change labels" in found.memory.words[-1] and len(found.memory.words) == 2


def test_when_nothing_is_left_to_give_up_the_error_is_told() -> None:
    ladder = Ladder(batch=1, place=HOST, precision="bfloat16")
    with pytest.raises(torch.OutOfMemoryError):
        ladder.insist(lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    assert ladder.words == []


def test_no_other_error_is_taken_for_a_want_of_memory(make_plan: Callable[..., Plan]) -> None:
    class Broken(Counted):
        def __call__(self, windows: Tensor) -> Tensor:
            self.asked.append(len(windows))
            raise RuntimeError("CUDA error: device-side assert triggered")

    engine = Broken(Mixed(3))
    with pytest.raises(RuntimeError, match="device-side"):
        segment_volume(a_scan((12, 12, 12)), [engine], a_plan(make_plan, patch=(8, 8, 8)), replace(CPU, batch=4), "")
    assert len(engine.asked) == 1


# maps


def test_uncertainty_comes_from_the_same_pass_and_is_what_the_formula_says(make_plan: Callable[..., Plan]) -> None:
    plan = a_plan(make_plan, patch=(8, 8, 8), steps=(UNCHANGED, Pad(shape=(8, 8, 8))))
    scan, engines = a_scan((14, 9, 20), turn=56), [Mixed(3, seed=fold) for fold in range(2)]
    found = segment_volume(scan, engines, plan, replace(CPU, flips=True), "", asked=Asked(uncertainty=True))
    assert found.maps is not None and found.maps.kinds == ("entropy", "folds", "flips")
    made = dense(scan, engines, plan, replace(CPU, flips=True))

    def of(likely: Tensor) -> np.ndarray:
        likely = likely.double()
        return (-(likely * likely.log()).sum(dim=0) / np.log(3)).numpy()

    np.testing.assert_allclose(found.maps.uncertainty("entropy").voxels[0], of(made.probabilities), atol=1e-5)
    apart = of(made.probabilities) - np.mean([of(member) for member in made.members], axis=0)
    np.testing.assert_allclose(found.maps.uncertainty("folds").voxels[0], apart, atol=1e-5)
    flips = found.maps.uncertainty("flips").voxels[0]
    assert flips.min() >= 0 and 0.001 < flips.mean() < 0.5


def test_what_flips_contradict_is_blended_as_logits_are(make_plan: Callable[..., Plan]) -> None:
    plan = a_plan(make_plan, patch=(8, 8, 8), steps=(UNCHANGED,))
    scan, network, how = a_scan((8, 8, 8), turn=56), Mixed(3), replace(CPU, flips=True, mirrors=(False, False, True))
    found = segment_volume(scan, [network], plan, how, "", asked=Asked(uncertainty=True))
    window = torch.from_numpy(scan.voxels.copy())[None]
    passes = [network(window)[0], network(window.flip(4)).flip(4)[0]]
    likely = [logits.softmax(dim=0).double() for logits in passes]

    def entropy(p: Tensor) -> Tensor:
        return -(p * p.log()).sum(dim=0) / np.log(3)

    expected = entropy(sum(likely) / 2) - sum(entropy(p) for p in likely) / 2
    assert found.maps is not None
    np.testing.assert_allclose(found.maps.uncertainty("flips").voxels[0], expected, atol=1e-5)


@pytest.mark.parametrize("regions", [False, True])
def test_of_a_plan_that_averages_logits_these_are_brought_back_and_decided(
    regions: bool, make_plan: Callable[..., Plan]
) -> None:
    plan = a_plan(make_plan, regions=regions, averages="logits", patch=(8, 8, 8))
    scan, engines = a_scan((20, 17, 12)), [Mixed(3 - regions, seed=fold) for fold in range(2)]
    asked = Asked(probabilities=True, exact=True)
    found = segment_volume(scan, engines, plan, CPU, "", asked=asked)
    prepared, trail = prepare(scan, plan.steps)
    mean = sum(blended(torch.from_numpy(np.array(prepared.voxels)), one, plan, CPU, None) for one in engines) / 2
    back = trail.undo(prepared.with_voxels(mean.numpy(), channels=("x",) * len(mean))).voxels
    likely = 1 / (1 + np.exp(-back)) if regions else np.exp(back) / np.exp(back).sum(axis=0)
    number = ((back > 0) * np.array([1, 2])[:, None, None, None]).max(axis=0) if regions else back.argmax(axis=0)
    assert (found.labels.voxels[0] != plan.lookup[number]).mean() < 1e-3  # ties of rounding
    assert found.maps is not None
    for channel, name in enumerate(("liver", "lesion"), start=1 - regions):
        np.testing.assert_allclose(found.maps.probability(name).voxels[0], likely[channel], atol=1e-4)
    assert found.confidence and all(0.3 < sure <= 1 for sure in found.confidence.values())
