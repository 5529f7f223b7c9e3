"""The original's quirks, as edits of a plan that the general configuration makes.

every layer reads            -> include: the first convolution of each block
add, pointwise, layer norm   -> replace, widths (16, 16, 32), 3x3, batch norm, sigmoid
every float is its own       -> 1,024 units of 1,024 ones, each the value of 49 floats
one memory                   -> a second one for the identity blocks, which nobody writes to
the last write               -> left out, as nobody reads it then
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import aim_surgery
from aim_surgery import AimConfig, Plan
from aim_surgery.planning import Memory
from benchmarks.lunkad2021.model import SIZE

FLOATS = 50_176
IDENTITY = "identity"
LAST_WRITE = "res5a"

CONFIG = AimConfig(
    budget=None,
    memory=FLOATS,
    init="fresh",
    include="*.branch2a",
    write="sample",
    write_at=("res2a", "res3a", "res4a", LAST_WRITE),
    mode="replace",
    widths=(16, 16, 32),
    kernel_size=3,
    norm="batch",
    activation="sigmoid",
)
# A 1x1 convolution 1024 -> 1024 on a (1024, 7, 7) tensor of ones gives each position the same.
MEMORY = Memory(FLOATS, (1024, 7, 7), inputs=1024, shared=49)


def original_plan(model: nn.Module, *, last_write: bool = False) -> Plan:
    """Plan the original's operation.

    Args:
        model: A `KerasResNet50`; it may live on the meta device.
        last_write: Whether to keep the write after stage 5, which nobody reads.

    Returns:
        The plan, for `aim_surgery.apply`.
    """
    image = torch.zeros(1, 3, SIZE, SIZE, device=next(model.parameters()).device)
    plan = aim_surgery.plan(model, image, config=CONFIG)
    plan = plan.with_memory(MEMORY)
    reads = tuple(
        read
        if read.site.layer.endswith("a.branch2a")  # of the block that begins a stage
        else dataclasses.replace(read, memory=IDENTITY, version=0)
        for read in plan.reads
    )
    second = dataclasses.replace(MEMORY, name=IDENTITY)
    plan = dataclasses.replace(plan, reads=reads, further=(second,)).checked()
    return plan if last_write else plan.without_writes(LAST_WRITE)


def reference() -> dict[str, Any]:
    """The original's reads, writes and counts, read off the notebook's own summary."""
    return json.loads(Path(__file__).with_name("lunkad2021.json").read_text("utf-8"))
