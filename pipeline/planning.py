"""plan: a dataset is looked at, and the rules say what to do with it, in the memory there is and with the network at hand."""

import logging
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import networks
from networks.parts.stages import topology
from preprocessing import datasets
from preprocessing.nnunet import PRESETS, Configuration, nnunet_plan
from preprocessing.plan import Fingerprint, Plan, Triple, with_patch
from preprocessing.reading import STRICT, Reading
from preprocessing.records import decode
from preprocessing.rules import Demand, Machine, Spacing, make_plan
from preprocessing.steps import Resample

from .config import refuse_unknown_match
from .demand import BESIDE_GB, PROCESS_GB, Elsewhere, Find, Footprint, Network, Precision, Settings, here
from .errors import UsageError
from .machine import measure_machine
from .progress import Progress, silent

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a person may decide about a plan."""

    network: str = "residual_unet"
    """The network that must fit: a file of networks/."""
    network_options: dict[str, Any] = field(default_factory=dict)
    """Settings of that network; they win over the rules."""
    mode: Literal["hilum", "nnunet"] = "hilum"
    """Whose rules: hilum's, for this machine; or nnU-Net v2's, to the letter."""
    preset: Literal["plain", "resenc_m", "resenc_l", "resenc_xl"] = "plain"
    """Which of nnU-Net's networks; in its mode alone."""
    configuration: Configuration = "3d_fullres"
    """Which of nnU-Net's configurations; in its mode alone."""
    device: str = "auto"
    """Plan for cpu, cuda, or auto: a GPU where there is one."""
    memory_gb: float | None = None
    """Plan for so much memory; by default what is free, or what nnU-Net's preset is made for."""
    plan: Path | None = None
    """A plan to follow instead of making one."""

    def __post_init__(self) -> None:
        if self.memory_gb is not None and self.memory_gb <= 0:
            raise UsageError(f"memory_gb is {self.memory_gb:g}; it must be above 0. Leave it out to have it measured.")
        if self.preset not in PRESETS:
            raise UsageError(f"preset is {self.preset!r}; one of {', '.join(PRESETS)} is needed. Correct it.")


def plan(
    dataset: Path, out: Path | None = None, wishes: Wishes = Wishes(), progress: Progress = silent,
    reading: Reading = STRICT,
) -> Plan:  # fmt: skip
    """Fingerprint a dataset and plan for it and for this machine; written to `out` when given."""
    opened = datasets.open_dataset(dataset, reading)
    refuse_unknown_match(reading, opened.channels)
    fingerprint = datasets.take_fingerprint(opened, lambda done, of: progress("look at every case", done, of))
    with Elsewhere() as elsewhere:
        # who waits for a plan alone does not wait for torch, if others asked before
        made, _ = _planned(fingerprint, wishes, here if "torch" in sys.modules else elsewhere)
    if out:
        made.write(out)
    return made


def planned(fingerprint: Fingerprint, wishes: Wishes = Wishes()) -> tuple[Plan, Any]:
    """The plan, its window one that the network accepts, and the network's Config with the stages that suit it."""
    made, fitted = _planned(fingerprint, wishes, here)
    return made, decode(networks.load(wishes.network).Config, fitted, where=f"network_options of {wishes.network}")


def _planned(fingerprint: Fingerprint, wishes: Wishes, find: Find) -> tuple[Plan, Settings]:
    _refuse_missing(wishes.device)
    networks.refuse_unknown(wishes.network)
    network, machine = Network(name=wishes.network, find=find), measure_machine(wishes.device)
    if wishes.memory_gb and wishes.mode == "hilum":
        machine = replace(machine, memory_gb=wishes.memory_gb)
    made = _made(fingerprint, network, machine, wishes) if wishes.plan is None else Plan.read(wishes.plan)
    if wishes.plan:
        _refuse_two_spacings(made, wishes.plan)
    made = replace(made, network_options=made.network_options | wishes.network_options)
    fitted = network.fit(made.network_options, made.patch, made.spacing_mm)
    made = _accepted(made, network.divisor(fitted), wishes)
    return _with_memory(made, network, fitted, machine, wishes), fitted


def _refuse_missing(device: str) -> None:
    """A GPU that is not there is refused, not planned for as a CPU; `auto` and `cpu` are always there."""
    if device not in ("auto", "cpu"):
        from .prediction import choose_device  # not at the top: torch

        choose_device(device)


def _refuse_two_spacings(made: Plan, path: Path) -> None:
    for step in made.steps:
        if isinstance(step, Resample) and step.spacing_mm != made.spacing_mm:
            raise UsageError(
                f"{path} says spacing_mm {made.spacing_mm}, and {step.spacing_mm} in its resample step; scans can only be "
                "brought to one. Write the same in both."
            )


