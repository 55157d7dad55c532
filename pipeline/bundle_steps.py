"""What a MONAI bundle does to a scan before and after its network, as steps, labels and rules of ours: exactly, or refused."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from preprocessing.records import BadRecord
from preprocessing.steps import Normalise, Orient, Pad, Resample, Scale, Step

from .bundle_words import Target, Words
from .errors import PackageError, UsageError

BESIDE = frozenset({"keys", "allow_missing_keys", "dtype", "data_type", "track_meta", "device", "meta_keys",
                    "meta_key_postfix", "image_only", "reader", "ensure_channel_first", "simple_keys", "lazy"})  # fmt: skip
"""Arguments that say how tensors are handed about and change no number: scans are float32 here from the start."""
HANDLING = ("LoadImage", "EnsureChannelFirst", "EnsureType", "ToTensor", "CastToType", "SelectItems")
"""Transforms that do nothing else."""
UNBOUND = 3e38
"""Nothing in float32 lies far beyond it: to clip here is not to clip."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is done before the network."""

    steps: tuple[Step, ...]
    spacing_mm: tuple[float, float, float] | None
    """Of a prepared voxel; None where the bundle leaves every scan's as it is."""
    notes: tuple[str, ...] = ()
    """What differs from what MONAI does, in sentences."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """What is done behind the network."""

    regions: bool
    """Each channel has a yes and a no of its own; else the highest wins."""
    largest: tuple[int, ...] = ()
    """Labels of which only the largest connected part is kept."""
    together: bool = False
    """It is the largest part of all of these labels taken as one."""


def preparation(words: Words, channels: int, resample: str) -> Preparation:
    """The steps of ours that do what the bundle's transforms do."""
    steps: list[Step] = []
    spacing: tuple[float, float, float] | None = None
    notes: list[str] = []
    for target in transforms(words, "preprocessing", "pre_transforms"):
        name = _base(target)
        _refuse_other_keys(words, target)
        if name in HANDLING:
            continue
        if name == "Spacing":
            step = _spacing(words, target, resample)
            spacing = step.spacing_mm
            notes.append(
                "Scans are brought to its voxel size by hilum's rule (splines, edge to edge), not by MONAI's (from the first "
                "voxel's centre on): the network sees slightly other numbers than in MONAI."
            )
            steps.append(step)
        elif name in STEPS:
            steps.append(STEPS[name](words, target, channels))
        else:
            raise _refused(words, target, "hilum has no step that does exactly that")
    return Preparation(steps=tuple(steps), spacing_mm=spacing, notes=tuple(notes))


def ending(words: Words) -> Ending:
    """How logits become labels, and what is done to these."""
    kinds: set[str] = set()
    largest: tuple[int, ...] = ()
    together = False
    for target in transforms(words, "postprocessing", "post_transforms"):
        name = _base(target)
        if name in (*HANDLING, "Invert", "SaveImage"):
            continue
        if name in ("Activations", "AsDiscrete"):
            kinds |= _decision(words, target)
        elif name == "KeepLargestConnectedComponent":
            largest, together = _largest(words, target)
        else:
            raise _refused(words, target, "hilum has no rule that does exactly that to a label map")
    if len(kinds) != 1:
        raise PackageError(
            f"{words.file}: the post-processing decides by {' and '.join(sorted(kinds)) or 'nothing'}; either softmax and "
            "argmax (labels exclude each other) or sigmoid and threshold (they may overlap) is needed. Say it in a copy."
        )
    return Ending(regions=kinds == {"sigmoid"}, largest=largest, together=together)


def transforms(words: Words, *names: str) -> list[Target]:
    """A Compose, or a list; those that are switched off left out."""
    said = words.find(*names)
    if isinstance(said, Target) and said.name == "Compose":
        said = words.value(said.arguments.get("transforms", []))
    found = said if isinstance(said, list) else [said] if said is not None else None
    if found is None or not all(isinstance(one, Target) for one in found):
        raise PackageError(
            f"{words.file}: {names[0]} is no list of transforms with a _target_ each; a Compose is needed. Write it out."
        )
    return [one for one in found if not one.is_off]


def _base(target: Target) -> str:
    """LoadImaged, LoadImageD and LoadImageDict are one."""
    return re.sub("(Dict|D|d)$", "", target.name)


def _refuse_other_keys(words: Words, target: Target) -> None:
    keys = words.value(target.arguments.get("keys", "image"))
    first = keys[0] if isinstance(keys, list) and keys else keys
    if first != "image" or (isinstance(keys, list) and len(keys) > 1):
        raise _refused(words, target, f"its keys are {keys}, and a scan here is one image of several channels")


def _asked(words: Words, target: Target, *known: str) -> dict[str, Any]:
    """What the transform is told that matters; refused where it is told more than we do."""
    said = words.arguments(target, BESIDE)
    if unknown := sorted(key for key in set(said) - set(known) if said[key] not in (None, False)):
        raise _refused(words, target, f"it is told {', '.join(unknown)}, which hilum's step does not know")
    return said


def _orient(words: Words, target: Target, channels: int) -> Step:
    said = _asked(words, target, "axcodes", "labels")
    try:
        return Orient(to=str(said.get("axcodes")))
    except BadRecord as error:
        raise _refused(words, target, str(error)) from None


