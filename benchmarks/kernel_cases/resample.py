"""Scans brought to another spacing: a CT, an MR scan, a map of probabilities, beside those who do the same."""

from typing import Any

from kernel_cases import Case, Work

Triple = tuple[int, int, int]


def scan(name: str, before: Triple, after: Triple, order: int, goal: str = "", backward: bool = False) -> Case:
    def make(device: str, dtype: str) -> dict[str, Work]:
        import torch

        from kernels import resample

        voxels = 300 * torch.randn(1, *before, device=device)
        entrants: dict[str, Work] = {
            "ours": lambda: resample.fused(voxels, after, order),
            "reference": lambda: resample.reference(voxels, after, order),
        }
        if backward:
            weights = torch.randn(1, *after, device=device)

            def there_and_back(resampled: Any) -> Any:
                scan = voxels.detach().requires_grad_()
                return torch.autograd.grad(resampled(scan), scan, weights)

            entrants = {
                "ours": lambda: there_and_back(lambda scan: resample.fused(scan, after, order)),
                "reference": lambda: there_and_back(lambda scan: resample.reference(scan, after, order)),
            }
            if order == 1:
                entrants["eager"] = lambda: there_and_back(lambda scan: interpolated(scan, after))
            return entrants
        if order == 1:
            entrants["eager"] = lambda: interpolated(voxels, after)
        if device == "cpu":
            array = voxels[0].numpy()
            entrants["preprocessing (numpy in, numpy out)"] = lambda: prepared(array, after, order)
            entrants["scipy"] = lambda: by_scipy(array, after, order)
            entrants["volresample"] = lambda: by_volresample(array, after, order)
            entrants["MONAI Spacing"] = lambda: by_monai(array, after, order)
        return entrants

    size = "x".join(map(str, before)) + " -> " + "x".join(map(str, after))
    numbers = before[0] * before[1] * before[2] + after[0] * after[1] * after[2]
    return Case(
        name=f"{name} {size}, {'cubic' if order == 3 else 'linear'}{', forward and backward' if backward else ''}",
        make=make,
        bytes_moved=4 * numbers * (2 if backward else 1),
        goal=goal,
    )


def interpolated(voxels: Any, after: Triple) -> Any:
    """What people write; linear alone, there is no cubic in three dimensions."""
    import torch

    return torch.nn.functional.interpolate(voxels[None], after, mode="trilinear", align_corners=False)[0]


def prepared(array: Any, after: Triple, order: int) -> Any:
    from preprocessing.resampling import resample

    return resample(array[None], after, order=order)


def by_scipy(array: Any, after: Triple, order: int) -> Any:
    from scipy import ndimage

    factors = [one / other for one, other in zip(after, array.shape, strict=True)]
    return ndimage.zoom(array, factors, order=order, mode="mirror", grid_mode=True)


def by_volresample(array: Any, after: Triple, order: int) -> Any:
    import volresample

    return volresample.resample(array, after, mode="cubic" if order == 3 else "linear")


def by_monai(array: Any, after: Triple, order: int) -> Any:
    import monai
    import numpy
    import torch
    from monai.transforms import Spacing

    before = numpy.diag([*(one / other for one, other in zip(after, array.shape, strict=True)), 1.0])
    image = monai.data.MetaTensor(torch.from_numpy(array)[None], affine=before)
    mode, border = (3, "mirror") if order == 3 else ("bilinear", "border")
    return Spacing(pixdim=(1.0, 1.0, 1.0), mode=mode, padding_mode=border, scale_extent=True)(image)


CT = ("CT", (512, 512, 160), (273, 273, 320))  # 0.8 x 0.8 x 3.0 mm to 1.5 mm
MR = ("MR", (240, 240, 155), (200, 200, 129))  # 1.0 mm to 1.2 mm
CASES = [
    scan(*CT, 3, goal="CPU: 30 times scipy's order 3, equal to 0.01 HU"),
    scan(*CT, 1),
    scan(*MR, 3),
    scan(*MR, 1),
    scan(*MR, 3, backward=True),
    scan(*MR, 1, backward=True),
]
