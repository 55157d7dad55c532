"""A package of ours as a MONAI bundle: what MONAI reads and runs with nothing of hilum installed."""

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from preprocessing.steps import Crop, Normalise, Orient, Pad, Resample, Scale, Step

from .errors import UsageError
from .export import Agreement, Exported, compared, described, named, refuse_unless_equal, torchscript_of
from .package import ModelPackage
from .progress import Progress, silent
from .report import as_json, swap

if TYPE_CHECKING:
    from preprocessing.plan import Plan

Transforms = list[dict[str, Any]]

KEPT_SIZE = -1.0
"""In MONAI's Spacing: every scan keeps its own along this axis."""


@dataclass(frozen=True, kw_only=True)
class Translated:
    """Steps as MONAI's transforms."""

    transforms: Transforms
    notes: tuple[str, ...] = ()
    """Where MONAI does not do exactly what hilum does, in sentences."""


def export_monai(package: ModelPackage, out: Path, progress: Progress = silent) -> tuple[Exported, ...]:
    """A bundle for every fold: a folder, or a zip where `out` is called so; MONAI itself loads each before it is kept."""
    made = []
    for done, (fold, network) in enumerate(zip(package.record.folds, package.networks(), strict=True)):
        progress("export monai", done, len(package.record.folds))
        path = named(out, fold, len(package.record.folds))
        made.append(Exported(path=path, fold=fold, agreement=_written(package, fold, network, path)))
    progress("export monai", len(made), len(made))
    return tuple(made)


def _written(package: ModelPackage, fold: str, network: nn.Module, path: Path) -> Agreement:
    building = path.with_name(f".{path.name}.partial")
    shutil.rmtree(building, ignore_errors=True)
    home = building / path.stem if path.suffix == ".zip" else building
    try:
        _fill(home, package, fold, network)
        agreement = compared(network, _as_monai_loads(home), package)
        refuse_unless_equal(agreement, f"{package.record.network} in a MONAI bundle")
        if path.suffix == ".zip":
            packed = Path(shutil.make_archive(str(building), "zip", building))
            packed.replace(path)
        else:
            swap(building, path)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return agreement


def _fill(home: Path, package: ModelPackage, fold: str, network: nn.Module) -> None:
    for folder in ("configs", "models", "docs"):
        (home / folder).mkdir(parents=True)
    translated, note = as_transforms(package.plan.steps), described(package, fold)
    said = notes(package, translated)
    (home / "configs" / "inference.json").write_text(as_json(inference(package, translated)))
    (home / "configs" / "metadata.json").write_text(as_json(metadata(package, said, note)))
    (home / "docs" / "README.md").write_text("\n".join([f"# {package.name}", "", *(f"- {one}" for one in said), ""]))
    (home / "LICENSE").write_text("The weights' licence is that of whoever trained them; ask there.\n")
    if package.record.network == "monai_net":
        assert isinstance(network.network, nn.Module)
        torch.save(network.network.state_dict(), home / "models" / "model.pt")
    else:
        channels = len(package.plan.channels)
        content = torchscript_of(network, channels, package.plan.patch, package.record.network, note)
        (home / "models" / "model.ts").write_bytes(content)


def _as_monai_loads(home: Path) -> nn.Module:
    """By MONAI's own reader of bundles."""
    from monai.bundle import ConfigParser  # MONAI takes seconds to import

    parser = ConfigParser()
    parser.read_config(str(home / "configs" / "inference.json"))
    parser["bundle_root"], parser["device"] = str(home), "$torch.device('cpu')"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says of every TorchScript file that it is no longer developed
        network: nn.Module = parser.get_parsed_content("network")
    return network


