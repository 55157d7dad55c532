"""A package whose answer is known: one number per tile tells lesions apart, found by least squares on two phantoms."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from networks import mil_abmil, tile_context
from pipeline.config import SlideFeatures
from pipeline.slides import package
from pipeline.slides.encoders import load_encoder
from pipeline.slides.feature_file import FeatureFile
from pipeline.slides.features import features_of
from pipeline.slides.package import Member, SlidePackage, SlideRecord
from pipeline.slides.scores import Judged, score
from preprocessing import slide_phantoms
from preprocessing.slide_phantoms import PhantomSlide
from preprocessing.slides import SlideFile

SIZE_UM = (1000.0, 800.0)
TILES = SlideFeatures(tile_um=112.0, tile_px=112)
TEMPERATURE = 1.5
CLASSES = ("healthy", "lesion")


def a_slide(folder: Path, seed: int, microns_per_pixel: float = 0.5, lesions: int = 1) -> tuple[Path, PhantomSlide]:
    """A phantom on disk, and what is known of it."""
    drawn = slide_phantoms.slide(seed, microns_per_pixel=microns_per_pixel, size_um=SIZE_UM, lesions=lesions)
    folder.mkdir(exist_ok=True)
    return slide_phantoms.write(drawn, folder / f"{drawn.id}.tiff"), drawn


def a_package(folder: Path) -> SlidePackage:
    """ABMIL of one unit that answers to lesions, and attention that follows it."""
    samples, truth = [], []
    for seed in (90, 91):
        path, drawn = a_slide(folder / "slides", seed)
        file = features_of(
            SlideFile(path=path, id=drawn.id), load_encoder("hilum_texture", torch.device("cpu")), TILES, folder
        )
        away = np.hypot(*(file.positions_um + 56 - (drawn.lesions[0].x_um, drawn.lesions[0].y_um)).T)
        clear = (away < drawn.lesions[0].radius_um - 50) | (away > drawn.lesions[0].radius_um + 90)
        samples.append(np.asarray(file.features(), np.float64)[clear])
        truth.append(np.where(away < drawn.lesions[0].radius_um, 1.0, -0.3)[clear])
    return _saved(folder / "package", file, _direction(np.concatenate(samples), np.concatenate(truth)))


def _direction(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    spread = x.std(axis=0) + 1e-3
    scaled = x / spread
    weights = np.linalg.solve(scaled.T @ scaled + 1.0 * np.eye(x.shape[1]), scaled.T @ y)
    return weights / spread


def _saved(folder: Path, file: FeatureFile, direction: np.ndarray) -> SlidePackage:
    config = {"width": 2, "hidden": 1}
    network = mil_abmil.build(mil_abmil.Config(**config), features=file.recipe.dimensions, classes=2)
    with torch.no_grad():
        for weights in network.parameters():
            weights.zero_()
        network.project[0].weight[0] = torch.from_numpy(direction)
        network.attention.v.weight[0, 0], network.attention.w.weight[0, 0] = 1.0, 8.0
        network.head.weight[0, 0], network.head.weight[1, 0] = -6.0, 6.0
        network.head.bias[:] = torch.tensor([0.6, -0.6])
    return _sealed(folder, file, network, "slides", "mil_abmil", config)


def a_tile_package(folder: Path, recipe_of: SlidePackage) -> SlidePackage:
    """A network that names tiles, with weights nobody trained, for the same features."""
    config = {"context": 3, "width": 8, "layers": 1, "heads": 1}
    with torch.random.fork_rng():
        torch.manual_seed(4)  # of which both classes are named
        features = recipe_of.record.recipe.dimensions
        network = tile_context.build(tile_context.Config(**config), features=features, classes=2)
    return _sealed(folder, recipe_of.record, network, "tiles", "tile_context", config)


def _sealed(
    folder: Path, of: FeatureFile | SlideRecord, network: torch.nn.Module, kind: str, name: str, config: dict
) -> SlidePackage:
    judged = Judged(
        truth=np.array([0, 1]), logits=np.array([[2.0, 0], [0, 2.0]]), temperatures=np.ones(2),
        folds=np.zeros(2, np.int64), patients=("a", "b"),
    )  # fmt: skip
    member = Member(
        weights="weights-member0.safetensors", slides_trained=2, patients_trained=2, slides_held_out=0,
        patients_held_out=0, epochs=1, chosen_epoch=1, loss_trained=0.1, loss_held_out=0.1, seed=0,
    )  # fmt: skip
    record = SlideRecord(
        format=package.FORMAT, kind=kind, hilum="test", name="known", created="2026-01-01T00:00:00", network=name,
        network_config=config, classes=CLASSES, recipe=of.recipe, members=(member,), temperature=TEMPERATURE,
        scores=score(judged, CLASSES), slides={"healthy": 1, "lesion": 1}, patients={"healthy": 1, "lesion": 1}, folds=2,
        inner_folds=2, temperatures=(TEMPERATURE, TEMPERATURE), dataset="ab" * 32, training={}, versions={},
    )  # fmt: skip

    def fill(building: Path) -> None:
        save_file(
            {name: weight.contiguous() for name, weight in network.state_dict().items()}, building / member.weights
        )

    return package.save(folder, record, fill)
