"""A MONAI bundle imported says what MONAI says; what cannot be done exactly is refused by name, and nothing in it is run."""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.nets import UNet

from pipeline import cli
from pipeline.bundle_steps import ending, preparation
from pipeline.bundle_words import Words
from pipeline.bundle_writing import export_monai
from pipeline.bundles import Wishes, import_monai
from pipeline.errors import PackageError, UsageError
from pipeline.package import ModelPackage
from pipeline.postprocessing import Largest
from pipeline.prediction import Inference, segment_volume
from preprocessing import files
from preprocessing.steps import prepare
from preprocessing.volume import Geometry, Volume

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

KNOWN = Wishes(spacing_mm=(1.0, 1.0, 1.0))
RANGE = {
    "_target_": "ScaleIntensityRanged",
    "keys": "image",
    "a_min": -50,
    "a_max": 350,
    "b_min": -1,
    "b_max": 1,
    "clip": True,
}
NETWORK = {
    "_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": "@classes", "channels": [4, 8], "strides": [2],
    "norm": "batch",
}  # fmt: skip
READING = [{"_target_": "LoadImaged", "keys": "@image_key"}, {"_target_": "EnsureChannelFirstd", "keys": "image"}]


def inference(*transforms: dict[str, Any]) -> dict[str, Any]:
    """A configuration as the bundles of MONAI's model zoo have it, references, expressions and all."""
    return {
        "imports": ["$import glob"],
        "bundle_root": "/workspace",
        "image_key": "image",
        "classes": 3,
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "datalist": "$list(sorted(glob.glob(@bundle_root + '/*.nii.gz')))",
        "network_def": NETWORK,
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": [*READING, *transforms]},
        "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [16, 16, 12], "sw_batch_size": 4, "overlap": 0.5},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Activationsd", "keys": "pred", "softmax": True},
                {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image"},
                {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
                {"_target_": "SaveImaged", "keys": "pred", "output_dir": "$@bundle_root + '/eval'"},
            ],
        },
    }


METADATA = {
    "version": "0.1.0",
    "monai_version": "1.4.0",
    "name": "two organs",
    "network_data_format": {
        "inputs": {"image": {"num_channels": 1, "channel_def": {"0": "ct"}}},
        "outputs": {"pred": {"channel_def": {"0": "background", "1": "liver", "2": "spleen"}}},
    },
}


def make_bundle(folder: Path, config: dict[str, Any], metadata: dict[str, Any] = METADATA, weights: Any = None) -> Path:
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
    torch.save(trained().state_dict() if weights is None else weights, folder / "models" / "model.pt")
    return folder


