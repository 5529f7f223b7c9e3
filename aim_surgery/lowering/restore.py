"""The way back: an operated model becomes its original again, names, shapes and function.

    conv(cat[x, m], [W_x ; W_m])  ->  conv(x, W_x) + conv(m, W_m)  ->  conv(x, W_x)

On a copy, layers are taken apart (`take_apart`), and then the second product is left out. What the
operation added is dropped: memories, update blocks, weights beside their layers, hooks. What was
trained in W_x since stays trained. Nothing is lost where conv(m, W_m) is zero at every site: right
after an operation with `init="preserve"`, with a memory of zeros, or inside `disable`. Elsewhere
outputs change, and `Restored` says by how much.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import fx, nn

from aim_surgery.capture import Inputs
from aim_surgery.capture.copies import deep_copy
from aim_surgery.errors import AimSurgeryError
from aim_surgery.lowering.forms import take_apart
from aim_surgery.nn.aim_modules import aim_of, operated_in, plan_of, set_result
from aim_surgery.nn.graph_module import AimGraphModule, graphs_of
from aim_surgery.nn.graph_state import NOTE
from aim_surgery.nn.inside import detach_reads
from aim_surgery.planning import Plan
from aim_surgery.surgery.modules import AIM, memory_path
from aim_surgery.surgery.outputs import Unmeasured, difference_of
from aim_surgery.surgery.pieces import pieces_of
from aim_surgery.surgery.state_dict import memory_in_use
from aim_surgery.surgery.tidy import erase_unused

_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class Restored:
    """What was lost on the way back; `restore` leaves it on its result as `restored`.

    Attributes:
        in_use: Layers whose reads of the memory were not zero, by name: what they got from it is
            gone. Empty: the base computes what the operated model computed.
        difference: Largest difference between the outputs of both in evaluation mode, relative to
            the largest output; 0.0 where nothing was in use, None where it was not measured.
        inputs: What it was measured on, or why it was not measured.
    """

    in_use: tuple[str, ...]
    difference: float | None
    inputs: str

    @property
    def exact(self) -> bool:
        """Whether the memory was not in use at all."""
        return not self.in_use

    def __str__(self) -> str:
        if self.exact:
            return "exact: no layer had anything from the memory"
        by = "an unknown amount" if self.difference is None else f"{self.difference:.1e}"
        return (
            f"not exact: {len(self.in_use)} layers read from the memory what is gone now; outputs "
            f"change by {by} of the largest ({self.inputs})"
        )


def restore(gm: _Model, example_inputs: Inputs | None = None, *, measure: bool = True) -> _Model:
    """Take the memory out again: the original's architecture, names and function.

    Shapes:
        (C_out, C_in/g + k, *kernel) -> (C_out, C_in/g, *kernel), as `split_weight` says; what is
        under `aim.` goes. `base.state_dict()` loads strictly into a fresh original.

    Args:
        gm: An operated model in any form but "folded", also inside `torch.compile` or a parallel
            wrapper; left unchanged.
        example_inputs: What to measure the difference on, where there is one. By default noise of
            the sizes that `gm` was operated with.
        measure: Whether to measure it: one forward pass of each model, in evaluation mode.

    Returns:
        A new model that shares nothing with `gm`, in its mode: a `GraphModule` without memory, or
        one of the same class where `gm` kept it. Parameters and statistics that `freeze_base` froze
        are trained again. Its attribute `restored` says whether it computes what `gm` computed, and
        by how much outputs differ if not.

    Raises:
        AimSurgeryError: The model was not operated, is folded (its weights may have been merged
            with others; restore the model that was given to `fold`), or its graph or weights are no
            longer what surgery made.

    Example:
        >>> from torch import nn
        >>> from aim_surgery import transform
        >>> gm = transform(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
        >>> base = restore(gm)
        >>> base.get_submodule("2").weight.shape, base.restored.exact
        (torch.Size([10, 64]), True)
    """
    inner = operated_in(gm)
    with torch.inference_mode(False):  # tensors made inside it could never be trained
        twin: Any = deep_copy(inner)
        take_apart(twin, "it is restored")
        for graph in graphs_of(twin):
            _take_memory_out(graph)
        detach_reads(twin)
        _drop_memory(twin)
    lost = _lost(inner, twin, plan_of(inner), example_inputs, measure=measure)
    set_result(twin, "restored", lost)
    return cast(_Model, twin)


def _take_memory_out(graph: fx.Graph) -> None:
    """Let the product with W_x stand for each sum, and erase what only the memory needed."""
    for pieces in pieces_of(graph, {}):
        total = pieces.total()
        total.replace_all_uses_with(pieces.node)
        erase_unused(total, {pieces.node})
        del pieces.node.meta[NOTE]
    for node in reversed(graph.nodes):
        if _is_new(node):
            erase_unused(node)
    left = [node for node in graph.nodes if _is_new(node)]
    if left:
        raise AimSurgeryError(
            f"{left[0].target}: something in this graph besides what surgery wrote uses the "
            f"memory ({', '.join(str(user) for user in left[0].users)}): take it out first"
        )
    graph.lint()


def _is_new(node: fx.Node) -> bool:
    named = node.op in ("call_module", "get_attr")
    return named and str(node.target).split(".", 1)[0] == AIM


def _drop_memory(twin: nn.Module) -> None:
    aim = aim_of(twin)
    del twin._modules[AIM]
    if isinstance(twin, AimGraphModule):
        if aim.before_freezing is not None:
            twin.contrary = aim.before_freezing.contrary
        twin.recompile()
    if aim.before_freezing is not None:
        for name, parameter in twin.named_parameters():
            parameter.requires_grad_(aim.before_freezing.trained.get(name, True))
        for name in aim.before_freezing.evaluating:
            twin.get_submodule(name).training = twin.training


# What is lost -------------------------------------------------------------------------------


def _lost(
    gm: nn.Module, base: nn.Module, plan: Plan, example_inputs: Inputs | None, *, measure: bool
) -> Restored:
    disabled = {m.name for m in plan.memories if not gm.get_submodule(memory_path(m.name)).enabled}
    of = {read.site.layer: read.memory for read in plan.reads}
    in_use = tuple(
        layer for layer in memory_in_use(gm.state_dict(), plan) if of[layer] not in disabled
    )
    if not in_use:
        return Restored((), 0.0, "nothing to measure")
    if not measure:
        return Restored(in_use, None, "not measured")
    try:
        return Restored(in_use, *difference_of(gm, base, plan, example_inputs))
    except Unmeasured as err:
        return Restored(in_use, None, f"not measured: {err}")
