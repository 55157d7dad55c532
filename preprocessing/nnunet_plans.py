"""What nnU-Net v2 wrote down of a training, read as a plan of ours: the same grid, intensities, windows and network.

nnU-Net numbers a scan's axes from the last one stored to the first, then moves the coarsest to the front
(`transpose_forward`); windows, spacings, strides, kernels and mirrors are told in that order. Here everything is told along
the axes as they are stored, so that no scan has to be turned. What cannot be translated exactly is refused.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .declared import Declared
from .nnunet import AS_IT_IS, BYTES, recipe_rule
from .plan import Plan, Triple
from .records import BadRecord
from .steps import Crop, Normalise, Orient, Pad, Resample, Scale, Step

AS_STORED = "as_stored"


@dataclass(frozen=True, kw_only=True)
class Translation:
    """A configuration of a plans.json in our words."""

    plan: Plan
    network: dict[str, Any]
    """Settings of residual_unet."""
    axes: Triple
    """Which axis of ours each of nnU-Net's is; the first is the one across slices where `is_flat`."""
    is_flat: bool
    """A 2-D network: windows of one slice."""


def translated(
    plans: Mapping[str, Any], configuration: str, told: Declared, *, mirrored: Sequence[int] | None, orientation: str
) -> Translation:
    """That configuration of a plans.json. `mirrored`: the axes that training mirrored, in nnU-Net's order."""
    try:
        return _translated(plans, configured(plans, configuration), configuration, told, mirrored, orientation)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise BadRecord(
            f"plans.json says nothing that is understood under {configuration} ({type(error).__name__}: {error}); the "
            "plans.json of nnU-Net v2 that lies beside the trained folds is needed. Copy it anew."
        ) from None


