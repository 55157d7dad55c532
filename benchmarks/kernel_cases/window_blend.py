"""Windows of logits into the volume, as a segmentation adds them."""

from kernel_cases import Case, Work


def blend(classes: int, side: int, volume: tuple[int, int, int]) -> Case:
    def make(device: str, dtype: str) -> dict[str, Work]:
        import torch

        from kernels import window_blend

        total = torch.zeros(classes, *volume, device=device)
        window = torch.randn(classes, side, side, side, device=device).to(getattr(torch, dtype))
        bell = torch.hann_window(side + 2, periodic=False, device=device)[1:-1].contiguous()
        weights = bell[:, None, None] * bell[:, None] * bell
        at = tuple((n - side) // 2 for n in volume)
        inside = tuple(slice(a, a + side) for a in at)

        def eager() -> None:
            """As sliding-window code is usually written: a volume of weights, a product, a sum."""
            total[(slice(None), *inside)] += window * weights

        return {
            "ours": lambda: window_blend.fused(total, window, bell, bell, bell, at),
            "reference": lambda: window_blend.reference(total, window, bell, bell, bell, at),
            "eager": eager,
            "compiled": torch.compile(eager),
        }

    return Case(
        name=f"{classes} classes, window {side}^3 into {'x'.join(map(str, volume))}",
        make=make,
        bytes_moved=4 * classes * side**3,
        fixed_bytes=2 * 4 * classes * side**3,
        dtypes=("float32", "bfloat16"),
        goal="CPU: not slower than torch's own; H200: 80 % of the floor",
    )


CASES = [blend(3, 96, (160, 160, 160)), blend(40, 96, (160, 160, 128)), blend(118, 96, (128, 128, 128))]
