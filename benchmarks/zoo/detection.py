"""What a detector needs besides images: what there is to find in them, and a smaller size.

Detectors are told by their signature: an argument `targets`. Without targets they have no training,
and with random weights they find nothing in evaluation, so nothing could be checked.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from aim_surgery.verification.samples import Samples

LEAST, MOST = 64, 96  # pixels of the shorter and the longer side, where a detector resizes
_HEIGHT, _WIDTH = 64, 80
_OBJECTS, _KEYPOINTS = 4, 17
_SIDE = 6  # pixels of an object: few anchors match one so small, and each costs a mask
_SEED = 3


def takes_targets(model: nn.Module) -> bool:
    """Whether a model is a detector."""
    return "targets" in inspect.signature(model.forward).parameters


def with_targets() -> Samples:
    """Two images that differ in size, each with boxes, labels, masks and keypoints."""
    generator = torch.Generator().manual_seed(_SEED)
    sizes = ((_HEIGHT, _WIDTH), (_WIDTH, _HEIGHT))
    images = [torch.rand(3, *size, generator=generator) for size in sizes]
    return Samples((images, [_target(*size, generator) for size in sizes]), {})


def _target(height: int, width: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    size = torch.tensor([width, height])
    extent = _SIDE * (1 + torch.rand(_OBJECTS, 2, generator=generator))
    start = torch.rand(_OBJECTS, 2, generator=generator) * (size - 2 * _SIDE)
    masks = torch.zeros(_OBJECTS, height, width, dtype=torch.uint8)
    for mask, (x, y), (w, h) in zip(masks, start.int(), extent.int(), strict=True):
        mask[y : y + h, x : x + w] = 1
    inside = torch.rand(_OBJECTS, _KEYPOINTS, 2, generator=generator)
    points = start[:, None] + inside * extent[:, None]
    return {
        "boxes": torch.cat([start, start + extent], 1),
        "labels": torch.ones(_OBJECTS, dtype=torch.int64),
        "masks": masks,
        "keypoints": torch.cat([points, torch.ones(_OBJECTS, _KEYPOINTS, 1)], 2),
    }


def resize_less(model: nn.Module) -> str:
    """Let a detector that resizes its images do so to a smaller size, as its factory could.

    Args:
        model: Changed in place.

    Returns:
        What was done, in words; "" for other models, and where the size is fixed.
    """
    transform: Any = getattr(model, "transform", None)
    if not takes_targets(model) or not hasattr(transform, "min_size"):
        return ""
    if getattr(transform, "fixed_size", None):
        return ""
    transform.min_size, transform.max_size = (LEAST,), MOST
    return f"built to resize its images to {LEAST} pixels"