def trained(classes: int = 3) -> UNet:
    """A network of MONAI's with weights, and means and deviations, that differ from any it starts with."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = UNet(3, 1, classes, channels=[4, 8], strides=[2], norm="batch")
        for _ in range(3):
            network(torch.randn(2, 1, 16, 16, 12) * 3 + 1)
    return network.eval()


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> ModelPackage:
    folder = tmp_path_factory.mktemp("bundles")
    bundle = make_bundle(
        folder / "bundle", inference({"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"}, RANGE)
    )
    assert cli.main(["import", "monai", str(bundle), "--out", str(folder / "package"), "--spacing-mm", "[1,1,1]"]) == 0
    return ModelPackage.load(folder / "package")


def test_logits_are_monais_to_the_bit(imported) -> None:
    (network,) = imported.networks()
    windows = torch.randn(2, 1, *imported.plan.patch)
    with torch.no_grad():
        assert torch.equal(network(windows), trained()(windows))


def test_channels_labels_and_windows_are_those_the_bundle_names(imported) -> None:
    plan = imported.plan
    assert imported.name == "two organs" and plan.channels == ("ct",) and plan.patch == (16, 16, 12)
    assert {label.name: label.value for label in plan.labels} == {"liver": 1, "spleen": 2} and not plan.has_regions
    text = (imported.folder / "card.md").read_text()
    assert "A MONAI bundle, version 0.1.0, made with MONAI 1.4.0, imported." in text


def test_a_scan_of_one_window_has_the_labels_monai_gives_it(imported, tmp_path) -> None:
    path = write_scan(tmp_path / "scan.nii.gz", shape=(16, 12, 16))  # a window, once it is turned
    parser = ConfigParser(inference({"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"}, RANGE))
    with torch.no_grad():
        theirs = trained()(parser.get_parsed_content("preprocessing")({"image": str(path)})["image"][None]).argmax(1)
    scan = files.read(path)
    found = segment_volume(scan, imported.networks(), imported.plan, Inference(), imported.id).labels
    turned, _ = prepare(found, imported.plan.steps[:1])  # MONAI's lie as the network sees them
    assert len(np.unique(found.voxels)) > 1
    assert (turned.voxels[0] == theirs[0].numpy()).all()


def write_scan(path: Path, shape: tuple[int, int, int] = (18, 13, 11)) -> Path:
    """A CT of noise whose axes run towards Left, Superior and Anterior."""
    affine = np.array([[-1.5, 0, 0, 7], [0, 0, 2.0, -3], [0, 1.2, 0, 40], [0, 0, 0, 1.0]])
    voxels = np.random.default_rng(3).normal(80, 150, (1, *shape)).astype(np.int16)
    files.write(Volume(voxels=voxels, geometry=Geometry(shape=shape, affine=affine), channels=("ct",)), path)
    return path


EXACT = {
    "turned": [{"_target_": "Orientationd", "keys": ["image"], "axcodes": "LPS"}],
    "range": [RANGE],
    "unclipped": [RANGE | {"clip": False}],
    "its own mean": [{"_target_": "NormalizeIntensityd", "keys": "image", "channel_wise": True}],
    "a given mean": [{"_target_": "NormalizeIntensityD", "keys": "image", "subtrahend": 70, "divisor": "$40.5"}],
    "to one": [{"_target_": "ScaleIntensityd", "keys": "image"}],
    "padded": [{"_target_": "SpatialPadDict", "keys": "image", "spatial_size": [20, 16, -1]}, RANGE],
    "switched off": [{"_target_": "Lambdad", "keys": "image", "func": "$print", "_disabled_": True}, RANGE],
}


@pytest.mark.parametrize("name", EXACT)
def test_a_transform_that_is_imported_does_what_monai_does(name, tmp_path) -> None:
    config = inference(*EXACT[name])
    path = write_scan(tmp_path / "scan.nii.gz")
    theirs = ConfigParser(config).get_parsed_content("preprocessing")({"image": str(path)})["image"].numpy()
    ours, _ = prepare(files.read(path), preparation(Words(file="inference.json", said=config), 1, "").steps)
    np.testing.assert_allclose(ours.voxels, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        ({"_target_": "Spacingd", "pixdim": [1, 1, 1]}, "Spacingd.*--resample hilum"),
        ({"_target_": "CropForegroundd", "source_key": "image"}, "CropForegroundd.*no step that does exactly that"),
        ({"_target_": "Lambdad", "func": "$lambda x: x"}, "Lambdad"),
        ({"_target_": "scripts.mine.Mined"}, "scripts.mine.Mined"),
        ({"_target_": "NormalizeIntensityd", "nonzero": True, "channel_wise": True}, "NormalizeIntensityd.*not zero"),
        (RANGE | {"b_min": None}, "b_min"),
        ({"_target_": "ScaleIntensityd", "factor": 0.1}, "factor"),
        ({"_target_": "SpatialPadd", "spatial_size": [9, 9, 9], "mode": "edge"}, "zeros"),
        ({"_target_": "Orientationd", "axcodes": "RAX"}, "orientation 'RAX'"),
        ({"_target_": "ScaleIntensityd", "keys": ["image", "other"]}, "keys"),
        ({"_target_": "Orientationd", "axcodes": "$'RA' + 'S'"}, "Python, which an import does not run"),
    ],
)
def test_a_transform_that_cannot_be_done_exactly_is_refused_by_name(transform, words) -> None:
    said = Words(file="inference.json", said=inference({"keys": "image"} | transform))
    with pytest.raises((UsageError, PackageError), match=words):
        preparation(said, 1, "")


def test_hilums_resampling_in_the_place_of_monais_is_asked_for_and_said() -> None:
    spacing = {"_target_": "Spacingd", "keys": "image", "pixdim": [1.5, 1.5, 2], "mode": "bilinear"}
    made = preparation(Words(file="inference.json", said=inference(spacing)), 1, "hilum")
    assert made.spacing_mm == (1.5, 1.5, 2.0) and made.steps[0].spacing_mm == (1.5, 1.5, 2.0)
    assert "not by MONAI's" in made.notes[0]


def ends_with(*transforms: dict[str, Any]) -> Words:
    return Words(
        file="inference.json",
        said=inference() | {"postprocessing": {"_target_": "Compose", "transforms": list(transforms)}},
    )


SIGMOID = {"_target_": "Activationsd", "keys": "pred", "sigmoid": True}
LARGEST = {"_target_": "KeepLargestConnectedComponentd", "keys": "pred", "applied_labels": [1]}


def test_a_sigmoid_makes_regions_and_a_softmax_makes_labels() -> None:
    assert ending(ends_with(SIGMOID, {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5})).regions
    assert not ending(Words(file="inference.json", said=inference())).regions
    for odd, words in (
        ([SIGMOID, {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.3}], "threshold is 0.3"),
        ([], "decides by nothing"),
        ([{"_target_": "FillHolesd", "keys": "pred"}], "FillHolesd"),
        ([SIGMOID, LARGEST | {"num_components": 2}], "hilum keeps"),
    ):
        with pytest.raises((UsageError, PackageError), match=words):
            ending(ends_with(*odd))


def test_regions_rules_and_wrapped_weights_come_along(tmp_path) -> None:
    config = inference(RANGE) | {"classes": 2, "postprocessing": [SIGMOID, LARGEST]}
    metadata = METADATA | {
        "network_data_format": {
            "inputs": {"image": {"channel_def": {"0": "flair"}}},
            "outputs": {"pred": {"channel_def": {"0": "whole tumour", "1": "core"}}},
        }
    }
    state = {f"module.{name}": tensor for name, tensor in trained(2).state_dict().items()}
    bundle = make_bundle(tmp_path / "bundle", config, metadata, {"model": state, "epoch": 3})
    package = import_monai(bundle, tmp_path / "package", KNOWN)
    assert package.plan.has_regions and [label.name for label in package.plan.labels] == ["whole tumour", "core"]
    assert package.rules == (Largest(label="whole tumour"),)
    assert "nobody measured it here" in (package.folder / "card.md").read_text()
    (network,), windows = package.networks(), torch.randn(1, 1, 16, 16, 12)
    with torch.no_grad():
        assert torch.equal(network(windows), trained(2)(windows))


def test_weights_that_lie_in_torchscript_alone_come_along_too(tmp_path) -> None:
    bundle = make_bundle(tmp_path / "bundle", inference(RANGE))
    (bundle / "models" / "model.pt").unlink()
    torch.jit.save(torch.jit.trace(trained(), torch.zeros(1, 1, 16, 16, 12)), bundle / "models" / "model.ts")
    (network,) = import_monai(bundle, tmp_path / "package", KNOWN).networks()
    windows = torch.randn(1, 1, 16, 16, 12)
    with torch.no_grad():
        assert torch.equal(network(windows), trained()(windows))


class Trap:
    """What a pickle can hold."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.path}",))