def _made(fingerprint: Fingerprint, network: Network, machine: Machine, wishes: Wishes) -> Plan:
    if wishes.mode == "hilum":
        return _bounded(fingerprint, network, machine, wishes)
    made = nnunet_plan(
        fingerprint, topology, preset=wishes.preset, configuration=wishes.configuration, memory_gb=wishes.memory_gb
    )
    if set(made.network_options) <= network.knows():
        return made
    why = f"{wishes.network} has stages of its own; nnU-Net's are for residual_unet"
    return replace(made, network_options={}, reasons=made.reasons | {"network_options": why})


GPU_WIDTH = 32
"""nnU-Net v2's first channels; on a CPU a network's own default stays."""


def _bounded(fingerprint: Fingerprint, network: Network, machine: Machine, wishes: Wishes) -> Plan:
    """hilum's rules with what this very network asks for: measured for the window that they give, until they keep it."""
    options, why_options = _options(network, machine, wishes)
    chosen = options | wishes.network_options

    def divisor(patch: Triple, spacing: Spacing) -> Triple:
        return network.divisor(network.fit(chosen, patch, spacing))

    made = make_plan(fingerprint, machine, Demand(divisor=divisor))
    fixed, per_voxel = 0.0, 0.0
    for _ in range(6):
        step = _counted(made, network, network.fit(chosen, made.patch, made.spacing_mm), machine)
        again = step.demand(math.prod(made.patch) * made.batch, _kind(machine)[0])
        # only ever more: what a smaller window asks for must not bring the larger one back
        fixed, per_voxel = max(fixed, again[0]), max(per_voxel, again[1])
        demand = Demand(divisor=divisor, fixed_gb=fixed, bytes_per_voxel=per_voxel)
        before, made = made, make_plan(fingerprint, machine, demand)
        if (made.patch, made.batch) == (before.patch, before.batch):
            break
    return replace(made, network_options=options, reasons=made.reasons | {"network_options": why_options})


def _options(network: Network, machine: Machine, wishes: Wishes) -> tuple[dict[str, Any], str]:
    if machine.has_gpu and "width" not in wishes.network_options and "width" in network.knows():
        return {"width": GPU_WIDTH}, f"a GPU is fast enough for {GPU_WIDTH} channels, as nnU-Net v2 has"
    return {}, f"{wishes.network}'s own defaults"


def _accepted(made: Plan, divisor: Triple, wishes: Wishes) -> Plan:
    """A window that a rule made is grown to what the network accepts; one that a person wrote is theirs to change."""
    i, j, k = (-(-side // step) * step for side, step in zip(made.patch, divisor, strict=True))
    if made.patch == (i, j, k):
        return with_patch(made, made.patch)  # whoever edits the window of a plan need not think of its padding
    if wishes.plan:
        raise UsageError(
            f"{wishes.plan} has windows of {made.patch} voxels; {wishes.network} with its settings needs multiples of "
            f"{divisor}. Write {[i, j, k]}, or plan for that network with `hilum plan --network {wishes.network}`."
        )
    why = f"{made.reasons['patch']}; grown from {made.patch} to what {wishes.network} can halve"
    return replace(with_patch(made, (i, j, k)), reasons=made.reasons | {"patch": why})


def _with_memory(made: Plan, network: Network, fitted: Settings, machine: Machine, wishes: Wishes) -> Plan:
    kind, _ = _kind(machine)
    step = _counted(made, network, fitted, machine)
    needed = step.gigabytes(kind)
    if needed > machine.memory_gb:
        logger.warning(
            "a training step of %s is predicted to take %.1f GB and %.1f GB are free; it may be stopped for want of memory. "
            "Plan with less (--memory_gb), or on a larger machine", wishes.network, needed, machine.memory_gb,
        )  # fmt: skip
    total = round(PROCESS_GB[kind] + needed, 2)
    return replace(
        made, memory_gb=total, reasons=made.reasons | {"memory_gb": _why_memory(made, step, machine, wishes)}
    )


def _why_memory(made: Plan, step: Footprint, machine: Machine, wishes: Wishes) -> str:
    kind, _ = _kind(machine)
    process = f"{PROCESS_GB[kind]:g} GB of the process itself, " if PROCESS_GB[kind] else ""
    return (
        f"predicted for a step of {wishes.network} on {made.batch} windows: {process}{step.held / 1e9:.2f} GB of weights and "
        f"what the optimiser keeps, {(step.peak - step.held) / 1e9:.2f} GB for the windows, {BESIDE_GB[kind]:g} GB beside "
        f"them; {machine.memory_gb:.1f} GB are there"
    )


def _counted(made: Plan, network: Network, fitted: Settings, machine: Machine) -> Footprint:
    # the loss that is counted knows a background; of regions, which have none, one alone would be too few for it
    return network.step(
        fitted, channels=len(made.channels), classes=max(2, made.classes), patch=made.patch, batch=made.batch,
        recipe=made.recipe, precision=_kind(machine)[1],
    )  # fmt: skip


def _kind(machine: Machine) -> tuple[str, Precision]:
    """Training is in bfloat16 where there is a GPU."""
    return ("cuda", "bfloat16") if machine.has_gpu else ("cpu", "float32")
