"""The fit: what Lightning needs to know, one step after another, kept by the minute and gone on with to the bit."""

import copy
import logging
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from networks.parts import losses
from preprocessing.cores import usable_cores
from preprocessing.plan import Label, Plan

from . import slurm, tracking
from .cache import PreparedCase
from .checkpoint import SafeCheckpoints
from .comparison import compare
from .config import Train
from .data import Steps, Windows, whole
from .errors import UsageError
from .exhibits import DRAWING_SECONDS
from .metrics import dice
from .package import build_network
from .prediction import Inference, blended_logits, choose_device
from .progress import Progress
from .scoresheet import chosen
from .workshop import Job, Workshop

logger = logging.getLogger(__name__)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # it advertises other products

VALIDATION_CASES = 8
"""Held-out cases looked at now and then; all of them are scored at the end."""
VALIDATION_SHARE = 0.08
"""No more of the time than this goes into looking at them."""
PICTURES = 5
"""How often in a training the pictured cases are drawn."""
EXHIBITS = 3
"""Held-out cases that are segmented once more at the end, each for a page of its own."""


@dataclass
class Clock:
    """Where a training stands between its first second and its last. Minutes before a resume are counted too."""

    minutes: float | None
    """For the whole command, preparation and the last scoring included; None: epochs decide."""
    began: float
    """time.monotonic() when the command began."""
    before: float = 0.0
    """Minutes of training in earlier runs of it."""
    started: float | None = None
    """time.monotonic() at the first step of this run."""
    prepared: float = 0.0
    """Minutes that went by before the very first step."""
    scoring: float = 0.0
    """Minutes that the last scoring is expected to take."""

    def start(self) -> None:
        self.started = time.monotonic()
        if not self.before:
            self.prepared = (self.started - self.began) / 60
        if self.minutes and self.prepared > self.minutes / 2:
            logger.warning(
                "%.1f of %g minutes went into preparing the cases; training takes half of the minutes all the same",
                self.prepared, self.minutes,
            )  # fmt: skip

    def stop(self) -> None:
        self.before, self.started = self.trained, None

    @property
    def trained(self) -> float:
        """Minutes of training so far."""
        return self.before + (0.0 if self.started is None else (time.monotonic() - self.started) / 60)

    @property
    def share(self) -> float:
        """How much of the minutes for training lies behind, 0 to 1."""
        assert self.minutes is not None
        return min(1.0, self.trained / max(self.minutes / 2, self.minutes - self.prepared - self.scoring))


def fit(
    job: Job, settings: Train, cases: dict[str, PreparedCase], workshop: Workshop, tracker: tracking.Tracker | None,
    progress: Progress, began: float,
) -> "Training":  # fmt: skip
    """Trains to the end of the minutes or epochs, from where the workshop's checkpoint stands. No tracker: not rank 0."""
    lightning.seed_everything(settings.seed, verbose=False)
    device = choose_device(settings.device)
    held_out = [cases[i] for i in job.held_out]
    module = Training(job, settings, [cases[i] for i in job.trained_on], Clock(settings.minutes, began))
    on_cpu = device.type == "cpu"
    with warnings.catch_warnings(), _repeatable(on_cpu):
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # on a CPU they would starve it
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")  # Lightning 2.6 on torch 2.15
        trainer = lightning.Trainer(
            max_epochs=-1,  # one endless epoch: windows are numbered, so a training can stop and go on at any step
            max_steps=-1 if settings.minutes else module.last_step,
            accelerator="cpu" if on_cpu else "gpu",
            devices=[device.index] if device.index is not None and settings.devices == 1 else settings.devices,
            num_nodes=settings.nodes,
            strategy="auto" if settings.devices * settings.nodes == 1 else "ddp",
            precision="32-true" if on_cpu else "bf16-mixed",
            gradient_clip_val=12.0,  # nnU-Net v2
            default_root_dir=workshop.folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,
            limit_val_batches=0,
            plugins=[SafeCheckpoints()],
            callbacks=[Follow(), Watch(tracker, progress, held_out), Keep(workshop, settings.keep_seconds)],
        )
        trainer.fit(module, ckpt_path=workshop.checkpoint, weights_only=None)
    module.clock.stop()
    return module


