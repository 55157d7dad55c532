"""nnU-Net v2's own classes, asked for what hilum's import of them is measured by; runs under an interpreter that has them.

    python nnunet_results.py make SPECIFICATION.json FOLDER       a folder of results with random weights
    python nnunet_results.py answer FOLDER CASES OUT [--flips]    what nnU-Net makes of each case, in float32
    python nnunet_results.py window FOLDER WINDOW.npy OUT.npy     logits of one window
    python nnunet_results.py golden OUT.npz                       what tests/golden/nnunet_results.npz holds

nnU-Net keeps logits and weights of windows in half precision, which rounds some of them over a border between labels.
Here it is made to keep them in float32, so that what is left of a difference is one of method.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

for place in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
    os.environ.setdefault(place, tempfile.gettempdir())  # it wants to know them, and none is used


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("what", choices=("make", "answer", "window", "golden"))
    words.add_argument("paths", type=Path, nargs="+")
    words.add_argument("--flips", action="store_true")
    said = words.parse_args()
    if said.what == "make":
        make(json.loads(said.paths[0].read_text()), said.paths[1])
    elif said.what == "answer":
        answer(*said.paths, flips=said.flips)
    elif said.what == "window":
        np.save(said.paths[2], window(said.paths[0], np.load(said.paths[1])))
    else:
        golden(said.paths[0])
    print(json.dumps({"done": said.what}))


# what is planned


def specification(
    name: str, configuration: str, planned: Mapping[str, Any], *, channels: Sequence[str], labels: Mapping[str, Any],
    residual: bool, width: int, axes: Sequence[int] = (0, 1, 2), folds: Sequence[int | str] = (0,),
    mirror: Sequence[int] | None = None, order: Sequence[int] | None = None, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """A plans.json with one configuration, a dataset.json, and which folds to make up. `planned`: patch, spacing, strides,
    kernels, norm, masked, as tests/golden/nnunet_plans.json tells them."""
    strides, kernels = ([[int(n) for n in one] for one in planned[key].split()] for key in ("strides", "kernels"))
    stages, sides = len(strides), len(planned["patch"])
    widest = max(width, planned["widest"] * width // 32)
    blocks = [1, 3, 4, *[6] * stages][:stages] if residual else [2] * stages
    network: dict[str, Any] = {
        "n_stages": stages,
        "features_per_stage": [min(width * 2**stage, widest) for stage in range(stages)],
        "conv_op": f"torch.nn.modules.conv.Conv{sides}d",
        "kernel_sizes": kernels,
        "strides": strides,
        ("n_blocks_per_stage" if residual else "n_conv_per_stage"): blocks,
        "n_conv_per_stage_decoder": [1 if residual else 2] * (stages - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{sides}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    how = {"is_seg": False, "order_z": 0, "force_separate_z": None}
    own = {
        "data_identifier": configuration,
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": planned["patch"],
        "median_image_size_in_voxels": planned["patch"],
        "spacing": planned["spacing"],
        "normalization_schemes": [f"{scheme}Normalization" for scheme in planned["norm"].split()],
        "use_mask_for_norm": [bool(int(digit)) for digit in planned["masked"]],
        **{f"resampling_fn_{what}": "resample_data_or_seg_to_shape" for what in ("data", "seg", "probabilities")},
        "resampling_fn_data_kwargs": {**how, "order": 3},
        "resampling_fn_seg_kwargs": {**how, "order": 1, "is_seg": True},
        "resampling_fn_probabilities_kwargs": {**how, "order": 1},
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet."
            + ("ResidualEncoderUNet" if residual else "PlainConvUNet"),
            "arch_kwargs": network,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": False,
    }
    # made up as a CT's under labels; only channels called CT are measured by it
    facts = {"mean": 30.0, "std": 45.0, "percentile_00_5": -60.0, "percentile_99_5": 150.0, "min": -90.0, "max": 200.0}
    plans = {
        "dataset_name": name,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [3.0, 1.0, 1.0],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": list(axes),
        "transpose_backward": [list(axes).index(axis) for axis in range(3)],
        "configurations": {configuration: own},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            str(number): {**facts, "median": facts["mean"]} for number in range(len(channels))
        },
    }
    dataset = {
        "channel_names": {str(number): channel for number, channel in enumerate(channels)},
        "labels": dict(labels),
        "numTraining": 10,
        "file_ending": ".nii.gz",
        **({"regions_class_order": list(order)} if order else {}),
    }
    return {
        "plans": plans, "dataset": dataset, "configuration": configuration, "folds": list(folds),
        "mirror": None if mirror is None else list(mirror), "seed": seed,
    }  # fmt: skip


# what nnU-Net makes of it


def make(said: Mapping[str, Any], folder: Path) -> None:
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(said["plans"]))
    (folder / "dataset.json").write_text(json.dumps(said["dataset"]))
    for number, fold in enumerate(said["folds"]):
        network = _network(said, number)
        place = folder / f"fold_{fold}"
        place.mkdir(exist_ok=True)
        torch.save(_checkpoint(said, network, fold), place / "checkpoint_final.pth")


def _network(said: Mapping[str, Any], number: int) -> Any:
    """As nnU-Net builds it for training, with norms that are not all alike, heads that prefer no label, and weights that
    half precision can tell: so they are small to keep."""
    import torch
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(said["plans"])
    planned = manager.get_configuration(said["configuration"])
    heads = manager.get_label_manager(said["dataset"]).num_segmentation_heads
    torch.manual_seed(said["seed"] + number)
    network = get_network_from_plans(
        planned.network_arch_class_name, planned.network_arch_init_kwargs, planned.network_arch_init_kwargs_req_import,
        len(said["dataset"]["channel_names"]), heads, allow_init=True, deep_supervision=True,
    )  # fmt: skip
    for module in network.modules():
        if type(module).__name__.startswith("InstanceNorm"):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.3, 0.3)
    for head in network.decoder.seg_layers:
        torch.nn.init.normal_(head.weight)
        torch.nn.init.zeros_(head.bias)
    return network.half().float()


def _checkpoint(said: Mapping[str, Any], network: Any, fold: int | str) -> dict[str, Any]:
    """What nnUNetTrainer.save_checkpoint of 2.8.1 writes."""
    import torch

    return {
        "network_weights": network.state_dict(),
        "optimizer_state": torch.optim.SGD(network.parameters(), 0.01, momentum=0.99, nesterov=True).state_dict(),
        "grad_scaler_state": None,
        "logging": {
            "mean_fg_dice": [np.float64(0.5)],
            "ema_fg_dice": [np.float32(0.4)],
            "dice_per_class_or_region": [[np.float64(0.5)]],
            "epoch_start_timestamps": [1000.0],
            "epoch_end_timestamps": [1090.0],
        },
        "_best_ema": np.float64(0.4),
        "current_epoch": 1000,
        "init_args": {
            "plans": said["plans"], "configuration": said["configuration"], "fold": fold,
            "dataset_json": said["dataset"], "device": torch.device("cuda"),
        },
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": None if said["mirror"] is None else tuple(said["mirror"]),
    }  # fmt: skip


def _predictor(folder: Path, flips: bool) -> Any:
    """nnU-Net's, summing windows in float32."""
    import nnunetv2.inference.predict_from_raw_data as prediction
    import torch

    torch.half = torch.float32
    weights = prediction.compute_gaussian
    if not getattr(weights, "is_whole", False):
        whole = lambda *words, **more: weights(*words, **{**more, "dtype": torch.float32})  # noqa: E731
        whole.is_whole = True  # type: ignore[attr-defined]
        prediction.compute_gaussian = whole
    predictor = prediction.nnUNetPredictor(
        use_mirroring=flips, perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
    )
    folds = sorted(path.name.removeprefix("fold_") for path in folder.glob("fold_*"))
    predictor.initialize_from_trained_model_folder(
        str(folder), tuple(fold if fold == "all" else int(fold) for fold in folds)
    )
    return predictor


