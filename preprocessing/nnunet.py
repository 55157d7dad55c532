"""What nnU-Net v2 plans for a dataset, to the letter of its release 2.8.1, with the reason beside every number.

nnU-Net lays axes Superior, Anterior, Right, brings the coarsest to the front, and settles ties between axes in that order;
so do the rules here, and the plan turns everything back to Right, Anterior, Superior at its end.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from .plan import Fingerprint, Plan, Recipe, Triple
from .records import BadRecord
from .rules import STRIPPED, Spacing, hounsfield, kept_share, separate_rule
from .steps import Crop, Normalise, Orient, Pad, Resample, Scale

Stages = tuple[tuple[Triple, ...], tuple[Triple, ...]]
Topology = Callable[[tuple[float, float, float], Spacing], Stages]
"""From a window and its spacing to the stride and the kernel of each stage of a U-Net, finest first."""
Configuration = Literal["3d_fullres", "3d_lowres", "2d"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One of nnU-Net's planners: a network, and how large it may grow."""

    memory_gb: float
    """The GPU it was tuned for; its budgets grow and shrink with the memory that is asked for."""
    volume: float
    """How many numbers the convolutions may put out for one window in 3-D; two windows fill the memory."""
    slice: float
    """The same in 2-D; of the plain network 12 windows fill the memory."""
    residual: bool
    blocks: tuple[int, ...]
    """Convolutions, or residual blocks, per stage of the encoder; the last number serves all deeper ones."""
    decoder: int
    """Convolutions per stage of the decoder."""
    covered: float
    """A step sees no more than this share of the dataset's voxels."""


RESIDUAL = Preset(
    memory_gb=8, volume=6.8e8, slice=1.35e8, residual=True, blocks=(1, 3, 4, 6), decoder=1, covered=1.0
)  # fmt: skip
PRESETS = {
    "plain": Preset(memory_gb=8, volume=5.6e8, slice=8.5e7, residual=False, blocks=(2,), decoder=2, covered=0.05),
    "resenc_m": RESIDUAL,
    "resenc_l": replace(RESIDUAL, memory_gb=24, volume=2.1e9, slice=3.8e8),
    "resenc_xl": replace(RESIDUAL, memory_gb=40, volume=3.6e9, slice=5.6e8),
}
"""nnU-Net v2's planners: ExperimentPlanner, nnUNetPlannerResEncM, L and XL."""

WIDTH, WIDEST, WIDEST_FLAT = 32, 320, 512
EDGE, EDGE_FLAT = 256, 2048
"""A window begins as a cube (a square) of so many voxels, stretched to the spacing, and shrinks until it fits."""
WINDOWS, WINDOWS_FLAT = 2, 12
"""How many windows the budgets are for."""
COARSER = 1.03
"""How much coarser each attempt at a low resolution is than the one before."""
LOW_SHARE = 0.25
"""A window that sees less of the median scan than this gets a configuration of lower resolution beside it."""


def nnunet_plan(
    fingerprint: Fingerprint,
    topology: Topology,
    *,
    preset: str = "plain",
    configuration: Configuration = "3d_fullres",
    memory_gb: float | None = None,
) -> Plan:
    """One configuration of what nnU-Net plans; refused where nnU-Net plans none such."""
    planner = _planner(fingerprint, topology, preset, memory_gb)
    layouts = planner.layouts()
    if configuration not in layouts:
        raise BadRecord(
            f"nnU-Net plans {', '.join(layouts)} for {fingerprint.name} and no {configuration}: a low resolution is of use "
            "only where a window sees less than a quarter of a scan, and slices are all there is of a single slice. "
            "Ask for one that it plans."
        )
    return _plan(fingerprint, planner, layouts[configuration], configuration, "3d_lowres" in layouts)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Grid, window and stages of one configuration. Axes in nnU-Net's order; in 2-D the first is one slice thick."""

    spacing: Spacing
    median: tuple[float, float, float]
    """The median scan at that spacing."""
    patch: Triple
    batch: int
    strides: tuple[Triple, ...]
    kernels: tuple[Triple, ...]
    fitting: int
    """Windows that the budget holds."""
    covering: int
    """Windows that make up the share of the dataset that a step may see."""