@contextmanager
def _repeatable(on_cpu: bool) -> Iterator[None]:
    """On a CPU the same seed gives the same weights, to the bit; an operation that has no such way is an error."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(on_cpu or before[0], warn_only=before[1])
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@final
class Average:
    """The running mean of a network's weights: steadier than the last step's, most of all in a short training."""

    def __init__(self, network: nn.Module, keep: float) -> None:
        self.keep = keep
        self.network = copy.deepcopy(network).eval()

    @torch.no_grad()
    def follow(self, network: nn.Module, step: int) -> None:
        """One step of the network taken in; the first steps count for little."""
        keep = min(self.keep, (1 + step) / (10 + step))
        for mean, new in zip(self.network.state_dict().values(), network.state_dict().values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(new, 1 - keep)
            else:
                mean.copy_(new)


class Training(lightning.LightningModule):
    """What Lightning needs to know: the loss, the optimiser, the rate, the data. Nothing here knows a network by name."""

    def __init__(self, job: Job, settings: Train, trained_on: Sequence[PreparedCase], clock: Clock):
        super().__init__()
        self.network = build_network(job.network, job.network_config, job.plan)
        self.plan = job.plan
        self.recipe = job.recipe
        self.settings = settings
        self.trained_on = list(trained_on)
        self.loss = losses.build(
            self.recipe.loss,
            membership=torch.from_numpy(job.plan.membership),
            regions=job.plan.has_regions,
            batch_dice=self.recipe.batch_dice,
            skip_lowest=job.plan.mode == "nnunet",
        )
        self.clock = clock
        self.average = Average(self.network, self.recipe.average) if self.recipe.average else None
        self.steps_per_epoch = job.steps_per_epoch
        self.last_step = self.steps_per_epoch * job.epochs
        self.share_done = 0.0
        self.losses: list[Tensor] = []
        """Of the epoch in hand, on their device: to look at each would make a GPU wait."""
        self.own_losses: dict[str, list[Tensor]] = {}
        """Those of them that the network brought itself, by name."""
        self.is_whole = all(all(case.annotated) for case in trained_on)

    @property
    def best_network(self) -> nn.Module:
        """What is validated, scored and packed."""
        return self.average.network if self.average else self.network

    @property
    def epoch(self) -> int:
        """Complete epochs so far."""
        return self.global_step // self.steps_per_epoch

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        on_gpu = self.device.type == "cuda"
        share = max(1, usable_cores() // self.settings.devices)
        workers = self.settings.workers if self.settings.workers is not None else on_gpu * share
        steps = Steps(
            first=self.global_step, batch=self.plan.batch, rank=self.trainer.global_rank, ranks=self.trainer.world_size
        )
        windows = Windows(self.trained_on, self.plan, self.recipe, seed=self.settings.seed)
        return DataLoader(windows, batch_sampler=steps, num_workers=workers, pin_memory=on_gpu, worker_init_fn=_deaf)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        recipe, weights = self.recipe, self.network.parameters()
        if recipe.optimiser == "sgd":
            return torch.optim.SGD(
                weights, recipe.learning_rate, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True
            )
        return torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)

    def on_fit_start(self) -> None:
        if self.average:
            self.average.network.to(self.device)
        self.clock.start()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """The rate rises over the first steps, then falls to zero with the share that is left (nnU-Net's power)."""
        if self.settings.minutes:  # no rank may go by a clock of its own
            self.share_done = self.trainer.strategy.broadcast(self.clock.share)
        else:
            self.share_done = min(1.0, self.global_step / self.last_step)
        warm = min(1.0, (self.global_step + 1) / max(1, self.recipe.warmup_steps))
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.recipe.learning_rate * warm * (1 - self.share_done) ** 0.9
        torch.manual_seed(self.settings.seed + self.global_step)  # what a network draws depends on the step alone

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        image, target, annotated = batch
        answer = losses.answered(self.network(image))
        loss = self.loss(answer, target, None if self.is_whole else annotated)
        self.losses.append(loss.detach())
        for name, own in answer.losses.items():
            self.own_losses.setdefault(name, []).append(own.detach())
        return loss

    def mean_loss(self) -> Tensor:
        """Of the epoch so far."""
        each = torch.stack(self.losses)
        if not torch.isfinite(each).all():
            wrong = int((~torch.isfinite(each)).nonzero()[0])
            raise UsageError(
                f"the loss became {each[wrong].item()} in step {self.global_step - len(each) + wrong + 1}; it must stay "
                "finite. Lower the learning rate, and run `hilum check` on the dataset."
            )
        return each.double().mean()

    def refuse_broken_weights(self) -> None:
        """Before they are kept: on disk there is always a state that one can go on from."""
        if self.losses:
            self.mean_loss()
        if not all(bool(weights.isfinite().all()) for weights in self.network.parameters()):
            raise UsageError(
                f"a weight became infinite or not a number in step {self.global_step}; all must stay finite. Lower the "
                "learning rate; --resume goes on from the last state that was whole."
            )

    def whole_case(self, case: PreparedCase) -> tuple[Tensor, Tensor, Tensor]:
        """A prepared scan, its truth, and the logits as segmentation makes them: window by window."""
        image, truth = whole(case)
        network = self.best_network.eval()
        logits = blended_logits(image, network, self.plan.patch, self.plan.classes, Inference(), self.device)
        self.network.train()
        return image, truth, logits

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        clock = self.clock
        checkpoint["minutes"] = {"trained": clock.trained, "prepared": clock.prepared, "scoring": clock.scoring}
        checkpoint["losses"] = [float(loss) for loss in self.losses]
        checkpoint["own_losses"] = {name: [float(loss) for loss in each] for name, each in self.own_losses.items()}
        if self.average:
            checkpoint["average"] = dict(self.average.network.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        minutes, clock = checkpoint["minutes"], self.clock
        clock.before, clock.prepared, clock.scoring = minutes["trained"], minutes["prepared"], minutes["scoring"]
        self.losses = [torch.tensor(loss, device=self.device) for loss in checkpoint["losses"]]
        kept = checkpoint.get("own_losses", {})
        self.own_losses = {
            name: [torch.tensor(loss, device=self.device) for loss in each] for name, each in kept.items()
        }
        if self.average:
            self.average.network.load_state_dict(checkpoint["average"])


def _deaf(_: int) -> None:
    """A loader hears no Ctrl-C: the process it loads for decides when both end, and says so."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Follow(Callback):
    """What must be done after every step before it is looked at or kept; callbacks come before the module's own hooks."""

    def on_train_batch_end(self, trainer: Any, module: "Training", outputs: Any, batch: Any, batch_idx: int) -> None:
        if module.global_step == 1:
            logger.info("first step after %.1f s", time.monotonic() - module.clock.began)
        if module.average:
            module.average.follow(module.network, module.global_step)
        if module.settings.minutes and module.share_done >= 1:
            trainer.should_stop = True


class Keep(Callback):
    """The training on disk, by the clock: at any step, for steps and not epochs are what a training is made of."""

    def __init__(self, workshop: Workshop, every_seconds: float):
        self.workshop, self.every_seconds = workshop, every_seconds
        self.last = time.monotonic()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        is_due = time.monotonic() - self.last > self.every_seconds or module.global_step == 1 or slurm.is_time_up()
        if trainer.strategy.broadcast(is_due):
            module.refuse_broken_weights()
            trainer.save_checkpoint(self.workshop.folder / "last.ckpt")
            self.last = time.monotonic()
            if slurm.is_time_up() and trainer.is_global_zero:
                slurm.requeue()


class Watch(Callback):
    """Tells MLflow and whoever watches: the loss after every epoch, Dice of some held-out cases as often as is cheap."""

    def __init__(self, tracker: tracking.Tracker | None, progress: Progress, held_out: Sequence[PreparedCase]):
        self.tracker, self.progress, self.held_out = tracker, progress, list(held_out)
        self.pictured = -1
        self.shown: dict[str, int] = {}
        """Which cases are drawn: the worst, the median and the best of the first look, so that a slider compares alike."""
        self.note = ""
        self.free_from = 0.0
        """Before this moment another validation would take more than its share of the time."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training must know of the pictures it has drawn."""
        return {"shown": self.shown, "pictured": self.pictured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shown, self.pictured = state["shown"], state["pictured"]

    def on_train_batch_end(self, trainer: Any, module: "Training", outputs: Any, batch: Any, batch_idx: int) -> None:
        if module.global_step % module.steps_per_epoch == 0:
            loss = trainer.strategy.reduce(module.mean_loss(), reduce_op="mean")
            own = {
                f"train/{name}": float(trainer.strategy.reduce(torch.stack(each).double().mean(), reduce_op="mean"))
                for name, each in module.own_losses.items()
            }
            module.losses.clear()
            module.own_losses.clear()
            if self.tracker is not None:
                self._after_epoch(trainer, module, {"train/loss": float(loss)} | own)
        self._tell(module)

    def _after_epoch(self, trainer: Any, module: "Training", means: dict[str, float]) -> None:
        assert self.tracker is not None
        told = means | {
            "train/learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "train/minutes": module.clock.trained,
        }
        self.note = f", loss {means['train/loss']:.3f}"
        is_last = module.share_done >= 1 or module.global_step == module.last_step
        if self.held_out and (time.monotonic() >= self.free_from or is_last):
            told |= self._validated(module)
        self.tracker.metrics(told, step=module.epoch - 1)
        self.tracker.keep_up()  # before the next checkpoint: what a resumed run skips is in the store, or in the journal

    def _validated(self, module: "Training") -> dict[str, float]:
        began = time.monotonic()
        picture = int(module.share_done * (PICTURES - 1))
        seen = self.held_out[:VALIDATION_CASES]
        scores, drawn = self._looked(seen, module, is_due=picture > self.pictured)
        if drawn:
            self._show(drawn, step=max(0, module.epoch - 1))
        self.pictured = max(self.pictured, picture)
        seconds = time.monotonic() - began
        self.free_from = time.monotonic() + seconds / VALIDATION_SHARE
        each = 1.2 * seconds / len(seen)
        module.clock.scoring = (each * (len(self.held_out) + EXHIBITS) + EXHIBITS * DRAWING_SECONDS) / 60
        told = {name: float(np.mean(values)) for name, values in scores.items()}
        dices = [mean for name, mean in told.items() if name != "val/loss"]
        told["val/dice_mean"] = float(np.mean(dices)) if dices else 0.0
        self.note += f", Dice {told['val/dice_mean']:.3f}"
        return told

    def _looked(
        self, seen: Sequence[PreparedCase], module: "Training", is_due: bool
    ) -> tuple[dict[str, list[float]], dict[int, np.ndarray]]:
        """Scores by name, case after case; and pictures of the cases that are shown, by their number, where they are due."""
        scores: dict[str, list[float]] = {}
        means: list[float | None] = []
        drawn: dict[int, np.ndarray] = {}
        for number, case in enumerate(seen):
            image, truth, logits = module.whole_case(case)
            logits = logits.cpu()
            of_case = _dice(case, logits, truth, module.plan)
            loss = module.loss(logits[None], truth[None], torch.tensor([case.annotated]))
            for name, score in {**of_case, "val/loss": float(loss)}.items():
                scores.setdefault(name, []).append(score)
            means.append(float(np.mean(list(of_case.values()))) if of_case else None)
            if is_due and (not self.shown or number in self.shown.values()):
                drawn[number] = _drawn(image, truth, logits, means[-1], module)
        self.shown = self.shown or chosen(means)
        return scores, drawn

    def _show(self, drawn: dict[int, np.ndarray], step: int) -> None:
        assert self.tracker is not None
        for kind, number in self.shown.items():
            self.tracker.picture(f"validation/{kind} at first", drawn[number], step)

    def _tell(self, module: "Training") -> None:
        total = module.settings.minutes or float(module.last_step / module.steps_per_epoch)
        self.progress("train", module.share_done * total, total, f"epoch {module.epoch + 1}{self.note}")


def _dice(case: PreparedCase, logits: Tensor, truth: Tensor, plan: Plan) -> dict[str, float]:
    """Of each label that was looked for in a case."""
    found = {}
    for label, mask, true in masks(logits, truth, plan):
        score = dice(mask.numpy(), true.numpy())
        if score is not None and case.looked_for(label, plan):
            found[f"val/dice_{label.name}"] = score
    return found


def _drawn(image: Tensor, truth: Tensor, logits: Tensor, score: float | None, module: "Training") -> np.ndarray:
    drawn, given = torch.zeros_like(truth), torch.zeros_like(truth)
    for position, (_, found, true) in enumerate(masks(logits, truth, module.plan), start=1):
        drawn[found], given[true] = position, position
    words = f"epoch {module.epoch}" + ("" if score is None else f" · Dice {score:.2f}")
    plan = module.plan
    return compare(image.numpy(), given.numpy(), drawn.numpy(), plan.labels, plan.spacing_mm, words)


def masks(logits: Tensor, truth: Tensor, plan: Plan) -> Iterator[tuple[Label, Tensor, Tensor]]:
    """For each label in turn: where it was found and where it is, of the voxels whose truth is known."""
    known = truth >= 0
    winner = None if plan.has_regions else logits.argmax(dim=0)
    for number, (label, belongs) in enumerate(zip(plan.labels, torch.from_numpy(plan.membership), strict=True)):
        found = logits[number] > 0 if winner is None else winner == number + 1
        yield label, found & known, belongs[truth.clamp_min(0)] & known
