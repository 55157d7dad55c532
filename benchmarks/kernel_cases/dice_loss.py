"""Dice and cross-entropy, forward and backward, as training asks for them at each step."""

from kernel_cases import Case, Work


def loss(
    classes: int, space: tuple[int, int, int], batch: int, *, regions: bool = False, partial: bool = False, goal: str
) -> Case:
    def make(device: str, dtype: str) -> dict[str, Work]:
        import torch
        from torch.nn import functional

        from kernels import dice_loss

        logits = torch.randn(batch, classes, *space, device=device).to(getattr(torch, dtype))
        numbers = classes + 1 if regions else classes
        target = torch.randint(numbers, (batch, *space), device=device)
        membership = torch.ones(classes, numbers, device=device).triu(1).bool() if regions else None
        annotated = torch.arange(numbers - 1, device=device).expand(batch, -1) % 2 == 0 if partial else None

        def timed(criterion) -> Work:
            def work() -> torch.Tensor:
                leaf = logits.detach().requires_grad_()
                return torch.autograd.grad(criterion(leaf), leaf)[0]

            return work

        def from_sums(sums) -> torch.Tensor:
            index = (2 * sums.both + 1e-5) / (sums.found + sums.true + 1e-5)
            return sums.surprise.sum() / sums.counted.sum().clamp_min(1) - index.mean()

        def eager(x: torch.Tensor) -> torch.Tensor:
            """As it is usually written: probabilities and one-hot, then their sums."""
            axes = tuple(range(2, x.ndim))
            if membership is not None:
                truth, share = membership[:, target].movedim(1, 0).float(), x.float().sigmoid()
                surprise = functional.binary_cross_entropy_with_logits(x.float(), truth)
            else:
                truth = functional.one_hot(target, classes).movedim(-1, 1)[:, 1:].float()
                share, surprise = x.float().softmax(1)[:, 1:], functional.cross_entropy(x.float(), target)
            index = (2 * (share * truth).sum(axes) + 1e-5) / (share.sum(axes) + truth.sum(axes) + 1e-5)
            return surprise - index.mean()

        entrants = {
            "ours": timed(lambda x: from_sums(dice_loss.fused(x, target, annotated, membership))),
            "reference": timed(lambda x: from_sums(dice_loss.reference(x, target, annotated, membership))),
        }
        if partial:
            return entrants  # nobody else asks for the sum of what was not looked for
        entrants |= {"eager": timed(eager), "compiled": timed(torch.compile(eager))}
        if not regions:
            entrants |= {"monai": timed(monai(target)), "nnunet": timed(nnunet(target))}
        return entrants

    numbers = batch * classes * space[0] * space[1] * space[2]
    kind = " regions" if regions else " classes"
    return Case(
        name=f"{classes}{kind}, {'x'.join(map(str, space))}, batch {batch}"
        + (", half of the labels annotated" if partial else "") + ", forward and backward",
        make=make,
        bytes_moved=3 * 4 * numbers,  # the logits twice, their gradient once
        fixed_bytes=2 * 8 * numbers // classes,  # the target twice
        dtypes=("float32", "bfloat16"),
        goal=goal,
    )  # fmt: skip


def monai(target):
    made = []

    def criterion(x):
        if not made:
            from monai.losses import DiceCELoss

            made.append(DiceCELoss(include_background=False, to_onehot_y=True, softmax=True))
        return made[0](x, target[:, None])

    return criterion


def nnunet(target):
    made = []

    def criterion(x):
        if not made:
            from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
            from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

            dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
            made.append(DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss))
        return made[0](x, target[:, None])

    return criterion


FLOOR = "H200: 80 % of the floor"
CASES = [
    loss(118, (96, 96, 96), 1, goal="CPU: twice MONAI's and nnU-Net's, at most 1.3 times the logits; " + FLOOR),
    loss(3, (40, 56, 40), 2, goal="CPU: not slower than eager"),
    loss(3, (128, 128, 128), 2, goal=FLOOR),
    loss(3, (128, 128, 128), 2, regions=True, goal=FLOOR),
    loss(40, (96, 96, 96), 2, partial=True, goal=FLOOR),
]