@dataclass(frozen=True, kw_only=True)
class Planner:
    """nnU-Net's rules with what they are applied to."""

    topology: Topology
    preset: Preset
    share: float
    """The memory that is asked for over the one that the preset was tuned for."""
    classes: int
    cases: int
    axes: Triple
    """Which of Right, Anterior, Superior comes first, second, third."""
    spacing: Spacing
    median: tuple[float, float, float]

    def layouts(self) -> dict[str, Layout]:
        """Every configuration that nnU-Net would train, by its name."""
        flat = self._layout(self.spacing, self.median, self._voxels(self.spacing), flat=True)
        if self.median[0] == 1:
            return {"2d": flat}
        full = self._layout(self.spacing, self.median, self._voxels(self.spacing))
        low = self._lower(full)
        return {"3d_fullres": full, **({"3d_lowres": low} if low else {}), "2d": flat}

    def elements(self, patch: Triple, strides: Sequence[Triple], flat: bool = False) -> int:
        """Numbers that all convolutions put out for one window: nnU-Net's measure of memory."""
        sizes = np.prod(np.array(patch) // np.cumprod(strides, axis=0), axis=1).astype(int)
        widths = widths_of(len(strides), WIDEST_FLAT if flat else WIDEST)
        total = self.classes * int(sizes[0])
        for stage, (size, width) in enumerate(zip(sizes.tolist(), widths, strict=True)):
            blocks = self.preset.blocks[min(stage, len(self.preset.blocks) - 1)]
            encoder = 2 * blocks + 1 if self.preset.residual else blocks  # + 1: the stem, and below it the shortcut
            decoder = self.preset.decoder + 1 if stage + 1 < len(widths) else 0  # + 1: the transposed convolution
            total += (encoder + decoder) * width * size
        return total

    def budget(self, flat: bool = False) -> float:
        """What `elements` of one window may come to."""
        return (self.preset.slice if flat else self.preset.volume) * self.share

    def _voxels(self, spacing: Spacing) -> float:
        """Of the whole dataset at that spacing."""
        return float(np.prod(np.array(self.spacing) / np.array(spacing) * np.array(self.median))) * self.cases

    def _layout(
        self, spacing: Spacing, median: tuple[float, float, float], voxels: float, flat: bool = False
    ) -> Layout:
        if flat:  # no window of one slice can be shrunk or halved across it
            spacing, median = (math.inf, *spacing[1:]), (math.inf, *median[1:])
        patch, strides, kernels = self._fitting(spacing, median, flat)
        windows = WINDOWS_FLAT if flat else WINDOWS
        fitting = round(self.budget(flat) / self.elements(patch, strides, flat) * windows)
        covering = round(voxels * self.preset.covered / float(np.prod(patch, dtype=np.float64)))
        return Layout(
            spacing=(self.spacing[0], *spacing[1:]) if flat else spacing,
            median=(1.0, *median[1:]) if flat else median,
            patch=patch,
            batch=max(min(fitting, covering), 2),
            strides=strides,
            kernels=tuple((1, k[1], k[2]) for k in kernels) if flat else kernels,
            fitting=fitting,
            covering=covering,
        )

    def _fitting(
        self, spacing: Spacing, median: tuple[float, float, float], flat: bool
    ) -> tuple[Triple, tuple[Triple, ...], tuple[Triple, ...]]:
        """The largest window on the way down from 256³ (2048²) whose elements the budget holds."""
        patch, strides, kernels = self._padded(_first(spacing, median, flat), spacing)
        if len(strides) < 2:  # nnU-Net plans a network without a single stage for it, which cannot be built
            grown = list(patch)
            grown[int(np.argmin(spacing))] = 16
            patch, strides, kernels = self._padded(_triple(grown), spacing)
        # the plain planner compares two windows, the others one
        windows = 1.0 if self.preset.residual else WINDOWS / (WINDOWS_FLAT if flat else WINDOWS)
        while self.elements(patch, strides, flat) * windows > self.budget(flat):
            smaller = self._smaller(patch, strides, spacing, median)
            if smaller is None:
                break
            patch, strides, kernels = smaller
        return patch, strides, kernels

    def _smaller(
        self, patch: Triple, strides: tuple[Triple, ...], spacing: Spacing, median: tuple[float, float, float]
    ) -> tuple[Triple, tuple[Triple, ...], tuple[Triple, ...]] | None:
        """The side that is longest beside the median scan gives way by what a window of that size is a multiple of."""
        ratios = [side / whole for side, whole in zip(patch, median, strict=True)]
        axis = max(range(3), key=lambda one: (ratios[one], one))
        tentative = list(patch)
        tentative[axis] -= _divisor(strides)[axis]
        if tentative[axis] < 1:
            return None
        step = _divisor(self.topology(_triple(tentative), spacing)[0])[axis]
        tentative[axis] = patch[axis] - step
        smaller = self._padded(_triple(tentative), spacing)
        return smaller if len(smaller[1]) > 1 and math.prod(smaller[0]) < math.prod(patch) else None

    def _padded(
        self, patch: tuple[float, float, float], spacing: Spacing
    ) -> tuple[Triple, tuple[Triple, ...], tuple[Triple, ...]]:
        """The window grown to a multiple of what its stages divide it by; the stages are those of the smaller one."""
        strides, kernels = self.topology(patch, spacing)
        grown = [math.ceil(side / step) * step for side, step in zip(patch, _divisor(strides), strict=True)]
        return _triple(grown), strides, kernels

    def _lower(self, full: Layout) -> Layout | None:
        """The finest low resolution at which a window sees a quarter of the median scan; None where full is enough."""
        spacing, low = np.array(full.spacing), None
        window, whole = math.prod(full.patch), math.prod(self.median)
        median = whole
        while window / median < LOW_SHARE:
            finer = spacing.max() / spacing > 2  # a coarse axis waits for the others
            spacing[finer if finer.any() else slice(None)] *= COARSER
            shape = np.array(full.spacing) / spacing * np.array(self.median)
            median = float(np.prod(shape))
            low = self._layout(_triple_mm(spacing), _triple([max(1, round(n)) for n in shape]), median * self.cases)
            window = math.prod(low.patch)
        return low if low and whole / median >= 2 else None


def widths_of(stages: int, widest: int) -> list[int]:
    """Channels per stage: twice as many in each."""
    return [min(WIDTH * 2**stage, widest) for stage in range(stages)]


def _planner(fingerprint: Fingerprint, topology: Topology, preset: str, memory_gb: float | None) -> Planner:
    chosen = PRESETS[preset]
    spacing = target_spacing(fingerprint)
    axes = _axes(spacing)
    turned = np.array(spacing)[list(axes)]
    shapes = [
        np.round(np.array(facts.spacing_mm)[list(axes)] / turned * np.array(facts.cropped)[list(axes)])
        for facts in fingerprint.cases.values()
    ]
    i, j, k = np.median(shapes, axis=0).tolist()
    return Planner(
        topology=topology,
        preset=chosen,
        share=(memory_gb or chosen.memory_gb) / chosen.memory_gb,
        classes=len(fingerprint.labels) + 1 + (fingerprint.ignored is not None),  # it counts what dataset.json names
        cases=len(fingerprint.cases),
        axes=axes,
        spacing=_triple_mm(turned),
        median=(i, j, k),
    )


def target_spacing(fingerprint: Fingerprint) -> Spacing:
    """The median; of an axis much coarser and much shorter than the others the finest tenth, if that is no finer than they."""
    spacing = fingerprint.median(lambda facts: facts.spacing_mm)
    size = fingerprint.median(lambda facts: facts.cropped)
    first = _axes(_triple_mm(spacing))[0]
    others = [axis for axis in range(3) if axis != first]
    coarsest = float(spacing[others].max())
    if spacing[first] > 3 * coarsest and size[first] * 3 < size[others].min():
        tenth = float(np.percentile([facts.spacing_mm[first] for facts in fingerprint.cases.values()], 10))
        spacing[first] = tenth if tenth >= coarsest else coarsest + 1e-5
    return _triple_mm(spacing)


def _axes(spacing: Spacing) -> Triple:
    """The coarsest of Superior, Anterior, Right first, then the others in that order."""
    first = max((2, 1, 0), key=lambda axis: spacing[axis])
    i, j, k = [first, *(axis for axis in (2, 1, 0) if axis != first)]
    return i, j, k


def _first(spacing: Spacing, median: tuple[float, float, float], flat: bool) -> tuple[float, float, float]:
    """256³ voxels (2048²) in the proportions of the spacing, cut to the median scan."""
    start = 1 if flat else 0
    aspect = 1 / np.array(spacing[start:])
    volume = EDGE_FLAT**2 if flat else EDGE**3
    sides = aspect * (volume / np.prod(aspect)) ** (1 / len(aspect))
    cut = [min(round(float(side)), whole) for side, whole in zip(sides, median[start:], strict=True)]
    i, j, k = [1] * start + cut
    return i, j, k


def _divisor(strides: Sequence[Triple]) -> Triple:
    return _triple([math.prod(stride[axis] for stride in strides) for axis in range(3)])


def _triple(numbers: Sequence[int]) -> Triple:
    i, j, k = (int(n) for n in numbers)
    return i, j, k


def _triple_mm(numbers: Sequence[float] | np.ndarray) -> Spacing:
    x, y, z = (float(n) for n in numbers)
    return x, y, z


def _plan(fingerprint: Fingerprint, planner: Planner, layout: Layout, configuration: str, cascade: bool) -> Plan:
    def turned(values: Sequence[Any]) -> tuple[Any, Any, Any]:
        i, j, k = (values[planner.axes.index(axis)] for axis in range(3))
        return i, j, k

    patch = turned(layout.patch)
    spacing = turned([round(mm, 6) for mm in layout.spacing])
    separate, why_separate = separate_rule(spacing)
    normalise, why_normalise = normalise_rule(fingerprint)
    recipe, why_recipe = recipe_rule(
        planner.axes[0] if configuration == "2d" else None, cascade and configuration == "3d_fullres"
    )
    options: dict[str, Any] = {
        "plain": not planner.preset.residual,
        "width": WIDTH,
        "widest": WIDEST_FLAT if configuration == "2d" else WIDEST,
        "blocks": list(planner.preset.blocks),
        "decoder": planner.preset.decoder,
        "bias": True,
        "strides": [list(turned(stride)) for stride in layout.strides],
        "kernels": [list(turned(kernel)) for kernel in layout.kernels],
    }
    return Plan(
        name=fingerprint.name,
        channels=fingerprint.channels,
        labels=fingerprint.labels,
        steps=(Orient(), Crop(margin=0), normalise, Resample(spacing_mm=spacing, separate=separate), Pad(shape=patch)),
        spacing_mm=spacing,
        patch=patch,
        batch=layout.batch,
        dataset=fingerprint.dataset,
        ignored=fingerprint.ignored,
        mode="nnunet",
        network_options=options,
        recipe=recipe,
        reasons={
            "orient": "axes run to Right, Anterior, Superior; nnU-Net keeps a file's own and brings the coarsest to the front",
            "crop": "nnU-Net v2 always cuts the zero border",
            "separate": why_separate,
            "normalise": why_normalise,
            **_why(planner, layout, configuration),
            "network_options": f"nnU-Net v2, {_planner_name(planner)}: stages halve the finest axes until 4 voxels are left; "
            f"{WIDTH} channels, twice as many in each stage, at most {options['widest']}",
            **why_recipe,
        },
    )


def _why(planner: Planner, layout: Layout, configuration: str) -> dict[str, str]:
    scan = "×".join(f"{n:g}" for n in layout.median)
    gigabytes = planner.preset.memory_gb * planner.share
    spacing = "nnU-Net v2: the median; of an axis over 3 times coarser and 3 times shorter than the others its 10th percentile"
    if configuration == "3d_lowres":
        spacing += f"; coarsened by 3 % at a time until a window sees {LOW_SHARE:.0%} of the median scan"
    if configuration == "2d":
        spacing += "; nnU-Net leaves the distance of slices as each scan has it"
    elements = planner.elements(layout.patch, layout.strides, configuration == "2d")
    budget = planner.budget(configuration == "2d")
    return {
        "spacing_mm": spacing,
        "patch": f"nnU-Net v2: its convolutions put out {elements / 1e6:.0f} million numbers of {budget / 1e6:.0f} million that "
        f"{gigabytes:g} GB stand for; the median scan has {scan} voxels, coarsest axis first",
        "batch": f"nnU-Net v2: {layout.fitting} windows fit, {layout.covering} make up {planner.preset.covered:.0%} of the "
        "dataset's voxels; the smaller, and at least 2",
    }


def _planner_name(planner: Planner) -> str:
    return next(name for name, preset in PRESETS.items() if preset == planner.preset)


AS_IT_IS = Scale(by="dataset", low=-math.inf, high=math.inf)
BYTES = Scale(by="dataset", low=-math.inf, high=math.inf, deviation=255.0)


def normalise_rule(fingerprint: Fingerprint) -> tuple[Normalise, str]:
    """By the channel's name, as nnU-Net has it: CT, noNorm, rgb_to_0_1; everything else is measured scan by scan."""
    kept = kept_share(fingerprint)
    stripped = kept < STRIPPED
    scales, why = [], []
    for number, channel in enumerate(fingerprint.channels):
        match channel.casefold():
            case "ct":
                scales.append(hounsfield(fingerprint, number))
                why.append(
                    f"{channel}: clipped to the 0.5 and 99.5 percentiles under the labels, then their mean and deviation"
                )
            case "nonorm":
                scales.append(AS_IT_IS)
                why.append(f"{channel}: left as it is")
            case "rgb_to_0_1":
                scales.append(BYTES)
                why.append(f"{channel}: over 255")
            case "rescale_to_0_1":
                scales.append(Scale(by="range"))
                why.append(f"{channel}: stretched from its lowest to its highest, 0 to 1")
            case _:
                scales.append(Scale(by="scan", nonzero=stripped))
                where = "where it is not zero" if stripped else "over the whole scan"
                why.append(
                    f"{channel}: its own mean and deviation {where}, for the median case keeps {kept:.0%} of its voxels"
                )
    return Normalise(channels=tuple(scales)), "nnU-Net v2: " + "; ".join(why)


def recipe_rule(slices: int | None, cascade: bool) -> tuple[Recipe, dict[str, str]]:
    """nnUNetTrainer's constants. `slices`: the axis that windows of one slice lie across, None in 3-D."""
    recipe = Recipe(
        optimiser="sgd",
        learning_rate=0.01,
        weight_decay=3e-5,
        momentum=0.99,
        warmup_steps=0,
        average=0.0,
        loss="dice_cross_entropy",
        batch_dice=cascade or slices is not None,
        foreground=0.33,
        mirror=(slices != 0, slices != 1, slices != 2),
        augmentation="nnunet",
        epochs=1000,
        steps_per_epoch=250,
    )
    said = {f"recipe.{field.name}": "nnU-Net v2, nnUNetTrainer" for field in fields(recipe)}
    said["recipe.batch_dice"] = "nnU-Net v2: in 2-D, and at full resolution where a low one is trained beside it"
    return recipe, said
