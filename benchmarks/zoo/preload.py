"""Imported once by the process that the models' processes are forked from: what they all need.

A first operation imports parts of torch that later ones find there; it is done here, so that the
time of an operation is an operation's.
"""

import contextlib

import torch
from torch import nn

import aim_surgery
from benchmarks.zoo.libraries import import_torchvision_if_any

torch.set_num_threads(1)
import_torchvision_if_any()
with contextlib.suppress(ImportError):
    import timm  # noqa: F401
with contextlib.suppress(ImportError):
    import transformers  # noqa: F401

aim_surgery.transform(nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)))
