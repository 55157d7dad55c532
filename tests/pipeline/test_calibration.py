"""The temperature is the likeliest one, the sample it is fitted on is fair, and what is said of both is true."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, optimize, special

from pipeline import calibration
from pipeline.calibration import (
    HOTTEST,
    NEAR,
    Calibration,
    Sample,
    calibrate,
    calibration_error,
    fit,
    near_a_border,
    probabilities,
    sample_size,
)
from preprocessing.plan import Label, Plan
from preprocessing.records import BadRecord


def a_case(seed: int, *, temperature: float = 1.0, rows: int = 2000, classes: int = 3, spread: float = 2.0) -> Sample:
    """Truth drawn from the very probabilities that the logits have at that temperature."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread * temperature, (rows, classes)).astype(np.float32)
    chances = special.softmax(logits.astype(np.float64) / temperature, axis=1).cumsum(axis=1)
    truth = (rng.uniform(size=(rows, 1)) > chances).sum(axis=1).clip(max=classes - 1)
    weight = rng.uniform(0.2, 2, rows)
    return Sample(logits=logits, truth=truth, weight=weight / weight.sum())


def likelihood(samples: list[Sample], temperature: float) -> float:
    """Mean negative log-likelihood, from scipy alone."""
    total = 0.0
    for sample in samples:
        log = special.log_softmax(sample.logits.astype(np.float64) / temperature, axis=1)
        background = special.logsumexp(log[:, [0, *sample.unsought]], axis=1)
        own = np.where(sample.truth == 0, background, log[np.arange(len(log)), sample.truth])
        total -= sample.weight @ own
    return total / len(samples)


# the temperature


@pytest.mark.parametrize("temperature", [0.4, 1.0, 1.7, 5.0])
def test_the_temperature_is_the_one_scipy_finds_on_the_same_likelihood(temperature: float) -> None:
    samples = [a_case(seed, temperature=temperature) for seed in range(3)]
    best = optimize.minimize_scalar(
        lambda log: likelihood(samples, float(np.exp(log))), bounds=(-3, 3), method="bounded", options={"xatol": 1e-9}
    )
    assert fit(samples) == pytest.approx(np.exp(best.x), rel=1e-5)
    assert fit(samples) == pytest.approx(temperature, rel=0.05), "and about the one the truth was drawn with"


def test_the_temperature_is_the_one_torch_finds_with_lbfgs() -> None:
    samples = [a_case(seed, temperature=1.6) for seed in range(3)]
    logits, truth = (np.concatenate([getattr(each, name) for each in samples]) for name in ("logits", "truth"))
    weight = torch.from_numpy(np.concatenate([each.weight for each in samples]))
    log = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        scaled = torch.from_numpy(logits).double() / log.exp()
        value = (torch.nn.functional.cross_entropy(scaled, torch.from_numpy(truth), reduction="none") * weight).sum()
        value.backward()
        return value

    optimiser.step(loss)
    assert fit(samples) == pytest.approx(float(log.detach().exp()), rel=1e-4)


@settings(max_examples=25)
@given(st.floats(0.25, 4), st.floats(0.6, 2), st.integers(0, 5))
def test_logits_times_a_number_give_a_temperature_times_that_number(scale: float, own: float, seed: int) -> None:
    sample = a_case(seed, temperature=own, rows=300)
    scaled = replace(sample, logits=sample.logits.astype(np.float64) * scale)
    assert fit([scaled]) == pytest.approx(fit([sample]) * scale, rel=1e-4)


@given(st.integers(0, 50), st.floats(0.3, 3))
def test_the_temperature_changes_no_decision_and_never_the_likelihood_for_the_worse(seed: int, own: float) -> None:
    sample = a_case(seed, temperature=own, rows=100)
    temperature = fit([sample])
    assert likelihood([sample], temperature) <= likelihood([sample], 1.0) + 1e-9
    np.testing.assert_array_equal(probabilities(sample, temperature).argmax(1), sample.logits.argmax(1))


def test_where_every_voxel_is_right_or_wrong_the_temperature_stays_finite() -> None:
    logits = np.array([[3.0, -1.0], [-2.0, 1.0]], dtype=np.float32)
    right = Sample(logits=logits, truth=np.array([0, 1]), weight=np.array([0.5, 0.5]))
    assert 0 < fit([right]) < 1 and fit([replace(right, truth=np.array([1, 0]))]) == HOTTEST


def test_a_label_nobody_looked_for_is_counted_to_the_background() -> None:
    """Lesions that were not painted say nothing against the network that finds them."""
    sample = a_case(1, temperature=1.8)
    unpainted = replace(sample, truth=np.where(sample.truth == 2, 0, sample.truth), unsought=(2,))
    best = optimize.minimize_scalar(
        lambda log: likelihood([unpainted], float(np.exp(log))), bounds=(-2, 3), method="bounded",
        options={"xatol": 1e-9},
    )  # fmt: skip
    assert fit([unpainted]) == pytest.approx(np.exp(best.x), rel=1e-5) == pytest.approx(1.8, rel=0.15)
    taken_for_background = fit([replace(unpainted, unsought=())])
    assert taken_for_background > 2.2, "taken for background, they make a good network look overconfident"
    assert (probabilities(unpainted, 1.0)[:, 2] == 0).all()


