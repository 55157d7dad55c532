"""What nnU-Net v2 trained finds the same voxels here: compared with what nnU-Net itself said (tests/golden, made by
benchmarks/peers/nnunet_results.py), and refused where it could not be the same."""

import json
import pickle
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.description import show
from pipeline.errors import PackageError, UsageError
from pipeline.nnunet import import_nnunet, rules_of
from pipeline.nnunet_weights import renamed
from pipeline.package import ModelPackage, build_network
from pipeline.postprocessing import Largest, LargestOfAll
from pipeline.prediction import Found, Inference, segment_volume
from preprocessing.declared import declared
from preprocessing.nnunet_plans import AS_STORED, Translation, translated
from preprocessing.records import BadRecord
from preprocessing.steps import Pad, prepare
from preprocessing.volume import Geometry, Provenance, Volume

GOLDEN = Path(__file__).parents[1] / "golden" / "nnunet_results.npz"
NAMES = ("slices_far_apart", "regions_on_turned_axes", "slice_by_slice")


class Kept:
    """One of the trainings whose answers are kept."""

    def __init__(self, name: str) -> None:
        there = np.load(GOLDEN)
        self.parts = {key.removeprefix(f"{name}/"): there[key] for key in there.files if key.startswith(f"{name}/")}
        self.said: dict[str, Any] = json.loads(str(self.parts["said"]))
        self.shapes: dict[str, list[int]] = json.loads(str(self.parts["weights"]))

    @property
    def configuration(self) -> dict[str, Any]:
        """Of its plans.json, to be changed."""
        own: dict[str, Any] = self.said["plans"]["configurations"][self.said["configuration"]]
        return own

    def state(self, fold: int | str) -> dict[str, Tensor]:
        """Weights as nnU-Net's network says them: some of them twice."""
        flat, state, first = torch.from_numpy(self.parts[f"fold_{fold}"]).float(), {}, 0
        for key, shape in self.shapes.items():
            size = int(np.prod(shape))
            state[key] = flat[first : first + size].reshape(shape)
            first += size
        assert first == len(flat)
        copies = {f"decoder.{key}": tensor for key, tensor in state.items() if key.startswith("encoder.")}
        again = {key.replace(".conv.", ".all_modules.0."): tensor for key, tensor in state.items() if ".conv." in key}
        return {**state, **copies, **again}

    def write(self, folder: Path, name: Callable[[str], str] = lambda name: name, **more: Any) -> Path:
        """As nnU-Net leaves it, its log and optimiser included."""
        folder.mkdir(parents=True)
        (folder / "plans.json").write_text(json.dumps(self.said["plans"]))
        (folder / "dataset.json").write_text(json.dumps(self.said["dataset"]))
        for fold in self.said["folds"]:
            state = {name(key): tensor for key, tensor in self.state(fold).items()}
            (folder / f"fold_{fold}").mkdir()
            torch.save(self.checkpoint(state, fold) | more, folder / f"fold_{fold}" / "checkpoint_final.pth")
        return folder

    def checkpoint(self, state: Mapping[str, Tensor], fold: int | str) -> dict[str, Any]:
        weight = nn.Parameter(torch.zeros(3))
        return {
            "network_weights": dict(state),
            "optimizer_state": torch.optim.SGD([weight], 0.01, momentum=0.99).state_dict(),
            "grad_scaler_state": None,
            "logging": {
                "ema_fg_dice": [np.float64(0.5), np.float32(0.4)],
                "epoch_start_timestamps": [1000.0, 1060.0],
                "epoch_end_timestamps": [1060.0, 1120.0],
            },
            "_best_ema": np.float64(0.5),
            "current_epoch": 1000,
            "init_args": {"configuration": self.said["configuration"], "fold": fold, "device": torch.device("cuda")},
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": tuple(self.said["mirror"]),
        }

    @property
    def scan(self) -> Volume:
        voxels = self.parts["scan"]
        return Volume(
            voxels=voxels.astype(np.float32),
            geometry=Geometry(shape=voxels.shape[1:], affine=self.parts["affine"]),
            channels=tuple(self.said["dataset"]["channel_names"].values()),
            provenance=Provenance(sources=("golden",)),
        )