def configured(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration with what it inherits from others."""
    configurations = plans["configurations"]
    if name not in configurations:
        raise BadRecord(
            f"plans.json plans {', '.join(configurations)} and no {name}, which the checkpoint was trained by; both must be of "
            "one training. Take the plans.json that lies beside its folds."
        )
    own = dict(configurations[name])
    seen = {name}
    while parent := own.pop("inherits_from", None):
        if parent in seen:
            raise BadRecord(f"plans.json has {name} inherit from itself by way of {parent}; an end is needed. Mend it.")
        seen.add(parent)
        own = {**configurations[parent], **own}
    return own


def _translated(
    plans: Mapping[str, Any], own: Mapping[str, Any], name: str, told: Declared, mirrored: Sequence[int] | None,
    orientation: str,
) -> Translation:  # fmt: skip
    _refuse_other_ways(plans, own, name)
    told = _with_classes(told)
    i, j, k = (2 - int(axis) for axis in plans["transpose_forward"])
    axes: Triple = (i, j, k)
    is_flat = len(own["patch_size"]) == 2
    plan = _plan(plans, own, name, told, axes, is_flat, _runs(plans, orientation))
    mirror = _mirror(mirrored, axes, is_flat)
    network = _network(_architecture(own), axes, is_flat)
    return Translation(
        plan=replace(plan, recipe=replace(plan.recipe, mirror=mirror)), network=network, axes=axes, is_flat=is_flat
    )


def along(axes: Triple, values: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Values told along nnU-Net's axes, told along ours."""
    i, j, k = (values[axes.index(axis)] for axis in range(3))
    return i, j, k


def _flat(values: Sequence[Any], across: Any, is_flat: bool) -> Sequence[Any]:
    """Of a 2-D network, with a value for the axis across slices."""
    return [across, *values] if is_flat else values


def _plan(
    plans: Mapping[str, Any], own: Mapping[str, Any], name: str, told: Declared, axes: Triple, is_flat: bool, runs: str
) -> Plan:
    patch = along(axes, [int(side) for side in _flat(own["patch_size"], 1, is_flat)])
    between = plans.get("original_median_spacing_after_transp", [1.0])[0]
    spacing = along(axes, [float(mm) for mm in _flat(own["spacing"], between, is_flat)])
    resample = Resample(spacing_mm=spacing, rule=_resampling_rule(own), kept=(axes[0],) if is_flat else ())
    turn: list[Step] = [] if runs == AS_STORED else [Orient(to=runs)]
    recipe, why_recipe = recipe_rule(axes[0] if is_flat else None, bool(own.get("batch_dice")) and not is_flat)
    return Plan(
        name=str(plans["dataset_name"]),
        channels=told.channels,
        labels=told.labels,
        steps=(*turn, Crop(margin=0), _normalise(plans, own, told), resample, Pad(shape=patch)),
        spacing_mm=spacing,
        patch=patch,
        batch=int(own["batch_size"]),
        ignored=told.ignored,
        mode="nnunet",
        recipe=recipe,
        bell="nnunet",
        averages="logits",
        reasons={
            "orient": _why_turned(runs),
            "spacing_mm": f"nnU-Net v2 planned it as {name}"
            + ("; between slices each scan keeps its own" if is_flat else ""),
            "separate": "nnU-Net v2: scan by scan, along an axis over 3 times coarser than another the nearest slice is taken",
            "bell": "nnU-Net v2: windows lie and weigh as in its sliding window",
            "averages": "nnU-Net v2: logits are averaged over folds and resampled, then the highest wins",
            **why_recipe,
        },
    )  # fmt: skip


def _why_turned(runs: str) -> str:
    if runs != AS_STORED:
        return f"every scan is turned so that its axes run to {runs}, as those of the training did"
    return (
        "axes are taken as a file stores them, for nnU-Net looks at no orientation: a scan that is stored another way than "
        "those it was trained on shows the network a turned body. Import again with an orientation if you know theirs"
    )


# what is refused

READERS = {"SimpleITKIO": AS_STORED, "NibabelIO": AS_STORED, "NibabelIOWithReorient": "RAS"}
"""nnU-Net's readers of volumes, and where each turns their axes."""


def _runs(plans: Mapping[str, Any], orientation: str) -> str:
    """Where the axes of a prepared scan run to."""
    reader = plans.get("image_reader_writer", "SimpleITKIO")
    if reader not in READERS:
        raise BadRecord(
            f"plans.json names the reader {reader}; hilum reads volumes, as {', '.join(READERS)} do. Pictures and other "
            "formats need nnU-Net itself."
        )
    if READERS[reader] != AS_STORED and orientation not in (AS_STORED, READERS[reader]):
        raise BadRecord(
            f"orientation {orientation} was asked for, and {reader} turned every scan of the training to {READERS[reader]}; "
            "that is how the network knows them. Leave --orientation out."
        )
    return READERS[reader] if READERS[reader] != AS_STORED else orientation


RESAMPLING = {
    "resampling_fn_data": {"is_seg": False, "order": 3, "order_z": 0},
    "resampling_fn_probabilities": {"is_seg": False, "order": 1, "order_z": 0},
}
"""How nnU-Net's default resamples scans and logits."""


def _refuse_other_ways(plans: Mapping[str, Any], own: Mapping[str, Any], name: str) -> None:
    """Nothing that is done otherwise than by nnU-Net's defaults is guessed."""
    if own.get("previous_stage"):
        raise BadRecord(
            f"{name} is the second stage of a cascade: it looks at what {own['previous_stage']} found beside the scan, which "
            "no package holds. Import 3d_fullres or 3d_lowres, which stand alone."
        )
    for said, what, wanted in (
        (own, "preprocessor_name", "DefaultPreprocessor"),
        (plans, "label_manager", "LabelManager"),
    ):
        if said.get(what, wanted) != wanted:
            raise BadRecord(f"plans.json has {what} {said[what]}; {wanted} is needed. Others need nnU-Net itself.")
    for function, usual in RESAMPLING.items():
        asked = {**usual, **own.get(f"{function}_kwargs", {})}
        kind = own.get(function, "resample_data_or_seg_to_shape")
        changed = {key: value for key, value in asked.items() if key in usual and value != usual[key]}
        if kind != "resample_data_or_seg_to_shape" or changed or asked.get("force_separate_z") is True:
            raise BadRecord(
                f"plans.json has {function} {kind} with {dict(own.get(f'{function}_kwargs', {}))}; nnU-Net's default, "
                f"resample_data_or_seg_to_shape with {usual}, is needed. Others need nnU-Net itself."
            )


def _resampling_rule(own: Mapping[str, Any]) -> Any:
    forced = [own.get(f"{function}_kwargs", {}).get("force_separate_z") for function in RESAMPLING]
    if len(set(forced)) > 1:
        raise BadRecord(
            f"plans.json has force_separate_z {forced[0]} for scans and {forced[1]} for logits; one for both is needed. "
            "Others need nnU-Net itself."
        )
    return "nnunet" if forced[0] is None else "nnunet_together"


def _with_classes(told: Declared) -> Declared:
    """Labels as nnU-Net's LabelManager counts them: regions only where one has several values."""
    if not any(len(label.parts) > 1 for label in told.labels):
        plain = sorted((replace(label, parts=()) for label in told.labels), key=lambda label: label.value)
        told = replace(told, labels=tuple(plain))
        values = [label.value for label in told.labels]
        if values != list(range(1, len(values) + 1)):
            raise BadRecord(
                f"dataset.json declares the values {values}; nnU-Net numbers what it tells apart from 1 without a gap. Take "
                "the dataset.json that lies beside the folds."
            )
    return told


# intensities


def _normalise(plans: Mapping[str, Any], own: Mapping[str, Any], told: Declared) -> Normalise:
    schemes, masked = own["normalization_schemes"], own["use_mask_for_norm"]
    if len(schemes) != len(told.channels):
        raise BadRecord(
            f"plans.json normalises {len(schemes)} channels, and dataset.json names {len(told.channels)} "
            f"({', '.join(told.channels)}); both must be of one training. Take those that lie beside the folds."
        )
    intensities = plans.get("foreground_intensity_properties_per_channel") or plans.get(
        "foreground_intensity_properties_by_modality", {}
    )
    return Normalise(
        channels=tuple(
            _scale(scheme, bool(is_masked), intensities.get(str(number), {}))
            for number, (scheme, is_masked) in enumerate(zip(schemes, masked, strict=True))
        )
    )


def _scale(scheme: str, is_masked: bool, facts: Mapping[str, float]) -> Scale:
    match scheme:
        case "CTNormalization":
            return Scale(
                by="dataset", low=float(facts["percentile_00_5"]), high=float(facts["percentile_99_5"]),
                mean=float(facts["mean"]), deviation=max(float(facts["std"]), 1e-8),  # 1e-8: nnU-Net's
            )  # fmt: skip
        case "ZScoreNormalization":
            return Scale(by="scan", nonzero=is_masked)
        case "NoNormalization":
            return AS_IT_IS
        case "RescaleTo01Normalization":
            return Scale(by="range")
        case "RGBTo01Normalization":
            return BYTES
        case _:
            raise BadRecord(
                f"plans.json normalises by {scheme}; CTNormalization, ZScoreNormalization, NoNormalization, "
                "RescaleTo01Normalization or RGBTo01Normalization is needed. Others need nnU-Net itself."
            )


def _mirror(mirrored: Sequence[int] | None, axes: Triple, is_flat: bool) -> tuple[bool, bool, bool]:
    """Which of our axes training mirrored."""
    ours = {axes[int(axis) + is_flat] for axis in mirrored or ()}
    return 0 in ours, 1 in ours, 2 in ours


# the network

PLAIN, RESIDUAL = "PlainConvUNet", "ResidualEncoderUNet"
BLOCKS = {PLAIN: "n_conv_per_stage", RESIDUAL: "n_blocks_per_stage"}
SAID = {
    "n_stages", "features_per_stage", "kernel_sizes", "strides", *BLOCKS.values(), "n_conv_per_stage_decoder", "conv_bias",
    "conv_op", "norm_op", "norm_op_kwargs", "nonlin", "nonlin_kwargs", "dropout_op", "dropout_op_kwargs", "deep_supervision",
}  # fmt: skip
"""What is understood of a network's arguments. Dropout and deep supervision are of training alone."""


def _architecture(own: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The network's class and arguments; plans before nnU-Net 2.4 told them one by one."""
    if "architecture" in own:
        kind = str(own["architecture"]["network_class_name"]).rsplit(".", 1)[-1]
        return kind, own["architecture"]["arch_kwargs"]
    blocks = own["n_conv_per_stage_encoder"]
    kind = own["UNet_class_name"]
    widths = [
        min(own["UNet_base_num_features"] * 2**stage, own["unet_max_num_features"]) for stage in range(len(blocks))
    ]
    return kind, {
        "n_stages": len(blocks),
        "features_per_stage": widths,
        "kernel_sizes": own["conv_kernel_sizes"],
        "strides": own["pool_op_kernel_sizes"],
        BLOCKS.get(kind, ""): blocks,
        "n_conv_per_stage_decoder": own["n_conv_per_stage_decoder"],
        "conv_bias": True,
    }  # fmt: skip


def _network(architecture: tuple[str, Mapping[str, Any]], axes: Triple, is_flat: bool) -> dict[str, Any]:
    """Settings of residual_unet that make the same network; refused where none do."""
    kind, said = architecture
    _refuse_other_networks(kind, said)
    stages = int(said["n_stages"])
    widths = _each(said["features_per_stage"], stages)
    decoder = set(_each(said["n_conv_per_stage_decoder"], stages - 1))
    strides = [along(axes, _flat(_sides(stride, is_flat), 1, is_flat)) for stride in _each(said["strides"], stages)]
    kernels = [
        along(axes, _flat(_sides(kernel, is_flat), 1, is_flat)) for kernel in _each(said["kernel_sizes"], stages)
    ]
    doubled = [min(widths[0] * 2**stage, max(widths)) for stage in range(stages)]
    even = any(side % 2 == 0 for kernel in kernels for side in kernel)
    if widths != doubled or len(decoder) > 1 or math.prod(strides[0]) > 1 or even:
        raise BadRecord(
            f"plans.json has a {kind} of {widths} channels, strides {strides}, kernels {kernels} and {sorted(decoder)} "
            "convolutions per stage on the way up; channels that double up to a limit, a first stride of 1, odd kernels and "
            "one number on the way up are needed. Others need nnU-Net itself."
        )
    return {
        "width": widths[0],
        "widest": max(widths),
        "blocks": _each(said[BLOCKS[kind]], stages),
        "plain": kind == PLAIN,
        "decoder": decoder.pop(),
        "bias": bool(said.get("conv_bias", False)),
        "strides": [list(stride) for stride in strides],
        "kernels": [list(kernel) for kernel in kernels],
    }


def _refuse_other_networks(kind: str, said: Mapping[str, Any]) -> None:
    if kind not in BLOCKS:
        raise BadRecord(
            f"plans.json names the network {kind}; {' or '.join(BLOCKS)} is needed. Others need nnU-Net itself."
        )
    norm, slope = said.get("norm_op_kwargs") or {}, (said.get("nonlin_kwargs") or {}).get("negative_slope", 0.01)
    usual = {
        "norm_op": str(said.get("norm_op", "InstanceNorm")).rsplit(".", 1)[-1].startswith("InstanceNorm"),
        "norm_op_kwargs": norm.get("eps", 1e-5) == 1e-5 and norm.get("affine", True) is True,
        "nonlin": str(said.get("nonlin", "LeakyReLU")).endswith("LeakyReLU"),
        "nonlin_kwargs": slope == 0.01,
        **{name: not value for name, value in said.items() if name not in SAID},
    }
    for name, is_usual in usual.items():
        if not is_usual:
            raise BadRecord(
                f"plans.json has {name} {said[name]!r} in its {kind}; nnU-Net's default is needed (instance norm with scale "
                "and shift, leaky ReLU of 0.01, nothing added). Others need nnU-Net itself."
            )


def _each(value: Any, stages: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * stages


def _sides(value: Any, is_flat: bool) -> list[int]:
    return [int(one) for one in _each(value, 2 if is_flat else 3)]