def answer(folder: Path, cases: Path, out: Path, *, flips: bool) -> None:
    """Of each case what its preprocessor made of it, its logits there, and its labels."""
    import torch
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

    predictor = _predictor(folder, flips)
    prepare = predictor.configuration_manager.preprocessor_class(verbose=False)
    out.mkdir(parents=True, exist_ok=True)
    for name in sorted({path.name.removesuffix("_0000.nii.gz") for path in cases.glob("*_0000.nii.gz")}):
        files = [str(path) for path in sorted(cases.glob(f"{name}_????.nii.gz"))]
        prepared, _, facts = prepare.run_case(
            files, None, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
        )
        logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(prepared))
        labels = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, predictor.plans_manager, predictor.configuration_manager, predictor.label_manager, facts
        )
        np.savez(out / f"{name}.npz", prepared=prepared, logits=logits.numpy(), labels=labels)


def window(folder: Path, voxels: np.ndarray) -> np.ndarray:
    """[C, ...] -> [K, ...] by the first fold."""
    import torch

    predictor = _predictor(folder, flips=False)
    network = predictor.network
    network.load_state_dict(predictor.list_of_parameters[0])
    with torch.inference_mode():
        logits: np.ndarray = network.eval()(torch.from_numpy(voxels)[None])[0].numpy()
    return logits