def test_a_checkpoint_that_would_run_something_is_refused_unrun(tmp_path) -> None:
    bundle = make_bundle(tmp_path / "bundle", inference(RANGE))
    (bundle / "models" / "model.pt").write_bytes(pickle.dumps({"a": Trap(tmp_path / "sprung")}))
    with pytest.raises(PackageError, match=r"model\.pt was not read"):
        import_monai(bundle, tmp_path / "package", KNOWN)
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "package").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ("$__import__('os').system('touch sprung')", "Python, which an import does not run"),
        ({"_target_": "os.system", "command": "touch sprung"}, "builds os.system"),
        ({"_target_": "scripts.unet.UNet"}, "builds scripts.unet.UNet"),
        ({"_target_": "monai.networks.nets.DiNTS"}, "builds monai.networks.nets.DiNTS"),
        (NETWORK | {"channels": "$[2 ** n for n in (2, 3)]"}, "Python, which an import does not run"),
        (NETWORK | {"spatial_dims": 2}, "one of volumes"),
        (NETWORK | {"channels": {"_target_": "os.getcwd"}}, "neither numbers, words"),
        (NETWORK | {"chanels": [4]}, "does not know"),
        ("@nowhere::else", "nothing is called nowhere"),
        ("@network_def", "in a circle"),
        ("%network.json::net", "not fetched"),
    ],
)
def test_nothing_but_a_listed_network_is_made_and_no_expression_is_run(network, words, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = make_bundle(tmp_path / "bundle", inference(RANGE) | {"network_def": network})
    with pytest.raises((UsageError, PackageError), match=words):
        import_monai(bundle, tmp_path / "package", KNOWN)
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "package").exists()