def inference(package: ModelPackage, translated: Translated) -> dict[str, Any]:
    """configs/inference.json: `python -m monai.bundle run --config_file configs/inference.json --datalist ...`."""
    plan = package.plan
    return {
        "bundle_root": ".",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "datalist": [],
        "output_dir": "$@bundle_root + '/eval'",
        **_network(package),
        "preprocessing": {"_target_": "Compose", "transforms": translated.transforms},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': path} for path in @datalist]",
            "transform": "@preprocessing",
        },
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(plan.patch),
            "sw_batch_size": 1,
            "overlap": 0.5,
            "mode": "gaussian",
        },
        "postprocessing": {"_target_": "Compose", "transforms": _ending(plan)},
        "predict": "$lambda scan, ask=@inferer, network=@network, device=@device: "
        "{**scan, 'pred': ask(scan['image'][None].to(device), network)[0].detach().cpu()}",
        "segmented": "$list(map(@postprocessing, map(@predict, @dataset)))",
        "run": ["$torch.set_grad_enabled(False)", "$@segmented"],
    }


def _network(package: ModelPackage) -> dict[str, Any]:
    """MONAI's own class where it is one; else a file that holds its own graph."""
    plan, config = package.plan, package.record.network_config
    if package.record.network == "monai_net":
        own = {"spatial_dims": 3, "in_channels": len(plan.channels), "out_channels": plan.classes}
        load = "torch.load(@bundle_root + '/models/model.pt', map_location=@device, weights_only=True)"
        return {
            "network_def": {"_target_": config["net"], **own, **config["arguments"]},
            "loaded": f"$@network_def.load_state_dict({load})",
            "network": "$(@loaded, @network_def.to(@device).eval())[1]",
        }
    return {
        "network_def": {
            "_target_": "torch.jit.load", "f": "$@bundle_root + '/models/model.ts'", "map_location": "@device",
        },
        "network": "$@network_def.eval()",
    }  # fmt: skip


def _ending(plan: "Plan") -> Transforms:
    values = plan.lookup.tolist()
    decide: Transforms = (
        [_transform("Activationsd", "pred", sigmoid=True), _invert(), _transform("AsDiscreted", "pred", threshold=0.5)]
        if plan.has_regions
        else [
            _transform("Activationsd", "pred", softmax=True),
            _invert(),
            _transform("AsDiscreted", "pred", argmax=True),
        ]
    )
    if not plan.has_regions and values != list(range(len(values))):
        numbers = list(range(len(values)))
        decide.append(_transform("MapLabelValued", "pred", orig_labels=numbers, target_labels=values))
    return [*decide, _transform("SaveImaged", "pred", output_dir="@output_dir", output_postfix="seg")]


def _invert() -> dict[str, Any]:
    return _transform("Invertd", "pred", transform="@preprocessing", orig_keys="image", nearest_interp=False)


def as_transforms(steps: Sequence[Step]) -> Translated:
    """MONAI's transforms for steps of ours."""
    found = [TRANSFORMS[type(step)](step) for step in steps]
    reading = [
        _transform("LoadImaged", "image", image_only=True),
        _transform("EnsureChannelFirstd", "image"),
        _transform("EnsureTyped", "image", data_type="tensor"),
    ]
    return Translated(
        transforms=[*reading, *(one for each in found for one in each.transforms)],
        notes=tuple(dict.fromkeys(note for each in found for note in each.notes)),
    )


