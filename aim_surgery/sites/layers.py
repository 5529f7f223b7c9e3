"""What a layer is: its kind and sizes, its weights by name, and whether it can be widened.

One set of rules for layers whose calls a graph shows (`calls`) and for those inside Python calls
(`inside`).
"""

from __future__ import annotations

import torch
from torch import nn

from aim_surgery.capture import Capture
from aim_surgery.capture.leaves import is_stock
from aim_surgery.nn.layer_types import LAYER_TYPES
from aim_surgery.nn.recurrent import own_parameters
from aim_surgery.sites.site import Kind

# What surgery may freeze or thaw without another plan; the other reasons are of the model's make.
FROZEN = "its weight is frozen"

# Kind, channels in, channels out, groups, kernel.
Geometry = tuple[Kind, int, int, int, tuple[int, ...]]


def geometry_of(layer: nn.Module) -> Geometry | None:
    """Kind, channels, groups and kernel of a layer of torch's; None for others."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        kind: Kind = "conv_transpose" if layer.transposed else "conv"
        channels = (layer.in_channels, layer.out_channels)
        return (kind, *channels, layer.groups, tuple(layer.kernel_size))
    if isinstance(layer, nn.Linear):
        return ("linear", layer.in_features, layer.out_features, 1, ())
    return None


def matrix_of(layer: nn.Module) -> torch.Size | None:
    """Shape of the matrix that a layer has under the name of `weight`; None where it has none."""
    weight = layer._parameters.get("weight")
    return None if weight is None or weight.ndim != 2 else weight.shape


def weights_of(capture: Capture, name: str) -> tuple[str, ...]:
    """Parameters that a layer's weight is, or is made of (weight norm, pruning), by all names.

    Args:
        capture: The captured model.
        name: Qualified name of the layer.

    Returns:
        Qualified names; none where the weight holds integers.
    """
    layer = capture.modules[name]
    weight = layer._parameters.get("weight")
    if weight is not None:
        return tuple(capture.owners[id(weight)]) if weight.is_floating_point() else ()
    parameters = (f"{name}.{own}" for own in own_parameters(layer, "weight"))
    return tuple(p for p in parameters if p in capture.floating_parameters)


def why_beside(capture: Capture, layer: nn.Module) -> str:
    """Why a layer can't be widened, as a clause; "" if it can."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is computed"
    if not isinstance(layer, LAYER_TYPES) or not is_stock(layer):
        return "its forward is its own"
    why = why_not_plain(capture, weight)
    if why:
        return why
    if layer._forward_pre_hooks or layer._forward_hooks:
        return "forward hooks see its input and output"
    if layer._backward_hooks or layer._backward_pre_hooks:
        return "backward hooks see its gradients"
    return ""


def why_not_plain(capture: Capture, weight: torch.Tensor) -> str:
    """Why a parameter can't be replaced by a wider one, as a clause; "" if it can."""
    names = capture.owners[id(weight)]
    if len(names) > 1:
        return f"its weight is shared by {', '.join(names)}"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    return "" if weight.requires_grad else FROZEN  # so that what is new can learn


def why_inside_too(capture: Capture, weight: torch.Tensor) -> str:
    """The Python call that uses a graph's weight besides, as a clause; "" where there is none."""
    (name, *_) = capture.owners[id(weight)]
    paths = (call.path for trace in capture.traces for call in trace.opaque)
    inside = next((path for path in paths if name.startswith(f"{path}.")), None)
    return f"its weight is also used inside {inside}, which stays a Python call" if inside else ""