def test_references_and_literals_are_followed_wherever_they_lead() -> None:
    said = {"a": {"b": [3, {"c": "@d"}]}, "d": "$@e::f", "e": {"f": "$(1, 2.5)"}, "g": "text", "h": "$-1e-3"}
    words = Words(file="inference.json", said=said)
    assert words.value("@a::b::1::c") == (1, 2.5) and words.value("$ @a#b#0") == 3
    assert words.value(["@g", "$None", "$'@g'"]) == ["text", None, "@g"] and words.find("x", "h") == -1e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: shutil.rmtree(folder / "models"), "the weights are needed"),
        (lambda folder: (folder / "configs" / "inference.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "configs" / "inference.json").unlink(), "a MONAI bundle is needed"),
        (lambda folder: (folder / "configs" / "metadata.json").write_text("{}"), "a name for each is needed"),
        (
            lambda folder: torch.save(trained(2).state_dict(), folder / "models" / "model.pt"),
            "no weights of the network",
        ),
    ],
)
def test_a_bundle_that_lacks_something_is_refused_and_nothing_is_left(change, words, tmp_path) -> None:
    bundle = make_bundle(tmp_path / "bundle", inference(RANGE))
    change(bundle)
    with pytest.raises((UsageError, PackageError), match=words):
        import_monai(bundle, tmp_path / "package", KNOWN)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_voxel_size_that_nobody_says_is_asked_for(tmp_path) -> None:
    with pytest.raises(UsageError, match="--spacing-mm"):
        import_monai(make_bundle(tmp_path / "bundle", inference(RANGE)), tmp_path / "package")


@pytest.mark.parametrize("name", ["../../escaped.txt", "/absolute.txt", "bundle/..\\..\\escaped.txt", "C:/escaped.txt"])
def test_a_zip_that_leads_out_of_itself_is_refused(name, tmp_path) -> None:
    bundle = make_bundle(tmp_path / "in" / "bundle", inference(RANGE))
    packed = Path(shutil.make_archive(str(tmp_path / "bundle"), "zip", bundle.parent))
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr(name, "out")
    with pytest.raises(PackageError, match="leads out of it"):
        import_monai(packed, tmp_path / "package", KNOWN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle.zip", "in"]


def test_a_zip_with_a_link_in_it_is_refused(tmp_path) -> None:
    packed = tmp_path / "bundle.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        link = zipfile.ZipInfo("bundle/models/model.pt")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(PackageError, match="leads out of it"):
        import_monai(packed, tmp_path / "package", KNOWN)


def test_what_is_exported_to_monai_and_imported_again_answers_the_same(imported, tmp_path) -> None:
    (made,) = export_monai(imported, tmp_path / "bundle.zip")
    assert made.path == tmp_path / "bundle.zip" and made.agreement.difference == 0
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.zip"]
    again = import_monai(made.path, tmp_path / "again", KNOWN)
    (before,), (after,) = imported.networks(), again.networks()
    windows = torch.randn(2, 1, *imported.plan.patch)
    with torch.no_grad():
        assert torch.equal(before(windows), after(windows))
    assert again.plan.labels == imported.plan.labels and again.plan.channels == imported.plan.channels
    path = write_scan(tmp_path / "scan.nii.gz")
    one, other = (prepare(files.read(path), plan.steps)[0] for plan in (imported.plan, again.plan))
    np.testing.assert_allclose(one.voxels, other.voxels, rtol=1e-5, atol=1e-5)


def test_a_network_of_ours_runs_in_monai_without_hilum(tiny, tmp_path) -> None:
    """By MONAI's own `bundle run`: a scan whose voxels are the plan's, smaller than a window, so both see the same."""
    from monai.bundle import run

    package = ModelPackage.load(tiny)
    assert cli.main(["export", "monai", str(tiny), "--out", str(tmp_path / "bundle")]) == 0
    affine = np.diag([-2.0, -2.0, 3.0, 1])
    voxels = np.random.default_rng(0).normal(100, 30, (1, 14, 16, 11)).astype(np.int16)
    files.write(
        Volume(voxels=voxels, geometry=Geometry(shape=(14, 16, 11), affine=affine), channels=("mr",)),
        tmp_path / "scan.nii.gz",
    )
    run(
        config_file=str(tmp_path / "bundle" / "configs" / "inference.json"), bundle_root=str(tmp_path / "bundle"),
        datalist=[str(tmp_path / "scan.nii.gz")], output_dir=str(tmp_path / "out"), device="$torch.device('cpu')",
    )  # fmt: skip
    torch.set_grad_enabled(True)  # the bundle's `run` turns it off, as a process of its own would
    theirs = files.read(tmp_path / "out" / "scan" / "scan_seg.nii.gz")
    scan = files.read(tmp_path / "scan.nii.gz")
    ours = segment_volume(scan, package.networks(), package.plan, Inference(), package.id).labels
    assert set(np.unique(ours.voxels)) > {0} and theirs.geometry.matches(scan.geometry)
    assert (theirs.voxels == ours.voxels).mean() > 0.999
    said = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())
    for told in (said["description"], (tmp_path / "bundle" / "docs" / "README.md").read_text()):
        assert "half a voxel apart" in told and package.id in told  # what MONAI does otherwise, and whose it is
    names = said["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert names == {"0": "background", "1": "liver", "2": "lesion"} and said["hilum"]["package"] == package.id