def _transform(target: str, keys: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": target, "keys": keys, **arguments}


def _oriented(step: Any) -> Translated:
    return Translated(transforms=[_transform("Orientationd", "image", axcodes=step.to)])


def _cropped(step: Any) -> Translated:
    inside = {"source_key": "image", "select_fn": "$lambda voxels: voxels != 0", "allow_smaller": True}
    return Translated(transforms=[_transform("CropForegroundd", "image", **inside, margin=step.margin)])


def _resampled(step: Any) -> Translated:
    sizes = [KEPT_SIZE if axis in step.kept else size for axis, size in enumerate(step.spacing_mm)]
    return Translated(
        transforms=[
            # mode 3: splines, from edge to edge, as hilum's
            _transform("Spacingd", "image", pixdim=sizes, mode=3, padding_mode="nearest", scale_extent=True)
        ],
        notes=(
            "MONAI's Spacing stands for hilum's resampling: towards the far edge of a scan they are up to half a voxel apart.",
        ),
    )


def _padded(step: Any) -> Translated:
    return Translated(transforms=[_transform("SpatialPadd", "image", spatial_size=list(step.shape))])


def _normalised(step: Any) -> Translated:
    scale: Scale = step.channels[0]
    if any(other != scale for other in step.channels):
        raise UsageError(
            "the plan normalises its channels by different rules, and MONAI's transforms treat all channels of an image "
            "alike; one rule is needed for a bundle. Export it as onnx or torchscript."
        )
    if scale.by == "dataset":
        low, high = ((bound - scale.mean) / scale.deviation for bound in (scale.low, scale.high))
        bounds = {"a_min": scale.low, "a_max": scale.high, "b_min": low, "b_max": high, "clip": True}
        return Translated(transforms=[_transform("ScaleIntensityRanged", "image", **bounds)])
    if scale.by == "range":
        return Translated(transforms=[_transform("ScaleIntensityd", "image", channel_wise=True)])
    by_itself = _transform("NormalizeIntensityd", "image", channel_wise=True, nonzero=scale.nonzero)
    hint = "MONAI measures intensities where a channel is not zero; hilum also in what that encloses."
    return Translated(transforms=[by_itself], notes=(hint,) if scale.nonzero else ())


TRANSFORMS: Mapping[type, Callable[[Any], Translated]] = {
    Orient: _oriented,
    Crop: _cropped,
    Resample: _resampled,
    Pad: _padded,
    Normalise: _normalised,
}


def notes(package: ModelPackage, translated: Translated) -> list[str]:
    """What a user of the bundle should know."""
    said = [
        "Not a medical device. Not for diagnosis.",
        f"Made by hilum from the package {package.id}; one of its folds. Within a window its logits are the package's.",
        *translated.notes,
    ]
    if package.is_calibrated:
        said.append("Probabilities are not divided by the package's temperature; labels do not change by it.")
    if package.rules:
        rules = "; ".join(rule.words for rule in package.rules)
        said.append(f"The package's post-processing is not in it: {rules}.")
    return said


def metadata(package: ModelPackage, said: Sequence[str], note: Mapping[str, Any]) -> dict[str, Any]:
    """configs/metadata.json, as MONAI's schema has it; our own record of it under `hilum`."""
    import monai
    import numpy

    plan = package.plan
    classes = [*([] if plan.has_regions else ["background"]), *(label.name for label in plan.labels)]
    patch = {"type": "image", "num_channels": len(plan.channels), "spatial_shape": list(plan.patch), "dtype": "float32"}
    return {
        "version": "1.0.0",
        "changelog": {"1.0.0": "exported by hilum"},
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": numpy.__version__,
        "required_packages_version": {"nibabel": package.record.versions.get("nibabel", "")},
        "name": package.name,
        "task": f"segmentation of {', '.join(label.name for label in plan.labels)}",
        "description": " ".join(said),
        "authors": "whoever trained the package",
        "copyright": "whoever trained the package",
        "intended_use": "research; not a medical device",
        "network_data_format": {
            "inputs": {
                "image": {
                    **patch, "format": "magnitude", "modality": plan.channels[0], "value_range": [], "is_patch_data": True,
                    "channel_def": {str(number): name for number, name in enumerate(plan.channels)},
                }
            },
            "outputs": {
                "pred": {
                    **patch, "format": "segmentation", "num_channels": plan.classes, "value_range": [],
                    "is_patch_data": True, "channel_def": {str(number): name for number, name in enumerate(classes)},
                }
            },
        },
        "hilum": dict(note),
    }  # fmt: skip