def translated_of(kept: Kept, orientation: str = AS_STORED) -> Translation:
    """Its plans in our words, without opening a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "dataset.json").write_text(json.dumps(kept.said["dataset"]))
        return translated(
            kept.said["plans"], kept.said["configuration"], declared(Path(folder)), mirrored=kept.said["mirror"],
            orientation=orientation,
        )  # fmt: skip


def in_our_order(theirs: np.ndarray, kept: Kept) -> np.ndarray:
    """[C, ...] along nnU-Net's axes, along those of the scan."""
    stored = theirs.transpose(0, *[axis + 1 for axis in kept.said["plans"]["transpose_backward"]])
    return stored.transpose(0, 3, 2, 1)


def found(package: ModelPackage, scan: Volume) -> Found:
    plan = package.plan
    how = Inference(flips=True, mirrors=plan.recipe.mirror, device="cpu")
    return segment_volume(scan, package.networks(), plan, how, package.id, rules=package.rules)


@pytest.fixture(scope="module", params=NAMES)
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Kept, ModelPackage]:
    folder = tmp_path_factory.mktemp(request.param)
    kept = Kept(request.param)
    return kept, import_nnunet(kept.write(folder / "results"), folder / "package")


def test_scans_are_prepared_as_nnunet_prepares_them(imported: tuple[Kept, ModelPackage]) -> None:
    kept, package = imported
    steps = [step for step in package.plan.steps if not isinstance(step, Pad)]
    prepared, _ = prepare(kept.scan, steps)
    np.testing.assert_allclose(prepared.voxels, in_our_order(kept.parts["prepared"], kept), atol=2e-5)


def test_labels_are_nnunets_with_its_folds_flips_and_windows(imported: tuple[Kept, ModelPackage]) -> None:
    kept, package = imported
    labels = found(package, kept.scan).labels.voxels[0]
    theirs = kept.parts["labels"].transpose(2, 1, 0)
    assert labels.shape == theirs.shape
    assert set(np.unique(theirs)) == set(range(len(package.plan.labels) + 1)), "the golden case shows every label"
    assert (labels == theirs).mean() >= 0.999


def test_what_a_package_says_of_its_origin_is_told(imported: tuple[Kept, ModelPackage]) -> None:
    kept, package = imported
    card = (package.folder / "card.md").read_text()
    assert "Trained by nnU-Net v2 (nnUNetTrainer, nnUNetPlans" in card
    assert "axes are taken as a file stores them" in card
    assert "1000 epochs, 2 minutes" in card and "seed" not in card
    assert kept.said["plans"]["dataset_name"] in show(package.folder)


def test_scans_that_were_turned_for_the_training_can_be_turned_here(tmp_path: Path) -> None:
    """The same body stored the other way round gives the same labels once the package knows how it was stored."""
    kept = Kept("slices_far_apart")
    package = import_nnunet(
        kept.write(tmp_path / "results"), tmp_path / "package", orientation=kept.scan.geometry.orientation
    )
    turned = replace_axes(kept.scan)
    assert turned.geometry.orientation != kept.scan.geometry.orientation
    labels = found(package, turned).labels.voxels[0].transpose(1, 2, 0)[::-1]
    assert (labels == kept.parts["labels"].transpose(2, 1, 0)).mean() >= 0.999


