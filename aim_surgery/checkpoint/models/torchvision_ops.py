"""`import torchvision`, also where its compiled operators cannot load.

A CPU-only PyTorch beside the torchvision wheel built for CUDA is a common pair (each is what its
own index offers). There ``torchvision/_C.so`` finds no CUDA libraries, nobody declares the
operators of the ``torchvision`` namespace, and ``import torchvision`` stops with ``operator
torchvision::nms does not exist``, although no classifier needs one of them. This file declares what
is missing, so that every model can be built, and gives the two operators of detection models in
plain PyTorch:

* ``nms``: keep box b, in the order of decreasing scores, unless iou(b, kept) > threshold for a box
  kept before;
* ``roi_align``: torchvision's own Python version, a chunk of boxes at a time and without the
  ``torch.compile`` around it, which would need a C++ compiler at run time.

The others exist by name only and say so when called. Where the extension loads, nothing is touched.
"""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from aim_surgery.errors import ModelSpecError

# As torchvision's C++ sources (torchvision/csrc/ops/*.cpp) declare them.
_POOLED = "float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_SIZES = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
_DEFORM = (
    "Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, "
    "SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, "
    "SymInt groups, SymInt offset_groups, bool use_mask"
)
SCHEMAS = {
    "box_iou_rotated": "(Tensor boxes1, Tensor boxes2) -> Tensor",
    "deform_conv2d": f"({_DEFORM}) -> Tensor",
    "_deform_conv2d_backward": (
        f"(Tensor grad, {_DEFORM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "ps_roi_align": (
        f"(Tensor input, Tensor rois, {_POOLED}, int sampling_ratio) -> (Tensor, Tensor)"
    ),
    "_ps_roi_align_backward": (
        f"(Tensor grad, Tensor rois, Tensor channel_mapping, {_POOLED}, int sampling_ratio, "
        f"{_SIZES}) -> Tensor"
    ),
    "ps_roi_pool": f"(Tensor input, Tensor rois, {_POOLED}) -> (Tensor, Tensor)",
    "_ps_roi_pool_backward": (
        f"(Tensor grad, Tensor rois, Tensor channel_mapping, {_POOLED}, {_SIZES}) -> Tensor"
    ),
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qroi_align": (
        "(Tensor input, Tensor rois, float input_scale, int input_zero_point, float rois_scale, "
        f"int rois_zero_point, {_POOLED}, int sampling_ratio, bool aligned) -> Tensor"
    ),
    "roi_align": (
        f"(Tensor input, Tensor rois, {_POOLED}, int sampling_ratio, bool aligned) -> Tensor"
    ),
    "_roi_align_backward": (
        f"(Tensor grad, Tensor rois, {_POOLED}, {_SIZES}, int sampling_ratio, bool aligned)"
        " -> Tensor"
    ),
    "roi_pool": f"(Tensor input, Tensor rois, {_POOLED}) -> (Tensor, Tensor)",
    "_roi_pool_backward": (
        f"(Tensor grad, Tensor rois, Tensor argmax, {_POOLED}, {_SIZES}) -> Tensor"
    ),
}

_ROIS_AT_ONCE = 64  # eager roi_align holds about ten (rois, channels, 4·h·w) tensors

# Declarations live as long as their Library object.
_libraries: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Return the torchvision package, imported if need be with its missing operators declared.

    Calling it again is free. If the import fails, `sys.modules` holds no part of torchvision.

    Returns:
        The `torchvision` module.

    Raises:
        ModelSpecError: torchvision is not installed, or is installed and broken for another reason
            than its operators: install the build that matches PyTorch.

    Example:
        >>> import_torchvision().models.resnet18().fc.out_features
        1000
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as err:
        if err.name == "torchvision":
            raise ModelSpecError("torchvision is not installed: pip install torchvision") from err
        _forget_torchvision()
        raise _broken(err) from err
    except Exception as err:
        _forget_torchvision()
        if not _lacks_operators(err):
            raise _broken(err) from err

    _declare_missing_operators()
    try:
        torchvision = importlib.import_module("torchvision")
        _use_plain_kernels()
    except Exception as err:
        _forget_torchvision()
        raise _broken(err) from err
    return torchvision


def nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression: indices of the boxes to keep, best first.

    Equal scores keep their order, and a box without area suppresses nothing, as in torchvision's
    CPU kernel.

    Shapes:
        dets (N, 4), scores (N,) -> (kept,)

    Args:
        dets: Boxes as (x1, y1, x2, y2).
        scores: One score for each box.
        iou_threshold: A box goes if it overlaps a box kept before it by more than this.

    Returns:
        int64 indices into `dets`, in the order of decreasing scores.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9], [5.0, 5.0, 6.0, 6.0]])
        >>> nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5)
        tensor([1, 2])
    """
    area = (dets[:, 2] - dets[:, 0]) * (dets[:, 3] - dets[:, 1])
    waiting = scores.argsort(stable=True, descending=True)
    kept = []
    while waiting.numel():
        best, waiting = waiting[:1], waiting[1:]
        kept.append(best)
        top_left = torch.maximum(dets[best, :2], dets[waiting, :2])
        bottom_right = torch.minimum(dets[best, 2:], dets[waiting, 2:])
        overlap = (bottom_right - top_left).clamp(min=0).prod(dim=1)
        iou = overlap / (area[best] + area[waiting] - overlap)
        # In double, as the C++ kernel compares; 0/0 is no overlap.
        waiting = waiting[~(iou.double() > iou_threshold)]
    return torch.cat(kept) if kept else waiting


def _lacks_operators(err: Exception) -> bool:
    message = str(err)
    return (
        isinstance(err, RuntimeError)
        and "operator torchvision::" in message
        and "does not exist" in message
    )


def _forget_torchvision() -> None:
    """Drop what a failed import leaves behind; a second attempt must not find half of it."""
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]


def _declare_missing_operators() -> None:
    missing = [name for name in SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if not missing:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in missing:
        library.define(name + SCHEMAS[name])
    if "nms" in missing:
        library.impl("nms", nms, "CompositeExplicitAutograd")
    _libraries.append(library)


def _use_plain_kernels() -> None:
    """Lift the guard in front of `nms`, and run `_roi_align` without compiling it."""
    # By full name, because the attribute torchvision.ops.roi_align is the function, not the module.
    guarded = vars(importlib.import_module("torchvision.ops.boxes"))
    compiled = vars(importlib.import_module("torchvision.ops.roi_align"))
    guarded["_assert_has_ops"] = _nothing_to_assert
    eager = getattr(compiled.get("_roi_align"), "__wrapped__", None)
    if eager is not None:
        compiled["_roi_align"] = _in_chunks(eager)


def _nothing_to_assert() -> None:
    pass


def _in_chunks(roi_align: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def chunked(features: Tensor, rois: Tensor, *args: Any) -> Tensor:
        return torch.cat([roi_align(features, part, *args) for part in rois.split(_ROIS_AT_ONCE)])

    return chunked


def _broken(err: Exception) -> ModelSpecError:
    return ModelSpecError(
        f"torchvision is installed, but `import torchvision` fails beside torch {torch.__version__}"
        f" ({type(err).__name__}: {err}); install the build that matches PyTorch, see "
        "https://github.com/pytorch/vision#installation"
    )
