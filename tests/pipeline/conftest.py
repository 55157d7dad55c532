"""A package that nobody trained, small enough to segment in a blink, and scans for it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from networks import residual_unet
from pipeline import package
from pipeline.package import Fold, ModelPackage
from preprocessing import files
from preprocessing.plan import Label, Plan, Recipe
from preprocessing.records import encode
from preprocessing.steps import Normalise, Orient, Pad, Resample, Scale
from preprocessing.volume import Geometry, Volume

LABELS = (
    Label(value=1, name="liver", colour=(230, 159, 0)),
    Label(value=7, name="lesion", colour=(86, 180, 233)),
)
NETWORK = residual_unet.Config(
    width=4, blocks=(1,), strides=((1, 1, 1), (2, 2, 2)), kernels=((3, 3, 3), (3, 3, 3)),
)  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Windows of 16 voxels are slower on many threads than on one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., Plan]:
    """A plan with two labels, for so many channels."""

    def made(channels: tuple[str, ...] = ("mr",)) -> Plan:
        return Plan(
            name="tiny",
            channels=channels,
            labels=LABELS,
            steps=(
                Orient(),
                Resample(spacing_mm=(2.0, 2.0, 3.0)),
                Normalise(channels=tuple(Scale(by="scan") for _ in channels)),
                Pad(shape=(16, 16, 16)),
            ),
            spacing_mm=(2.0, 2.0, 3.0),
            patch=(16, 16, 16),
            batch=2,
            dataset="ab" * 32,
            recipe=Recipe(mirror=(True, True, True)),
        )

    return made


@pytest.fixture(scope="session")
def make_package(make_plan: Callable[..., Plan]) -> Callable[..., ModelPackage]:
    """A package in that folder, with one untrained fold: the seed is the fold's number."""

    def made(folder: Path, channels: tuple[str, ...] = ("mr",), fold: int = 0) -> ModelPackage:
        with torch.random.fork_rng():
            torch.manual_seed(fold)
            network = residual_unet.build(NETWORK, channels=len(channels), classes=3)
        return package.save(
            folder, network=network, name="tiny", network_name="residual_unet", network_config=encode(NETWORK),
            plan=make_plan(channels), fold_number=fold,
            fold=Fold(
                weights=f"weights-fold{fold}.safetensors", dice={"liver": 0.8 + fold / 10}, cases_trained=4,
                cases_held_out=1, epochs=3, minutes=0.1, seed=fold,
            ),
        )  # fmt: skip

    return made


@pytest.fixture(scope="session")
def tiny(make_package: Callable[..., ModelPackage], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of one channel. Nobody writes into it."""
    return make_package(tmp_path_factory.mktemp("packages") / "tiny").folder


@pytest.fixture(scope="session")
def tiny_pair(make_package: Callable[..., ModelPackage], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of the channels t1 and t2."""
    return make_package(tmp_path_factory.mktemp("packages") / "pair", ("t1", "t2")).folder


@pytest.fixture(scope="session")
def make_scan() -> Callable[..., Volume]:
    """A blob in noise on an oblique, anisotropic grid of 14 x 18 x 11 voxels; right-handed, as DICOM needs it."""

    def made(seed: int = 0, channels: int = 1, shape: tuple[int, int, int] = (14, 18, 11)) -> Volume:
        rng = np.random.default_rng(seed)
        angle = 0.2 + seed / 50
        turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
        affine = np.eye(4)
        affine[:3, :3] = np.diag([-1, -1, 1]) @ turn @ np.diag([1.9, 2.1, 3.2])
        affine[:3, 3] = rng.uniform(-30, 30, 3)
        away = np.linalg.norm(np.indices(shape) - np.array(shape)[:, None, None, None] / 2, axis=0)
        voxels = rng.normal(100, 10, (channels, *shape)) + 200 * (away < 4)
        names = tuple(str(number) for number in range(channels))
        return Volume(voxels=voxels.astype(np.int16), geometry=Geometry(shape=shape, affine=affine), channels=names)

    return made


@pytest.fixture(scope="session")
def scan_file(make_scan: Callable[..., Volume]) -> Callable[..., Path]:
    """Such a scan, written where it is wanted."""

    def written(path: Path, seed: int = 0, channels: int = 1) -> Path:
        files.write(make_scan(seed, channels), path)
        return path

    return written
