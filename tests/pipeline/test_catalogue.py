"""The table of networks counts what is there."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import networks
from kernels import channel_attention, position_attention
from pipeline import catalogue
from pipeline.cli import main
from preprocessing.plan import Plan


def test_an_entry_says_what_the_network_itself_says(make_plan) -> None:
    plan: Plan = make_plan()
    found = catalogue.entry("residual_unet", plan)
    module = networks.load("residual_unet")
    config = module.fit(module.Config(), patch=plan.patch, spacing=plan.spacing_mm)
    network = module.build(config, channels=1, classes=plan.classes).eval()
    assert found.parameters == sum(weights.numel() for weights in network.parameters())
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        network(torch.zeros(1, 1, *found.patch))
    assert found.gigaflops == pytest.approx(counted.get_total_flops() / 1e9)
    assert found.step_gb > 0.1


@pytest.mark.parametrize(
    ("kernel", "arguments"),
    [
        (position_attention, (torch.zeros(2, 30, 4), torch.zeros(2, 20, 4), torch.zeros(2, 20, 16))),
        (channel_attention, (torch.zeros(2, 6, 5, 4), torch.ones(1), -1.0)),
    ],
    ids=["position", "channel"],
)
def test_attention_counts_as_much_as_its_plain_form(kernel, arguments) -> None:
    counts = []
    for form in (kernel.fused, kernel.reference):
        with FlopCounterMode(display=False, custom_mapping=catalogue.OURS) as counted, torch.no_grad():
            form(*arguments)
        counts.append(counted.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.slow
def test_show_prints_every_network(capsys: pytest.CaptureFixture[str], tmp_path: Path, make_plan) -> None:
    make_plan().write(tmp_path / "plan.yaml")
    assert main(["show", "networks", "--plan", str(tmp_path / "plan.yaml")]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in networks.available())
    assert "one window of 16x16x16" in printed
