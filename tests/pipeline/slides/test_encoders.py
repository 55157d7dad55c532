"""Encoders: formulas that separate what looks different, and networks that answer with weights somebody trained, or not at all."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from jaxtyping import Float32, UInt8
from safetensors.torch import save_file
from torchvision.transforms import functional as pictures_of

from pipeline.errors import UsageError
from pipeline.slides import texture
from pipeline.slides.encoders import Encoder, load_encoder
from preprocessing import slide_phantoms

CPU = torch.device("cpu")


def noise(tiles: int, side: int, seed: int = 0) -> UInt8[np.ndarray, "tile h w 3"]:
    return np.random.default_rng(seed).integers(0, 256, (tiles, side, side, 3), dtype=np.uint8)


def tiles_of_phantom(seed: int) -> tuple[UInt8[np.ndarray, "tile h w 3"], np.ndarray]:
    """Tiles wholly inside lesions and tiles of healthy tissue, and which are which."""
    phantom = slide_phantoms.slide(seed, size_um=(1000.0, 850.0), lesions=1)
    rng = np.random.default_rng(seed)
    half = 56.0
    places: list[tuple[float, float, bool]] = []
    for lesion in phantom.lesions:
        reach = lesion.radius_um - half * np.sqrt(2)
        turns = rng.uniform(0, 2 * np.pi, 5)
        places += [(lesion.x_um + reach * np.cos(a), lesion.y_um + reach * np.sin(a), True) for a in turns]
    while sum(not sick for *_, sick in places) < 12:
        x, y = rng.uniform(half, 1000 - half), rng.uniform(half, 850 - half)
        away = min(np.hypot(x - lesion.x_um, y - lesion.y_um) - lesion.radius_um for lesion in phantom.lesions)
        if away > 80 and phantom.subject.depth_um(np.array([x]), np.array([y]))[0, 0] > 40:
            places.append((x, y, False))
    tiles = [phantom.region(x - half, y - half, 2 * half, 2 * half, (224, 224)) for x, y, _ in places]
    return np.stack(tiles), np.array([sick for *_, sick in places])


def test_tiles_with_a_lesion_separate_linearly_from_those_without_also_on_slides_never_seen() -> None:
    encoder = load_encoder("hilum_texture", CPU)
    assert "only for trying out" in encoder.caution
    found = [(encoder.embed(tiles), sick) for tiles, sick in map(tiles_of_phantom, range(5))]
    features, sick = (np.concatenate(parts) for parts in zip(*found[:3], strict=True))
    mean, sd = features.mean(0), features.std(0) + 1e-6
    design = np.column_stack([(features - mean) / sd, np.ones(len(sick))])
    # ridge regression onto -1 and 1, by its normal equations
    weights = np.linalg.solve(design.T @ design + np.eye(design.shape[1]), design.T @ np.where(sick, 1.0, -1.0))
    for unseen, truth in found[3:]:
        said = np.column_stack([(unseen - mean) / sd, np.ones(len(truth))]) @ weights > 0
        assert truth.any() and (~truth).any()
        assert np.mean([said[truth].mean(), (~said[~truth]).mean()]) > 0.97, "balanced accuracy"


def test_a_pure_stain_of_known_density_is_told_from_the_others() -> None:
    density = 0.5
    for number, stain in enumerate((texture.HAEMATOXYLIN, texture.EOSIN)):
        direction = np.array(stain) / np.linalg.norm(stain)
        colour = np.rint(256 * 10 ** (-density * direction) - 1).astype(np.uint8)  # Beer and Lambert
        features = load_encoder("hilum_texture", CPU).embed(np.broadcast_to(colour, (1, 64, 64, 3)).copy())[0]
        means = features[:3] / 4 + 0.3
        expected = np.zeros(3)
        expected[number] = density
        np.testing.assert_allclose(means, expected, atol=0.01)


def test_a_tile_turned_or_mirrored_has_the_same_texture() -> None:
    encoder = load_encoder("hilum_texture", CPU)
    tile = slide_phantoms.slide(1, size_um=(800.0, 600.0)).region(350.0, 250.0, 112.0, 112.0, (224, 224))
    turned = np.stack([tile, np.rot90(tile), tile[::-1], tile[:, ::-1]])
    features = encoder.embed(np.ascontiguousarray(turned))
    np.testing.assert_allclose(features[1:], np.broadcast_to(features[0], (3, encoder.dimensions)), atol=2e-3)


def test_every_tile_gets_finite_numbers_of_modest_size_whatever_it_shows() -> None:
    encoder = load_encoder("hilum_texture", CPU)
    odd = np.stack([np.zeros((224, 224, 3), np.uint8), np.full((224, 224, 3), 255, np.uint8), noise(1, 224)[0]])
    features = encoder.embed(odd)
    assert features.shape == (3, encoder.dimensions) and features.dtype == np.float32
    assert np.isfinite(features).all() and np.abs(features).max() <= texture.MOST_NUMBER


def test_the_same_picture_gives_the_same_numbers_in_every_version_of_that_name() -> None:
    """Where this fails and the change is meant, raise the number in texture.SHA256: features on disks are no longer ours."""
    row, column, channel = np.ogrid[:96, :96, :3]
    picture = ((row * row // 5 + column * 7 + row * column // 11 + channel * 60) % 256).astype(np.uint8)
    features = load_encoder("hilum_texture", CPU).embed(picture[None])[0]
    assert texture.SHA256.startswith("08adccfa")
    np.testing.assert_allclose(features[::8], GOLDEN, atol=2e-3)


GOLDEN = [1.969, 1.939, 2.391, -0.064, -0.051, -0.455, 1.993, 1.891, 1.898, 1.436, 1.071, -0.007, 0.799, -1.875]


def test_too_small_a_picture_is_refused_before_anything_is_read() -> None:
    with pytest.raises(UsageError, match="32 or more"):
        load_encoder("hilum_texture", CPU).refuse_size(31)
    load_encoder("hilum_texture", CPU).refuse_size(33)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of timm's smallest residual network, with its head, as they are downloaded; made up here."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    return path


def as_torchvision_shows(network: torch.nn.Module, tiles: UInt8[np.ndarray, "b h w 3"]) -> Float32[np.ndarray, "b d"]:
    shown = torch.stack([pictures_of.to_tensor(tile) for tile in tiles])
    shown = pictures_of.normalize(shown, network.pretrained_cfg["mean"], network.pretrained_cfg["std"])
    with torch.no_grad():
        return network.eval()(shown).numpy()


def test_a_network_answers_as_timm_and_torchvision_say(weights: Path) -> None:
    encoder = load_encoder(f"timm:test_resnet@{weights}", CPU)
    network = timm.create_model("test_resnet", num_classes=0, checkpoint_path="")
    stored = {n: w for n, w in timm.models.load_state_dict(str(weights)).items() if not n.startswith("fc.")}
    network.load_state_dict(stored)
    tiles = noise(3, 160)
    np.testing.assert_allclose(encoder.embed(tiles), as_torchvision_shows(network, tiles), atol=1e-5)
    assert encoder.id == "timm:test_resnet" and encoder.dimensions == 96 and encoder.caution == ""
    encoder.refuse_size(224)  # a network of convolutions takes any


def test_the_same_weights_are_one_encoder_whatever_file_they_come_in(weights: Path, tmp_path: Path) -> None:
    stored = timm.models.load_state_dict(str(weights))
    torch.save({"state_dict": stored}, tmp_path / "resnet.pth")
    first, second = (load_encoder(f"timm:test_resnet@{path}", CPU) for path in (weights, tmp_path / "resnet.pth"))
    assert first.sha256 == second.sha256
    torch.save(stored | {"conv1.0.weight": stored["conv1.0.weight"] + 1e-3}, tmp_path / "other.pth")
    assert load_encoder(f"timm:test_resnet@{tmp_path / 'other.pth'}", CPU).sha256 != first.sha256


def test_no_network_answers_with_weights_that_nobody_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("timm:test_resnet", "timm:resnet18", "timm:hf-hub:somebody/encoder"):
        with pytest.raises(UsageError, match="downloads none"):
            load_encoder(name, CPU)


def test_weights_that_an_earlier_program_fetched_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    name = Path(timm.get_pretrained_cfg("resnet10t").url).name
    (tmp_path / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "torch" / "hub" / "checkpoints" / name)
    assert load_encoder("timm:resnet10t", CPU).dimensions == 512


@pytest.fixture
def downloaded(tmp_path: Path) -> Path:
    """A transformer as the hub gives it: what it is, and its weights. One that timm would not build without being told."""
    told = {
        "architecture": "test_vit",
        "model_args": {"init_values": 1e-5, "img_size": 96},
        "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "input_size": [3, 96, 96]},
    }
    folder = tmp_path / "hub-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(told))
    torch.manual_seed(1)
    save_file(timm.create_model("test_vit", **told["model_args"]).state_dict(), folder / "model.safetensors")
    return folder


def test_a_downloaded_model_is_built_as_its_folder_says(downloaded: Path) -> None:
    encoder = load_encoder(f"timm:{downloaded}", CPU)
    assert encoder.id == "timm:test_vit" and str(downloaded) not in encoder.id
    network = timm.create_model("test_vit", num_classes=0, init_values=1e-5, img_size=96)
    stored = timm.models.load_state_dict(str(downloaded / "model.safetensors"))
    network.load_state_dict({name: weight for name, weight in stored.items() if not name.startswith("head.")})
    network.pretrained_cfg |= {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    np.testing.assert_allclose(encoder.embed(noise(2, 96)), as_torchvision_shows(network, noise(2, 96)), atol=1e-5)
    with pytest.raises(UsageError, match="takes 96"):
        encoder.refuse_size(224)


class Trap:
    """What a pickle can do to whoever opens it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("texture", "hilum_texture, timm:NAME"),
        ("timm:", "hilum_texture, timm:NAME"),
        ("timm:resnet8888", "timm has no network"),
        ("timm:test_resnet@{folder}/nothing.safetensors", "is no file"),
        ("timm:test_vit@{weights}", "does not fit timm:test_vit"),
        ("timm:test_resnet@{folder}/damaged.safetensors", "cannot be read as weights"),
        ("timm:test_resnet@{folder}/trap.pth", "cannot be read as weights"),
        ("timm:{folder}", "config.json"),
    ],
)
def test_a_mistake_in_the_name_of_an_encoder_is_told(weights: Path, tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "damaged.safetensors").write_bytes(weights.read_bytes()[:-64])
    (tmp_path / "trap.pth").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(UsageError, match=told):
        load_encoder(name.format(folder=tmp_path, weights=weights), CPU)
    assert not (tmp_path / "sprung").exists(), "a file of weights is read, never run"


def test_an_encoder_that_gives_a_map_for_each_tile_is_refused(tmp_path: Path) -> None:
    told = {"architecture": "test_resnet", "model_args": {"global_pool": ""}}
    (tmp_path / "config.json").write_text(json.dumps(told))
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="network that pools"):
        load_encoder(f"timm:{tmp_path}", CPU)


def test_pictures_are_embedded_one_like_the_other(weights: Path) -> None:
    encoder: Encoder = load_encoder(f"timm:test_resnet@{weights}", CPU)
    tiles = noise(5, 64)
    alone = np.concatenate([encoder.embed(tiles[n : n + 1]) for n in range(5)])
    np.testing.assert_allclose(encoder.embed(tiles), alone, atol=1e-5)
