"""Runs are ranked by what was measured, told apart on the cases they share, and said to differ in what they do differ in."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import package
from pipeline.contest import compare, table
from pipeline.errors import UsageError
from pipeline.package import Fold, ModelPackage
from pipeline.postprocessing import HeldOut
from preprocessing.plan import Plan
from preprocessing.records import encode

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(make_plan: Callable[..., Plan], make_package: Callable[..., ModelPackage], tmp_path: Path) -> MakeRun:
    """A package whose held-out cases have that Dice, case by case, of liver and lesion."""

    def made(
        name: str, dice: dict[str, float], minutes: float = 3.0, patch: tuple[int, int, int] = (16, 16, 16)
    ) -> Path:
        network = make_package(tmp_path / f".{name}").networks()[0]
        cases = {case: {"liver": value, "lesion": value / 2} for case, value in dice.items()}
        fold = Fold(
            weights="weights-fold0.safetensors", dice={"liver": 0.7, "lesion": 0.35}, cases_trained=4,
            cases_held_out=len(dice), epochs=3, minutes=minutes, seed=0, held_out=HeldOut(cases=cases),
        )  # fmt: skip
        config = ModelPackage.load(tmp_path / f".{name}").record.network_config
        package.save(
            tmp_path / name, network=network, name="tiny", network_name="residual_unet", network_config=encode(config),
            plan=replace(make_plan(), patch=patch), fold_number=0, fold=fold,
        )  # fmt: skip
        return tmp_path / name

    return made


def dice(mean: float, cases: int = 12, seed: int = 0) -> dict[str, float]:
    return {f"{n:012x}": float(mean + 0.02 * np.random.default_rng([seed, n]).normal()) for n in range(cases)}


def test_the_best_comes_first_and_the_rest_is_told_apart_from_it(make_run: MakeRun, tmp_path: Path) -> None:
    long, short = make_run("long", dice(0.85), minutes=60.0), make_run("short", dice(0.75, seed=1), patch=(16, 24, 16))
    contest = compare([short, long], tmp_path / "out" / "runs.html")
    first, second = contest.standings["dice"]
    assert (first.run, second.run, first.to_best, contest.same_cases) == ("long", "short", None, True)
    assert first.mean == pytest.approx(0.85 * 0.75, abs=0.01) and first.interval[0] < first.mean < first.interval[1]
    to_best = second.to_best["liver"]
    assert (to_best.cases, to_best.lower) == (12, 12) and to_best.p_holm == pytest.approx(2 * 2 / 2**12)
    assert set(contest.differing) == {"plan: patch"}
    page = (tmp_path / "out" / "runs.html").read_text()
    for words in ("plan: patch", "16, 24, 16", "minutes of training", "Difference to long", "default-src"):
        assert words in page
    assert "http" not in page.replace("http-equiv", "") and "plan: spacing" not in page
    assert "p < 0.001" in table(contest)


def test_runs_on_other_cases_are_said_to_be_so(make_run: MakeRun, tmp_path: Path) -> None:
    one = make_run("one", dice(0.8))
    other = make_run("other", {f"x{n}": 0.9 for n in range(5)})
    contest = compare([one, other], tmp_path / "runs.html")
    assert not contest.same_cases and contest.standings["dice"][1].to_best["liver"].cases == 0
    assert "were not measured on the same cases" in (tmp_path / "runs.html").read_text()


def test_a_package_that_does_not_tell_its_cases_has_a_mean(tiny: Path, make_run: MakeRun, tmp_path: Path) -> None:
    contest = compare([tiny, make_run("one", dice(0.7))], tmp_path / "runs.html")
    found = {one.run: one for one in contest.standings["dice"]}
    assert found["tiny"].mean == 0.8 and found["tiny"].interval is None and found["tiny"].to_best is None
    assert not contest.same_cases


def evaluation(
    path: Path, dice: dict[str, float], tolerance_mm: float = 1.0, surface: str = "voxels", label: str = "liver"
) -> Path:
    values = {"nsd": 0.9, "hd95_mm": 2.0, "assd_mm": 1.0, "lesion_f1": None}
    cases = {case: {label: {"dice": value, **values}} for case, value in dice.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cases": cases, "tolerance_mm": tolerance_mm, "surface": surface}))
    return path


def test_evaluations_are_compared_by_every_number(tmp_path: Path) -> None:
    runs = [
        evaluation(tmp_path / "a" / "s.json", dice(0.8)),
        evaluation(tmp_path / "b" / "s.json", dice(0.9), tolerance_mm=2),
    ]
    contest = compare(runs, tmp_path / "runs.html")
    assert list(contest.standings) == ["dice", "nsd", "hd95_mm", "assd_mm", "lesion_f1"]
    assert [one.run for one in contest.standings["dice"]] == ["b/s", "a/s"]
    assert contest.standings["assd_mm"][1].to_best["liver"].said == "no case differs"
    assert contest.differing == {"tolerance_mm": {"a/s": "1", "b/s": "2"}}
    assert contest.standings["lesion_f1"][0].mean is None


def test_what_was_measured_in_different_ways_has_no_difference(tmp_path: Path) -> None:
    one = evaluation(tmp_path / "one.json", dice(0.8))
    for changed, lost in (({"tolerance_mm": 2.0}, {"nsd"}), ({"surface": "surfels"}, {"nsd", "hd95_mm", "assd_mm"})):
        contest = compare([one, evaluation(tmp_path / "other.json", dice(0.9), **changed)], tmp_path / "runs.html")
        untold = {metric for metric, (_, second) in contest.standings.items() if second.to_best is None}
        (caution,) = contest.cautions
        assert untold == lost and next(iter(changed)) in caution and caution in (tmp_path / "runs.html").read_text()
    assert not compare([one, evaluation(tmp_path / "alike.json", dice(0.7))]).cautions


def test_means_over_other_labels_are_said_to_be_so(tmp_path: Path) -> None:
    runs = [evaluation(tmp_path / f"{label}.json", dice(0.8), label=label) for label in ("liver", "spleen")]
    (caution,) = compare(runs, tmp_path / "runs.html").cautions
    assert "not measured by the same labels" in caution and caution in (tmp_path / "runs.html").read_text()


def test_a_package_and_an_evaluation_share_no_case_and_are_said_to(make_run: MakeRun, tmp_path: Path) -> None:
    contest = compare([make_run("one", dice(0.8)), evaluation(tmp_path / "s.json", dice(0.9))], tmp_path / "runs.html")
    assert "keeps no names of cases" in contest.cautions[-1]
    assert "keeps no names of cases" in (tmp_path / "runs.html").read_text()


def test_names_are_text_on_the_page(tmp_path: Path) -> None:
    runs = [evaluation(tmp_path / f"<b>{name}" / "s.json", dice(0.8)) for name in "xy"]
    compare(runs, tmp_path / "runs.html")
    page = (tmp_path / "runs.html").read_text()
    assert "&lt;b&gt;x/s" in page and "<b>x" not in page


def test_what_is_no_run_is_refused_with_the_reason(tmp_path: Path, tiny: Path) -> None:
    one = evaluation(tmp_path / "s.json", dice(0.8))
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")
    with pytest.raises(UsageError, match="is no evaluation"):
        compare([one, wrong])
    with pytest.raises(UsageError, match="does not exist"):
        compare([one, tmp_path / "absent.json"])
    with pytest.raises(UsageError, match="two or more are needed"):
        compare([one])
    with pytest.raises(UsageError, match="given twice"):
        compare([tiny, tiny])