# what is said of it


@pytest.mark.parametrize(("seed", "too_sure"), [(0, 2.5), (1, 4.0)])
def test_a_network_that_is_too_sure_is_called_so_and_mended(seed: int, too_sure: float) -> None:
    samples = [a_case(10 * seed + n, temperature=too_sure, rows=4000) for n in range(6)]
    temperature, said = calibrate(samples)
    assert temperature == pytest.approx(too_sure, rel=0.03)
    assert said is not None and (said.cases, said.voxels) == (6, 24000)
    assert said.ece_after < said.ece_before / 3
    assert said.nll_before == pytest.approx(likelihood(samples, 1.0), abs=1e-5)
    assert said.nll_after == pytest.approx(likelihood(samples, temperature), rel=1e-3)
    assert said.brier_after < said.brier_before


def test_the_figures_after_come_from_cases_that_had_no_part_in_the_fit() -> None:
    samples = [a_case(n, temperature=2.0, rows=500) for n in range(4)]
    _, said = calibrate(samples)
    even, odd = samples[::2], samples[1::2]
    apart = (likelihood(even, fit(odd)) + likelihood(odd, fit(even))) / 2
    assert said is not None and said.nll_after == pytest.approx(apart, abs=1e-6)
    assert said.nll_after >= likelihood(samples, fit(samples)), "the fit's own cases would flatter it"


def test_a_temperature_that_does_not_carry_over_is_left_at_1() -> None:
    cold, hot = a_case(1, temperature=0.3, rows=500), a_case(2, temperature=3.0, rows=500)
    temperature, said = calibrate([cold, hot])
    assert temperature == 1.0 and said is not None and said.nll_after == said.nll_before


def test_where_nothing_was_held_out_nothing_is_said() -> None:
    assert calibrate([]) == (None, None)


def test_the_calibration_error_is_the_distance_from_confidence_to_the_share_that_is_right() -> None:
    rng = np.random.default_rng(0)
    weight = rng.uniform(0.5, 1.5, 10_000)
    confidence = rng.uniform(0.4, 1.0, 10_000)
    is_right = rng.uniform(size=10_000) < confidence - 0.2
    assert calibration_error(confidence, is_right, weight) == pytest.approx(0.2, abs=0.02)
    edges = np.quantile(confidence, np.linspace(0, 1, 16))
    by_hand = 0.0
    for low, high in pairwise(edges):
        inside = (confidence >= low) & ((confidence < high) | (high == edges[-1]))
        mean, share = (np.average(each[inside], weights=weight[inside]) for each in (confidence, is_right))
        by_hand += weight[inside].sum() / weight.sum() * abs(mean - share)
    assert calibration_error(confidence, is_right, weight) == pytest.approx(by_hand, abs=1e-9)
    same = np.full(100, 0.8)
    assert calibration_error(same, np.arange(100) < 60, np.ones(100)) == pytest.approx(0.2)


def test_the_brier_score_is_the_squared_distance_to_the_truth() -> None:
    sample = a_case(3, rows=200)
    _, said = calibrate([sample])
    truth = np.eye(3)[sample.truth]
    by_hand = sample.weight @ ((special.softmax(sample.logits.astype(np.float64), axis=1) - truth) ** 2).sum(axis=1)
    assert said is not None and said.brier_before == pytest.approx(by_hand, abs=1e-6)


def test_figures_that_cannot_be_are_refused() -> None:
    figures = dict.fromkeys(
        ("nll_before", "nll_after", "ece_before", "ece_after", "brier_before", "brier_after"), 0.1
    )  # fmt: skip
    Calibration(cases=1, voxels=1, **figures)
    for bad in (float("nan"), float("inf"), -0.1):
        with pytest.raises(BadRecord, match="finite"):
            Calibration(cases=1, voxels=1, **figures | {"ece_after": bad})


# the sample


@pytest.fixture(scope="module")
def plan(make_plan: Callable[..., Plan]) -> Plan:
    """liver, lesion."""
    return make_plan()