# what tests keep of it


def golden_specifications() -> dict[str, dict[str, Any]]:
    """Three small trainings that differ in everything an import has to understand."""

    def planned(patch: str, spacing: str, strides: str, kernels: str, norm: str, masked: str) -> dict[str, Any]:
        told = {"patch": [int(n) for n in patch.split()], "spacing": [float(mm) for mm in spacing.split()]}
        return told | {"strides": strides, "kernels": kernels, "norm": norm, "masked": masked, "widest": 320}

    return {
        "slices_far_apart": specification(
            "Dataset901_Far", "3d_fullres",
            planned("8 24 16", "3.5 0.9 0.8", "111 122 222", "133 333 333", "ZScore", "0"),
            channels=["MRI"], labels={"background": 0, "a": 1, "b": 2}, residual=False, width=2, folds=(0, 1), mirror=(0, 1, 2), seed=21,
        ),
        "regions_on_turned_axes": specification(
            "Dataset902_Regions", "3d_fullres",
            planned("8 12 16", "1.6 1.2 0.9", "111 222 122", "333 333 333", "CT ZScore", "01"),
            channels=["CT", "T2"], labels={"background": 0, "whole": [1, 2, 3], "core": [2, 3], "top": 3, "ignore": 4},
            residual=True, width=2, axes=(1, 0, 2), mirror=(0, 2), order=(1, 2, 3), seed=41,
        ),
        "slice_by_slice": specification(
            "Dataset903_Slices", "2d",
            planned("20 16", "1.1 0.9", "11 22 21", "33 33 33", "RescaleTo01", "0"),
            channels=["rescale_to_0_1"], labels={"background": 0, "a": 1, "b": 2, "c": 3}, residual=False, width=2,
            axes=(2, 0, 1), folds=("all",), mirror=(0, 1), seed=29,
        ),
    }  # fmt: skip


AFFINES = {
    "slices_far_apart": np.diag([-0.7, -0.75, 4.2, 1]),
    "regions_on_turned_axes": np.array([[0, -1.3, 0, 9], [-0.8, 0, 0, 3], [0, 0, 1.0, -7], [0, 0, 0, 1.0]]),
    "slice_by_slice": np.diag([3.0, -1.0, 1.0, 1]),
}
SHAPES = {
    "slices_far_apart": (26, 30, 9), "regions_on_turned_axes": (21, 17, 19), "slice_by_slice": (5, 23, 20),
}  # fmt: skip


def golden(out: Path) -> None:
    """Plans, weights, a scan, and what nnU-Net makes of it."""
    import nibabel
    from scipy import ndimage

    kept: dict[str, np.ndarray] = {}
    for name, said in golden_specifications().items():
        channels = range(len(said["dataset"]["channel_names"]))
        random = np.random.default_rng(len(name))
        scans = [ndimage.gaussian_filter(random.normal(size=SHAPES[name]), 1.2) * 90 + 30 for _ in channels]
        outside = np.sum(
            [(n / side - 0.5) ** 2 for n, side in zip(np.indices(SHAPES[name]), SHAPES[name], strict=True)], 0
        )
        scans = [np.where(outside < 0.2, scan, 0).round().astype(np.int16) for scan in scans]
        with tempfile.TemporaryDirectory() as place:
            folder, cases = Path(place) / "results", Path(place) / "cases"
            cases.mkdir()
            for number, scan in enumerate(scans):
                nibabel.save(nibabel.Nifti1Image(scan, AFFINES[name]), cases / f"case_{number:04d}.nii.gz")
            make(said, folder)
            answer(folder, cases, Path(place) / "out", flips=True)
            found = np.load(Path(place) / "out" / "case.npz")
            kept |= {f"{name}/{key}": found[key] for key in ("prepared", "labels")}
            kept[f"{name}/logits"] = found["logits"][:, ::2, ::3, ::3]
        kept[f"{name}/scan"], kept[f"{name}/affine"] = np.stack(scans), AFFINES[name]
        kept[f"{name}/said"] = np.array(json.dumps(said))
        states = [_network(said, number).state_dict() for number in range(len(said["folds"]))]
        own = [key for key in states[0] if "all_modules" not in key and not key.startswith("decoder.encoder")]
        kept[f"{name}/weights"] = np.array(json.dumps({key: list(states[0][key].shape) for key in own}))
        for fold, state in zip(said["folds"], states, strict=True):
            kept[f"{name}/fold_{fold}"] = np.concatenate([state[key].numpy().ravel() for key in own]).astype(np.float16)
    np.savez_compressed(out, **kept)


if __name__ == "__main__":
    sys.exit(main())