def replace_axes(scan: Volume) -> Volume:
    """k, i reversed, j."""
    voxels = scan.voxels[:, ::-1].transpose(0, 3, 1, 2)
    step = np.zeros((4, 4))
    step[2, 0] = step[1, 2] = step[3, 3] = 1
    step[0, 1], step[0, 3] = -1, scan.geometry.shape[0] - 1
    geometry = Geometry(shape=voxels.shape[1:], affine=scan.geometry.affine @ step)
    return scan.with_voxels(np.ascontiguousarray(voxels), geometry=geometry)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_weights_of_compiled_networks_and_of_several_gpus_are_the_same(prefix: str) -> None:
    kept = Kept("slice_by_slice")
    made = translated_of(kept)
    state = kept.state("all")
    plain = renamed(state, made)
    other = renamed({prefix + name: tensor for name, tensor in state.items()}, made)
    assert plain.keys() == other.keys()
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_the_old_form_of_plans_tells_the_same_network() -> None:
    kept = Kept("slices_far_apart")
    before = translated_of(kept)
    own = kept.configuration
    said = own.pop("architecture")["arch_kwargs"]
    own |= {
        "UNet_class_name": "PlainConvUNet", "UNet_base_num_features": 2, "unet_max_num_features": 320,
        "n_conv_per_stage_encoder": said["n_conv_per_stage"], "n_conv_per_stage_decoder": said["n_conv_per_stage_decoder"],
        "pool_op_kernel_sizes": said["strides"], "conv_kernel_sizes": said["kernel_sizes"], "num_pool_per_axis": [1, 2, 2],
    }  # fmt: skip
    after = translated_of(kept)
    assert built(after).state_dict().keys() == built(before).state_dict().keys()
    assert after.network | {"widest": 8} == before.network | {"widest": 8}, "a limit that no stage reaches says nothing"


def built(made: Translation) -> nn.Module:
    return build_network("residual_unet", made.network, made.plan)


def test_folds_are_those_that_are_asked_for_and_never_the_one_of_all_cases_by_itself(tmp_path: Path) -> None:
    """With what nnU-Net measured on held-out cases."""
    results = Kept("slices_far_apart").write(tmp_path / "results")
    (results / "fold_1").rename(results / "fold_all")
    (results / "fold_0" / "validation").mkdir()
    summary = {"mean": {"1": {"Dice": 0.75}, "2": {"Dice": float("nan")}}, "metric_per_case": [{}, {}]}
    (results / "fold_0" / "validation" / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UsageError, match=r"no checkpoint_final.pth of fold 3 .*: 0, all"):
        import_nnunet(results, tmp_path / "package", folds=("3",))
    folds = import_nnunet(results, tmp_path / "package").record.folds
    assert list(folds) == ["0"]
    assert (folds["0"].dice, folds["0"].cases_held_out, folds["0"].cases_trained) == ({"a": 0.75}, 2, 8)


def test_the_best_checkpoint_is_taken_where_it_is_asked_for_and_no_package_is_written_over(tmp_path: Path) -> None:
    results = Kept("slice_by_slice").write(tmp_path / "results")
    final = results / "fold_all" / "checkpoint_final.pth"
    final.rename(final.with_name("checkpoint_best.pth"))
    with pytest.raises(UsageError, match="--checkpoint best"):
        import_nnunet(results, tmp_path / "package")
    package = import_nnunet(results, tmp_path / "package", checkpoint="best")
    assert package.record.folds["all"].epochs == 1000
    with pytest.raises(UsageError, match="is there already"):
        import_nnunet(results, tmp_path / "package", checkpoint="best")
    assert ModelPackage.load(tmp_path / "package").id == package.id


# post-processing


def with_rules(results: Path, *steps: tuple[str, dict[str, Any]], told: bool = True) -> Path:
    """What nnUNetv2_determine_postprocessing leaves; its pickle would run if it were opened."""
    home = results / "crossval_results_folds_0_1"
    home.mkdir()
    (home / "postprocessing.pkl").write_bytes(pickle.dumps(Bomb(results / "it ran")))
    if told:
        dice = {"mean": {"1": {"Dice": 0.5}, "2": {"Dice": 0.6}}}
        said = {
            "input_folder": dice, "postprocessed": dice, "postprocessing_fns": [name for name, _ in steps],
            "postprocessing_kwargs": [how for _, how in steps],
        }  # fmt: skip
        (home / "postprocessing.json").write_text(json.dumps(said))
    return results


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.mark, "boom")


KEEP = "remove_all_but_largest_component_from_segmentation"


def test_rules_that_keep_the_largest_part_come_along_and_their_pickle_stays_shut(tmp_path: Path) -> None:
    kept = Kept("slices_far_apart")
    steps = (KEEP, {"labels_or_regions": [1, 2]}), (KEEP, {"labels_or_regions": 2})
    results = with_rules(kept.write(tmp_path / "results"), *steps)
    chosen, left_out = rules_of(results, ["1", "0"], translated_of(kept).plan)
    assert [one.rule for one in chosen] == [LargestOfAll(), Largest(label="b")]
    assert not left_out and not (results / "it ran").exists()


