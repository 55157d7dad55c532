"""A plan fits the network at hand and the memory there is; what a person wrote into it is honoured or refused."""

import logging
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from networks import residual_unet
from pipeline import planning
from pipeline.errors import UsageError
from pipeline.planning import Wishes, planned
from preprocessing.plan import CaseFacts, Fingerprint, Label, Plan, Recipe
from preprocessing.records import BadRecord
from preprocessing.rules import SHARE, Machine
from preprocessing.steps import Pad

CPU = Wishes(device="cpu")


@pytest.fixture(autouse=True)
def laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "measure_machine", lambda device: Machine(memory_gb=8.0, cores=4, has_gpu=False))


def a_dataset(shape: tuple[int, int, int] = (35, 50, 36), spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)):
    case = CaseFacts(shape=shape, spacing_mm=spacing, cropped=shape, intensities=((0.0, 1.0),), voxels={"liver": 10})
    liver = Label(value=1, name="liver", colour=(1, 2, 3))
    cases = {f"case {n}": case for n in range(60)}
    return Fingerprint(name="made", channels=("MR",), labels=(liver,), cases=cases, dataset="abc")


def test_small_scans_are_seen_whole_on_a_laptop() -> None:
    plan, config = planned(a_dataset(), CPU)
    assert (plan.patch, plan.batch, plan.mode) == ((40, 56, 40), 2, "hilum")
    assert config == residual_unet.fit(residual_unet.Config(), patch=plan.patch, spacing=plan.spacing_mm)


@pytest.mark.parametrize("mode", ["hilum", "nnunet"])
def test_every_number_has_its_reason(mode) -> None:
    plan, _ = planned(a_dataset(), replace(CPU, mode=mode))
    told = {"spacing_mm", "patch", "batch", "memory_gb", "normalise", "crop", "orient", "network_options"}
    assert told | {f"recipe.{field.name}" for field in fields(Recipe)} <= set(plan.reasons)
    assert all(plan.reasons.values()) and plan.memory_gb is not None and plan.memory_gb > 1


def test_the_prediction_stays_within_the_memory_that_is_asked_for() -> None:
    predicted = []
    for gb in (0.5, 1.0, 2.0):
        plan, _ = planned(a_dataset(shape=(300, 300, 300)), replace(CPU, memory_gb=gb))
        assert plan.memory_gb is not None
        predicted.append(plan.memory_gb - planning.PROCESS_GB["cpu"])
        assert predicted[-1] <= SHARE * gb + 0.01
    assert predicted == sorted(predicted)


@pytest.mark.parametrize("network", ["residual_unet", "segresnet"])
def test_the_window_is_one_that_the_network_accepts(network) -> None:
    shape, spacing = (21, 200, 180), (4.0, 0.8, 0.8)
    for mode in ("hilum", "nnunet"):
        plan, config = planned(a_dataset(shape, spacing), replace(CPU, network=network, mode=mode, memory_gb=1.0))
        divisor = planning.networks.load(network).divisor(config)
        assert all(side % step == 0 for side, step in zip(plan.patch, divisor, strict=True))
        assert plan.steps[-1] == Pad(shape=plan.patch)


def test_nnunets_stages_are_those_of_the_network(tmp_path: Path) -> None:
    plan, config = planned(a_dataset(), replace(CPU, mode="nnunet", preset="resenc_m"))
    assert (config.width, config.decoder, config.bias, config.plain) == (32, 1, True, False)
    plan.write(tmp_path / "plan.yaml")
    again, same = planned(a_dataset(), replace(CPU, plan=tmp_path / "plan.yaml"))
    assert (again, same) == (plan, config)


def test_what_a_person_says_of_the_network_wins() -> None:
    _, config = planned(a_dataset(), replace(CPU, mode="nnunet", network_options={"width": 8}))
    assert config.width == 8 and config.plain


def edited(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "plan.yaml"
    planned(a_dataset(), CPU)[0].write(path)
    record = yaml.safe_load(path.read_text()) | changes
    path.write_text(yaml.safe_dump(record))
    return path


def test_a_window_that_a_person_wrote_is_kept_and_its_padding_follows(tmp_path: Path) -> None:
    path = edited(tmp_path, patch=[32, 32, 48], batch=5)
    plan, config = planned(a_dataset(), replace(CPU, plan=path))
    assert (plan.patch, plan.batch) == ((32, 32, 48), 5)
    assert plan.steps[-1] == Pad(shape=(32, 32, 48))
    assert residual_unet.divisor(config) == (8, 8, 8)
    assert plan.memory_gb != Plan.read(path).memory_gb, "it is predicted anew"


def test_a_window_that_the_network_cannot_halve_is_refused_with_one_that_it_can(tmp_path: Path) -> None:
    path = edited(tmp_path, patch=[37, 56, 40])
    with pytest.raises(UsageError, match=re.escape("Write [40, 56, 40]")):
        planned(a_dataset(), replace(CPU, plan=path))


def test_a_plan_for_more_memory_than_there_is_is_followed_and_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        planned(a_dataset(shape=(300, 300, 300)), replace(CPU, mode="nnunet", preset="resenc_xl"))
    assert "may be stopped for want of memory" in caplog.text


def test_on_a_gpu_networks_are_as_wide_as_nnunets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "measure_machine", lambda device: Machine(memory_gb=24.0, cores=8, has_gpu=True))
    plan, config = planned(a_dataset(shape=(200, 200, 200)))
    assert config.width == 32 and plan.network_options == {"width": 32}
    assert plan.memory_gb is not None and plan.memory_gb <= 24
    assert planned(a_dataset(), Wishes(network_options={"width": 8}))[1].width == 8


@pytest.mark.parametrize("wrong", [dict(memory_gb=0.0), dict(memory_gb=-1.0)])
def test_memory_below_nothing_is_refused(wrong) -> None:
    with pytest.raises(UsageError, match="above 0"):
        Wishes(**wrong)


def test_a_configuration_that_nnunet_would_not_train_is_refused() -> None:
    with pytest.raises(BadRecord, match="no 3d_lowres"):
        planned(a_dataset(), replace(CPU, mode="nnunet", configuration="3d_lowres"))