def _spacing(words: Words, target: Target, resample: str) -> Resample:
    if resample != "hilum":
        raise _refused(
            words, target, "hilum brings scans to a voxel size by a rule of its own, which is not MONAI's to the last digit",
            "Allow that with --resample hilum; the package will say it.",
        )  # fmt: skip
    pixdim = words.value(target.arguments.get("pixdim"))
    sizes = pixdim if isinstance(pixdim, list | tuple) else [pixdim] * 3
    if len(sizes) != 3 or not all(isinstance(size, int | float) and size > 0 for size in sizes):
        raise _refused(words, target, f"its pixdim is {pixdim}, and three sizes above 0 are needed")
    i, j, k = (float(size) for size in sizes)
    return Resample(spacing_mm=(i, j, k))


def _range(words: Words, target: Target, channels: int) -> Step:
    said = _asked(words, target, "a_min", "a_max", "b_min", "b_max", "clip")
    low, high = float(said["a_min"]), float(said["a_max"])
    if said.get("b_min") is None or said.get("b_max") is None or low >= high:
        raise _refused(words, target, "it needs a_min below a_max, b_min and b_max")
    start, stop = float(said["b_min"]), float(said["b_max"])
    deviation = (high - low) / (stop - start)
    clipped = (low, high) if said.get("clip") else (-UNBOUND, UNBOUND)
    scale = Scale(by="dataset", low=clipped[0], high=clipped[1], mean=low - start * deviation, deviation=deviation)
    return Normalise(channels=(scale,) * channels)


def _normalise(words: Words, target: Target, channels: int) -> Step:
    said = _asked(words, target, "subtrahend", "divisor", "nonzero", "channel_wise")
    if said.get("nonzero"):
        raise _refused(
            words, target, "it measures where a channel is not zero, by itself and without what lies enclosed"
        )
    if not said.get("channel_wise") and channels > 1:
        raise _refused(words, target, "it measures all channels together")
    if (said.get("subtrahend") is None) != (said.get("divisor") is None):
        raise _refused(words, target, "it is told one of subtrahend and divisor, and both or none are needed")
    if said.get("subtrahend") is None:
        return Normalise(channels=(Scale(by="scan"),) * channels)
    means, deviations = (_each(said[name], channels) for name in ("subtrahend", "divisor"))
    return Normalise(
        channels=tuple(
            Scale(by="dataset", low=-UNBOUND, high=UNBOUND, mean=mean, deviation=deviation)
            for mean, deviation in zip(means, deviations, strict=True)
        )
    )


def _each(said: Any, channels: int) -> list[float]:
    numbers = said if isinstance(said, list | tuple) else [said] * channels
    return [float(number) for number in numbers]


def _to_one(words: Words, target: Target, channels: int) -> Step:
    said = _asked(words, target, "minv", "maxv", "channel_wise")
    if (said.get("minv", 0), said.get("maxv", 1)) != (0, 1) or (channels > 1 and not said.get("channel_wise")):
        raise _refused(words, target, "each channel by itself, from 0 to 1, is what hilum does")
    return Normalise(channels=(Scale(by="range"),) * channels)


def _pad(words: Words, target: Target, channels: int) -> Step:
    said = _asked(words, target, "spatial_size", "method", "mode")
    if said.get("method", "symmetric") != "symmetric" or said.get("mode", "constant") != "constant":
        raise _refused(words, target, "hilum pads evenly, with zeros")
    size = said["spatial_size"]
    i, j, k = (max(1, int(side)) for side in (size if isinstance(size, list | tuple) else [size] * 3))
    return Pad(shape=(i, j, k))


STEPS: Mapping[str, Callable[[Words, Target, int], Step]] = {
    "Orientation": _orient,
    "ScaleIntensityRange": _range,
    "NormalizeIntensity": _normalise,
    "ScaleIntensity": _to_one,
    "SpatialPad": _pad,
}
"""MONAI's transforms of which a step of ours is an exact copy."""


def _decision(words: Words, target: Target) -> set[str]:
    said = _asked(words, target, "softmax", "sigmoid", "argmax", "threshold", "to_onehot")
    threshold = said.get("threshold")
    if isinstance(threshold, list):  # one for each key
        threshold = threshold[0]
    if threshold not in (None, False, 0.5):
        raise _refused(words, target, f"its threshold is {threshold}, and 0.5 is hilum's")
    softmax = any(said.get(name) not in (None, False, [False]) for name in ("softmax", "argmax"))
    sigmoid = said.get("sigmoid") not in (None, False, [False]) or threshold == 0.5
    return ({"softmax"} if softmax else set()) | ({"sigmoid"} if sigmoid and not softmax else set())


def _largest(words: Words, target: Target) -> tuple[tuple[int, ...], bool]:
    said = _asked(words, target, "applied_labels", "independent", "connectivity", "is_onehot", "num_components")
    if said.get("num_components", 1) != 1 or said.get("connectivity") not in (None, 3):
        raise _refused(words, target, "one part, its voxels sharing a corner at least, is what hilum keeps")
    labels = said.get("applied_labels")
    if labels is None:
        raise _refused(words, target, "it does not name its applied_labels")
    return tuple(labels) if isinstance(labels, list) else (int(labels),), said.get("independent") is False


def _refused(words: Words, target: Target, why: str, advice: str = "") -> UsageError:
    return UsageError(
        f"{words.file} asks for {target.path}, and {why}; only what can be done exactly is imported. "
        f"{advice or 'Run this bundle in MONAI, or take the transform out of a copy if it does nothing to your scans.'}"
    )