@pytest.mark.parametrize("steps", [[("fill_holes", {})], [(KEEP, {"labels_or_regions": [[1, 2], 2]})], []])
def test_other_rules_are_left_out_and_it_is_said(steps: list[tuple[str, dict[str, Any]]], tmp_path: Path) -> None:
    kept = Kept("slices_far_apart")
    results = with_rules(kept.write(tmp_path / "results"), *steps, told=bool(steps))
    chosen, left_out = rules_of(results, ["0", "1"], translated_of(kept).plan)
    assert chosen == () and "left out" in left_out[0]
    assert not (results / "it ran").exists()


def test_rules_that_were_chosen_for_other_folds_are_none_of_ours(tmp_path: Path) -> None:
    kept = Kept("slices_far_apart")
    results = with_rules(kept.write(tmp_path / "results"), (KEEP, {"labels_or_regions": [1, 2]}))
    assert rules_of(results, ["0"], translated_of(kept).plan) == ((), [])


# what is refused


def changed(kept: Kept, **more: Any) -> None:
    kept.configuration.update(more)


REFUSED: dict[str, tuple[Callable[[Kept], Any], str]] = {
    "a cascade": (lambda kept: changed(kept, previous_stage="3d_lowres"), "second stage of a cascade"),
    "another preprocessor": (lambda kept: changed(kept, preprocessor_name="Mine"), "preprocessor_name Mine"),
    "another way to resample": (lambda kept: changed(kept, resampling_fn_data="resample_torch_fornnunet"), "resample_torch"),
    "another order": (
        lambda kept: changed(kept, resampling_fn_probabilities_kwargs={"order": 3, "is_seg": False}), "resampling_fn_probabilities",
    ),
    "another norm of intensities": (lambda kept: changed(kept, normalization_schemes=["MyNormalization"]), "MyNormalization"),
    "more channels than are named": (
        lambda kept: changed(kept, normalization_schemes=["CTNormalization"] * 2, use_mask_for_norm=[False] * 2), "2 channels",
    ),
    "another network": (
        lambda kept: kept.configuration["architecture"].update(network_class_name="x.Primus"), "the network Primus",
    ),
    "another activation": (
        lambda kept: kept.configuration["architecture"]["arch_kwargs"].update(nonlin="torch.nn.ReLU"), "nonlin 'torch.nn.ReLU'",
    ),
    "squeeze and excitation": (
        lambda kept: kept.configuration["architecture"]["arch_kwargs"].update(squeeze_excitation=True), "squeeze_excitation",
    ),
    "pictures": (lambda kept: kept.said["plans"].update(image_reader_writer="NaturalImage2DIO"), "NaturalImage2DIO"),
    "values with a gap": (
        lambda kept: kept.said["dataset"].update(labels={"background": 0, "a": 1, "b": 3}), r"the values \[1, 3\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_could_not_be_the_same_is_refused_with_the_reason(what: str) -> None:
    kept = Kept("slices_far_apart")
    spoil, words = REFUSED[what]
    spoil(kept)
    with pytest.raises(BadRecord, match=words):
        translated_of(kept)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    kept = Kept("slices_far_apart")
    kept.said["dataset"]["labels"]["c"] = 3
    with pytest.raises(PackageError, match="fold 0 are not those of the network"):
        import_nnunet(kept.write(tmp_path / "results"), tmp_path / "package")
    assert [path.name for path in tmp_path.iterdir()] == ["results"], "nothing half made is left"


def test_a_checkpoint_that_would_run_something_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    results = Kept("slice_by_slice").write(tmp_path / "results", init_args=Bomb(mark))
    with pytest.raises(PackageError, match="anything else in it could run"):
        import_nnunet(results, tmp_path / "package")
    assert not mark.exists()


def test_the_folder_above_is_refused_with_the_names_of_those_inside(tmp_path: Path) -> None:
    Kept("slice_by_slice").write(tmp_path / "results")
    with pytest.raises(UsageError, match="There is results inside"):
        import_nnunet(tmp_path, tmp_path / "package")
