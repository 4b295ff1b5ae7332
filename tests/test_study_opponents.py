"""The study of opponents: its commands can be run, and its networks have the sizes that it names."""

import shlex
from pathlib import Path

import pytest
import torch

import compare
from engine.flops import forward_flops
from mmdit.network import Condition, Network
from studies.steps import Steps
from training import experiment

ROOT = Path(__file__).parents[1]
FILE = ROOT / "configs/studies/opponents.yaml"


def network_of(command: str) -> Network:
    """The network that a command of the study trains."""
    words = shlex.split(command.replace("{seed}", "1").replace("{out}", "out").replace("{store}", "store"))
    parser = experiment.parser("")
    part = experiment.Parser()
    part.add_subclass_arguments(Network, "network")
    return part.instantiate(experiment.Namespace(network=parser.parse_args(words[2:]).network)).network


def test_sizes_are_those_in_the_comment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = compare.read(FILE)
    assert isinstance(study, Steps)
    study.check()
    found = {}
    for name, command in study.steps.items():
        if not command.startswith("train.py fit"):
            continue
        network = network_of(command)
        condition = Condition(torch.zeros(1, 60, 160), torch.zeros(1, 128))
        flops = forward_flops(network, torch.zeros(1, 4, 8, 8), torch.zeros(1), condition)
        millions = sum(p.numel() for p in network.parameters()) / 1e6
        found[name.rsplit("/", 1)[1]] = f"{millions:.2f}", f"{flops / 1e6:.0f}"
    assert found == {"mmdit": ("2.89", "266"), "dit-flops": ("1.62", "265"), "cross": ("2.68", "266"),
                     "dit": ("2.81", "493"), "flow": ("3.71", "371"), "ddim": ("3.71", "371")}  # fmt: skip
    assert all(number in FILE.read_text() for sizes in found.values() for number in sizes)
