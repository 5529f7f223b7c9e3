"""What a training step costs in each arm and method: ratios of steps that take turns.

Run it with nothing else on the machine. Arms are timed against the base, methods against full
fine-tuning; the seconds that a run's row has besides are those of a busy machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from rich.progress import track
from torch import nn

from benchmarks import measure
from benchmarks.evidence import data
from benchmarks.evidence.adapting import METHODS
from benchmarks.evidence.arms import ARMS, base
from benchmarks.evidence.networks import Network
from benchmarks.evidence.recipes import FROM_SCRATCH

FILE = "step-time.json"
_BATCH, _STEPS, _ROUNDS = 50, 5, 9
_AGAINST = {"arms": "base", "methods": "full"}


def run(
    name: str, networks: Sequence[str], device: str, folder: Path, *, quick: bool
) -> dict[str, Any]:
    """Time all arms and methods, and write what was found.

    Args:
        name: Of the data set.
        networks: Which networks.
        device: Where.
        folder: Where `FILE` goes.
        quick: Two rounds only.

    Returns:
        What the file holds.
    """
    found = data.load(name)
    rows = []
    for network in track(networks, "step-time"):
        for group in _AGAINST:
            rows += _time(Network(network, found.shape, found.classes), group, device, quick)
    content = {"rows": rows, "environment": measure.environment()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    return content


def _time(network: Network, group: str, device: str, quick: bool) -> list[dict[str, Any]]:
    steps = {
        arm: _step(model, network, device, training)
        for arm, (model, training) in _models(network, group).items()
    }
    against = _AGAINST[group]
    sides = {against: steps[against], **steps}
    rounds = measure.take_rounds(sides, rounds=2 if quick else _ROUNDS)
    rows = []
    for arm in steps:
        pairs = rounds.pairs(arm, against)
        rows.append(
            {
                "network": network.name,
                "group": group,
                "arm": arm,
                "ratio": pairs.median,
                "smallest": min(pairs.ratios),
                "largest": max(pairs.ratios),
                "milliseconds": 1e3 * min(pairs.first) / _STEPS,
            }
        )
    return rows


def _models(network: Network, group: str) -> dict[str, tuple[nn.Module, bool]]:
    if group == "arms":
        return {arm: (ARMS[arm].make(network, 0), True) for arm in FROM_SCRATCH}
    half = replace(network, classes=network.classes // 2)
    return {
        name: (method.make(base(half, 0), half, 0), method.training)
        for name, method in METHODS.items()
    }


def _step(model: nn.Module, network: Network, device: str, training: bool) -> Callable[[], object]:
    """Some training steps on noise."""
    model = model.to(device).train(training)
    inputs = torch.randn(_BATCH, *network.shape, device=device)
    labels = torch.randint(network.classes // 2, (_BATCH,), device=device)
    optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)

    def steps() -> object:
        loss = inputs.new_zeros(())
        for _ in range(_STEPS):
            loss = F.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()  # waits for a GPU

    return steps
