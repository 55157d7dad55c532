"""All networks in a table: what each is, weighs and costs on one patch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import networks
from kernels import channel_attention, position_attention
from preprocessing.plan import Plan

from .footprint import Triple, footprint, put_on_cpu

DEFAULT_PATCH: Triple = (64, 64, 64)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of the table."""

    name: str
    paper: str
    good_for: str
    patch: Triple
    """What was asked for, rounded up to what the network takes."""
    parameters: int
    gigaflops: float
    """Of one window in use, two per multiply-add of convolutions, matrix products and attention."""
    step_gb: float
    """At the peak of a training step, on a CPU; the process around it not counted."""


def entries(plan: Plan | None = None) -> list[Entry]:
    """Every network at its defaults, for the plan's windows, channels and classes."""
    return [entry(name, plan) for name in networks.available()]


def entry(name: str, plan: Plan | None = None) -> Entry:
    """One network's line. Nothing is computed: its tensors have shapes and no voxels."""
    module = networks.load(name)
    channels, classes = (len(plan.channels), plan.classes) if plan else (1, 3)
    asked, batch = (plan.patch, plan.batch) if plan else (DEFAULT_PATCH, 2)
    config = module.fit(module.Config(), patch=asked, spacing=plan.spacing_mm if plan else (1.0, 1.0, 1.0))
    patch = _rounded(asked, module.divisor(config))
    held = footprint(
        lambda: module.build(config, channels=channels, classes=classes), channels=channels, patch=patch, batch=batch
    )
    with torch.device("meta"):
        network = module.build(config, channels=channels, classes=classes).eval()
    with FakeTensorMode():
        put_on_cpu(network.requires_grad_(False))
        with FlopCounterMode(display=False, custom_mapping=OURS) as counted, torch.no_grad():
            network(torch.empty(1, channels, *patch))
    return Entry(
        name=name,
        paper=module.PAPER,
        good_for=module.GOOD_FOR,
        patch=patch,
        parameters=sum(weights.numel() for weights in network.parameters()),
        gigaflops=counted.get_total_flops() / 1e9,
        step_gb=held.gigabytes("cpu"),
    )


def table(plan: Plan | None = None) -> str:
    """For `hilum show networks`."""
    found = entries(plan)
    asked, batch = (plan.patch, plan.batch) if plan else (DEFAULT_PATCH, 2)
    rows = [("network", "parameters", "GFLOP", "GB a step", "good for", "paper")]
    for one in found:
        rounded = "" if one.patch == asked else f" (window {_by(one.patch)})"
        rows.append(
            (
                one.name,
                f"{one.parameters:,}",
                f"{one.gigaflops:.1f}",
                f"{one.step_gb:.2f}",
                one.good_for + rounded,
                one.paper,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    lines += [
        "",
        f"GFLOP of one window of {_by(asked)} in use; gigabytes of a training step of {batch} of them in float32, beside the"
        " process itself.",
        "All at their defaults, which suit a few CPU cores; `hilum show networks --plan PLAN.yaml` takes a plan's windows.",
    ]
    return "\n".join(lines)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Numbers to the right, words to the left."""
    return [
        word.rjust(width) if column in (1, 2, 3) else word.ljust(width)
        for column, (word, width) in enumerate(zip(row, widths, strict=True))
    ]


def _rounded(patch: Triple, divisor: Triple) -> Triple:
    d, h, w = (math.ceil(n / of) * of for n, of in zip(patch, divisor, strict=True))
    return d, h, w


def _by(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))


def _position(q: Sequence[int], k: Sequence[int], v: Sequence[int], *rest: Any, **more: Any) -> int:
    *groups, n, d = q
    return 2 * math.prod(groups) * n * k[-2] * (d + v[-1])


def _channel(x: Sequence[int], *rest: Any, **more: Any) -> int:
    batch, channels, places = x
    return 4 * batch * channels * channels * places


OURS: dict[Any, Any] = {
    getattr(torch.ops.hilum, kernel.__name__.rpartition(".")[2]): count
    for kernel, count in ((position_attention, _position), (channel_attention, _channel))
}
"""Of our own operations, which torch cannot know."""
