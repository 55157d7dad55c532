"""nnU-Net v2's own trainer, ended by a clock. Run by the peers' interpreter alone: nnUNet_extTrainer names this folder.

Each trainer keeps nnU-Net's network, loss, optimiser, sampling and augmentation. They differ in when they end, in what the
learning rate follows and in the number of windows per step; nothing is scored on the way, for that would cost minutes.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

MOMENT_OF_THE_END = "BENCHMARK_ENDS_AT"
"""The environment's word for the end of the minutes, in seconds since 1970."""
REPETITION = "BENCHMARK_SEED"


class TimeIsUp(Exception):
    """The minutes are over in the middle of an epoch."""


class FirstStep(nnUNetTrainer):
    """As shipped; says when its first step is done."""

    told = False

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        done = super().train_step(batch)
        if not self.told:
            print("first step done", flush=True)
            self.told = True
        return done


class AsShipped(nnUNetTrainer):
    """The default schedule (1000 epochs of 250 steps), its weights kept as they are when the minutes are over."""

    steps = 0
    first_step_at: float | None = None
    """In seconds since 1970, as every moment here."""

    def on_train_start(self) -> None:
        seed_everything()
        super().on_train_start()
        self.begun = time.time()

    def run_training(self) -> None:
        try:
            super().run_training()
        except TimeIsUp:
            self.on_train_end()

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        if share_left(self.begun) == 0:
            raise TimeIsUp
        return self.counted(batch)

    def counted(self, batch: dict[str, Any]) -> dict[str, Any]:
        done = super().train_step(batch)
        self.steps += 1
        self.first_step_at = self.first_step_at or time.time()
        return done

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        if share_left(self.begun) == 0:
            raise TimeIsUp
        return super().validation_step(batch)

    def on_train_end(self) -> None:
        super().on_train_end()
        facts = {
            "steps": self.steps,
            "epochs": self.current_epoch,
            "batch": self.batch_size,
            "first_step_at": self.first_step_at,
            "ended_at": time.time(),
        }
        Path(self.output_folder, "benchmark.json").write_text(json.dumps(facts))

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Left to nnUNetv2_predict, outside the minutes."""


class Scheduled(AsShipped):
    """The same recipe, its polynomial rate reaching zero just when the minutes are over; no time spent on validation."""

    def run_training(self) -> None:
        self.on_train_start()
        self.network.train()
        while left := share_left(self.begun):
            for group in self.optimizer.param_groups:
                group["lr"] = self.initial_lr * left**0.9  # nnU-Net's power
            self.counted(next(self.dataloader_train))
        self.on_train_end()


class ScheduledOf2(Scheduled):
    """Two windows per step, nnU-Net's smallest batch."""

    def _set_batch_size_and_oversample(self) -> None:
        super()._set_batch_size_and_oversample()
        self.batch_size = 2


def share_left(begun: float) -> float:
    """How much of the time from the first step to the end is left, 1 to 0."""
    end = float(os.environ[MOMENT_OF_THE_END])
    return max(0.0, (end - time.time()) / max(end - begun, 1e-9))


def seed_everything() -> None:
    """nnU-Net seeds nothing; with this its network begins alike. Its augmenting processes draw as they like."""
    seed = int(os.environ[REPETITION])
    torch.manual_seed(seed)
    numpy.random.seed(seed)
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # nnUNetv2_train takes every core of the host, allowed or not