def some_truth(seed: int, shape: tuple[int, int, int] = (30, 28, 26)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    truth = np.zeros(shape, np.int16)
    truth[5:14, 6:15, 4:13], truth[8:11, 8:11, 7:10] = 1, 2
    truth[:2] = -1
    return np.roll(truth, int(rng.integers(3)), axis=1)


def some_logits(truth: np.ndarray, classes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (classes, *truth.shape)).astype(np.float32)


def draw(
    logits: np.ndarray, truth: np.ndarray, plan: Plan, rng: np.random.Generator, size: int = 20_000,
    annotated: tuple[str, ...] | None = None,
) -> Sample | None:  # fmt: skip
    """Of logits that all are there."""
    drawn = calibration.draw(truth, rng, size)
    return drawn.with_logits(logits.reshape(len(logits), -1)[:, drawn.places].T, plan, annotated)


def test_half_of_the_sample_lies_near_a_border_and_unknown_voxels_never_do(plan: Plan) -> None:
    truth = some_truth(0)
    where = np.arange(truth.size, dtype=np.float32).reshape(1, *truth.shape).repeat(3, axis=0)
    sample = draw(where, truth, plan, np.random.default_rng(0), size=2000)
    assert sample is not None and len(sample.truth) == 2000
    places = sample.logits[:, 0].astype(int)
    assert len(set(places)) == 2000 and (truth.ravel()[places] == sample.truth).all() and sample.truth.min() == 0
    assert near_a_border(truth).ravel()[places].sum() == 1000
    assert near_a_border(truth).mean() < 0.3


@pytest.mark.parametrize("seed", range(3))
def test_weights_make_the_sample_fair(plan: Plan, seed: int) -> None:
    """Any mean over the sample is, on average, the mean over every known voxel."""
    truth = some_truth(seed)
    logits = some_logits(truth, 3, seed)
    logits[1] += 3 * near_a_border(truth)
    means = []
    for luck in range(40):
        sample = draw(logits, truth, plan, np.random.default_rng(luck), size=600)
        assert sample is not None and sample.weight.sum() == pytest.approx(1)
        means.append([sample.weight @ sample.logits[:, 1], sample.weight @ (sample.truth == 2)])
    known = truth >= 0
    expected = [logits[1][known].mean(), (truth[known] == 2).mean()]
    spread = np.std(means, axis=0) / np.sqrt(len(means))
    assert (np.abs(np.mean(means, axis=0) - expected) < 4 * spread).all()


def test_a_small_case_is_taken_whole(plan: Plan) -> None:
    truth = some_truth(1)
    sample = draw(some_logits(truth, 3), truth, plan, np.random.default_rng(0), size=10**6)
    known = int((truth >= 0).sum())
    assert sample is not None and len(sample.truth) == known
    np.testing.assert_allclose(sample.weight, 1 / known)


@given(st.integers(0, 30))
@settings(max_examples=10)
def test_near_means_within_three_voxels_along_every_axis(seed: int) -> None:
    truth = some_truth(seed)
    expected = np.zeros(truth.shape, bool)
    for number in (0, 1, 2):
        away = ndimage.distance_transform_cdt(truth != number, metric="chessboard")
        expected |= (truth != number) & (truth >= 0) & (away <= NEAR)
    known = truth >= 0
    np.testing.assert_array_equal(near_a_border(truth)[known], expected[known])


def test_regions_are_calibrated_by_their_own_yes_and_no(plan: Plan) -> None:
    """As scipy finds it for a sigmoid of every label."""
    labels = (
        Label(value=1, name="whole", colour=(1, 2, 3), parts=(1, 2)),
        Label(value=2, name="core", colour=(1, 2, 3), parts=(2,)),
    )
    regions = replace(plan, labels=labels)
    truth = some_truth(0)
    logits = some_logits(truth, 2) + 2 * np.stack([truth > 0, truth == 2]).astype(np.float32)
    sample = draw(logits, truth, regions, np.random.default_rng(0), size=10**6)
    known = truth >= 0
    is_in = np.stack([truth > 0, truth == 2])[:, known]

    def sigmoid_likelihood(log: float) -> float:
        scaled = logits[:, known].astype(np.float64) / np.exp(log)
        return float((np.logaddexp(0, scaled) - is_in * scaled).mean())

    best = optimize.minimize_scalar(sigmoid_likelihood, bounds=(-3, 3), method="bounded", options={"xatol": 1e-9})
    assert sample is not None and fit([sample]) == pytest.approx(np.exp(best.x), rel=1e-5)
    only = draw(logits, truth, regions, np.random.default_rng(0), size=10**6, annotated=("core",))
    assert only is not None and len(only.truth) == known.sum() and only.weight.sum() == pytest.approx(1)


def test_a_case_of_which_nothing_is_known_gives_no_sample(plan: Plan) -> None:
    truth = some_truth(0)
    logits, rng = some_logits(truth, 3), np.random.default_rng(0)
    assert draw(logits, np.full_like(truth, -1), plan, rng) is None
    assert draw(logits, truth, plan, rng, annotated=()) is None
    partial = draw(logits, truth, plan, rng, annotated=("liver",))
    assert partial is not None and partial.unsought == (2,) and set(partial.truth) == {0, 1}


def test_many_cases_and_classes_are_sampled_within_bounds(plan: Plan) -> None:
    assert sample_size(4, plan) == 20_000
    many = replace(plan, labels=tuple(Label(value=n, name=str(n), colour=(0, 0, 0)) for n in range(1, 120)))
    assert 200 <= sample_size(400, many) * 400 * many.classes <= 50_000_000
