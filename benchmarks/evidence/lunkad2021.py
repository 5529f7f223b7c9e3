"""The original's settings on networks that are a thousandth of its size.

What is kept: only the first convolution of a block reads, all its planes; a write after the first
block of each stage replaces the memory; blocks of 3x3 convolutions with batch norm and sigmoid; a
memory with one value a channel; a second one, never written, for all other blocks; new weights
drawn, not zero. What is scaled: the memory's channels, a quarter of the last stage's (there half,
with 1x1 convolutions reading, which cost a ninth of these 3x3 ones), and the update blocks' widths
(16, 16, 32), which go with stages of 64 to 512, a quarter of that.

VGG's "block" is one convolution, as where `benchmarks/lunkad2021/README.md` speaks of VGG16. The
MLP has no stages: every hidden layer reads one memory, which is written after the first.
"""

from __future__ import annotations

import dataclasses
import math

from torch import nn

import aim_surgery
from aim_surgery import AimConfig, Plan
from aim_surgery.planning import Memory
from benchmarks.evidence.networks import WIDTHS, Network

IDENTITY = "identity"
_READS = {
    "resnet": ("stages.*.conv1",),
    "vgg": ("stages.*",),
    "mlp": ("hidden*",),
}
_FIRSTS = {  # sites that read the memory that is written
    "resnet": ("stages.0.0.conv1", "stages.1.0.conv1", "stages.2.0.conv1"),
    "vgg": ("stages.0.0", "stages.1.1", "stages.2.1"),
    "mlp": ("hidden1", "hidden2"),
}
_WRITES = {
    "resnet": ("stages.0.0", "stages.1.0"),
    "vgg": ("stages.0.2", "stages.1.3"),
    "mlp": None,
}


def plan(network: Network, model: nn.Module) -> Plan:
    """Plan the original's operation.

    Args:
        network: What the model is.
        model: Its module; left unchanged.

    Returns:
        The plan, for `aim_surgery.apply`.
    """
    channels = WIDTHS[network.name][-1] // 4
    small = AimConfig(budget=None, memory=channels, include=_READS[network.name], write="none")
    home = aim_surgery.plan(model, network.example(), config=small).memory.layout[1:]
    floats = channels * math.prod(home)
    config = dataclasses.replace(
        small,
        memory=floats,
        init="fresh",
        write="sample",
        write_at=_WRITES[network.name],
        mode="replace",
        widths=(4, 4, 8),
        kernel_size=3,
        norm="batch",
        activation="sigmoid",
    )
    found = aim_surgery.plan(model, network.example(), config=config)
    layout = (channels, *home)
    memory = Memory(floats, layout, inputs=channels, shared=math.prod(home))
    found = found.with_memory(memory)
    reads = tuple(
        read
        if read.site.layer in _FIRSTS[network.name]
        else dataclasses.replace(read, memory=IDENTITY, version=0)
        for read in found.reads
    )
    second = dataclasses.replace(memory, name=IDENTITY)
    further = (second,) if any(read.memory == IDENTITY for read in reads) else ()
    return dataclasses.replace(found, reads=reads, further=further).checked()
