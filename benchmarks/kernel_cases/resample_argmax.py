"""Logits of many organs from the prepared grid to labels on a scan's own, as a segmentation ends."""

import math
from typing import TYPE_CHECKING

from kernel_cases import Case, Work

if TYPE_CHECKING:
    import torch

Triple = tuple[int, int, int]


def organs(classes: int, shape: Triple, device: str, dtype: str) -> "torch.Tensor":
    """Logits as a network has them: high within round organs, falling to either side of rough borders; class 0 is the
    background."""
    import torch

    random = torch.Generator().manual_seed(0)
    coarse = tuple(-(-size // 4) for size in shape)
    axes = torch.meshgrid(*(torch.linspace(0, 1, size) for size in coarse), indexing="ij")
    logits = torch.empty(classes, *shape, dtype=getattr(torch, dtype), device=device)
    for number, organ in enumerate(logits):
        field = 0.5 * torch.randn(coarse, generator=random)
        if number:
            centre = 0.1 + 0.8 * torch.rand(3, generator=random)
            radius = 0.05 + 0.15 * torch.rand(3, generator=random)
            away = sum(((axis - c) / r) ** 2 for axis, c, r in zip(axes, centre, radius, strict=True))
            field += (6 - 6 * away.sqrt()).clamp(min=-12)
        finer = torch.nn.functional.interpolate(field[None, None].to(device), size=shape, mode="trilinear")
        organ.copy_(finer[0, 0])
    return logits


def decision(
    classes: int, before: Triple, after: Triple, *, dense: bool = True, threshold: float | None = None, goal: str = ""
) -> Case:
    def make(device: str, dtype: str) -> dict[str, Work]:
        import torch

        from kernels import resample_argmax

        logits = organs(classes, before, device, dtype)
        arguments = (logits, after, None, threshold, None, False)
        ours: dict[str, Work] = {"ours": lambda: resample_argmax.fused(*arguments)}
        if not dense and device == "cpu":
            return ours

        def decided(finer: torch.Tensor) -> torch.Tensor:
            if threshold is None:
                return finer.argmax(0)
            numbers = torch.arange(1, classes + 1, device=finer.device).view(-1, 1, 1, 1)
            return ((finer > threshold) * numbers).amax(0)

        def eager() -> torch.Tensor:
            """As most write it: all classes on the new grid, then the greatest."""
            return decided(torch.nn.functional.interpolate(logits[None], size=after, mode="trilinear")[0])

        def one_by_one() -> torch.Tensor:
            """As those write it who have run out of memory: a class at a time, and the best so far."""
            best = torch.full(after, -torch.inf if threshold is None else threshold, device=device)
            label = torch.zeros(after, dtype=torch.uint8, device=device)
            for number, organ in enumerate(logits):
                finer = torch.nn.functional.interpolate(organ[None, None], size=after, mode="trilinear")[0, 0]
                wins = finer > (best if threshold is None else threshold)
                label.masked_fill_(wins, number + (threshold is not None))
                best = torch.where(wins, finer, best)
            return label

        def nnunet() -> torch.Tensor:
            from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

            spacing = [new / old for old, new in zip(before, after, strict=True)]
            finer = resample_data_or_seg_to_shape(
                logits.cpu(), after, spacing, (1, 1, 1), is_seg=False, order=1, order_z=0, force_separate_z=None
            )
            return decided(torch.from_numpy(finer))

        return ours | {
            "reference": lambda: resample_argmax.reference(*arguments),
            "eager": eager,
            "compiled": torch.compile(eager),
            "a class at a time": one_by_one,
            "nnU-Net": nnunet,
        }

    what = f"{classes} classes" if threshold is None else f"{classes} regions"
    return Case(
        name=f"{what}, {'x'.join(map(str, before))} to {'x'.join(map(str, after))}",
        make=make,
        bytes_moved=4 * classes * math.prod(before),
        fixed_bytes=math.prod(after),
        goal=goal,
    )


CASES = [
    decision(3, (128, 128, 104), (240, 240, 155), threshold=0.0),
    decision(
        40, (128, 164, 184), (200, 256, 288), goal="CPU: a sixth of nnU-Net's time, an eighth of its memory; H200: 80 % of the floor"
    ),
    decision(118, (200, 256, 256), (400, 512, 512), dense=False, goal="under 2 GB"),
]  # fmt: skip
