"""A window through a U-Net of 32 channels and as many levels as it bears, as segment runs it and as it is usually run."""

from typing import Any

from kernel_cases import Case, Work

WIDTH, CLASSES = 32, 3


def window(side: int) -> Case:
    def make(device: str, dtype: str) -> dict[str, Work]:
        from network_layout import usual

        import networks

        module = networks.load("residual_unet")
        settings = module.Config(width=WIDTH, plain=True, blocks=(2,), decoder=2, bias=True)
        config = module.fit(settings, patch=(side,) * 3, spacing=(1.0, 1.0, 1.0))
        ours, theirs = (module.build(config, channels=1, classes=CLASSES).eval().to(device) for _ in "12")
        usual(theirs).load_state_dict(ours.state_dict())
        return {
            "ours": run(ours, side, device, half=True),
            "ours, float32": run(ours, side, device, half=False),
            "reference": run(theirs, side, device, half=False),
            "eager": run(theirs, side, device, half=True),
        }

    return Case(
        name=f"plain U-Net, width {WIDTH}, one {side}^3 window; reference: default layout, InstanceNorm3d, float32",
        make=make,
        devices=("cpu",),
        goal="ours at least 3.5 times the reference",
    )


def run(network: Any, side: int, device: str, *, half: bool) -> Work:
    import torch

    scan = torch.randn(1, 1, side, side, side, device=device)

    def once() -> Any:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=half):
            return network(scan)

    return once


CASES = [window(96)]
