"""Reads of layers that no graph reaches: hooks that give a layer its view of the memory.

    conv(cat[x, m], [W_x ; W_m])        before the call, where the layer's weight was widened
    conv(x, W_x) + conv(m, W_m)         after it, where W_m lives beside

For layers inside a submodule that stays a Python call, and for a whole model that keeps its class.
The memory read here is the one that is the same for all samples, before any write: a Python call
may take samples apart and put them together as it likes. Who calls the layer sees nothing of it:
`in_features` and `in_channels` stay what the layer is called with, other than its weight's width.

Without gradients, calls in one forward share what they see of the memory. With gradients each looks
anew: layers under gradient checkpointing are called once more when that forward is long over.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from aim_surgery.nn.layer_types import CONV_TRANSPOSE_TYPES
from aim_surgery.nn.memory import Memory
from aim_surgery.nn.spatial import ADAPTIVE_POOLS
from aim_surgery.nn.stand_in import StandIn
from aim_surgery.nn.views import averaged


class SharedViews:
    """What was seen of memories in the forward that is running, in each thread its own.

    It begins and ends with the calls of the modules that it is attached to. Copies and pickles
    begin with nothing.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._running = threading.local()

    def attach(self, module: nn.Module) -> None:
        """Let calls of a module be forwards."""
        self._handles += [
            module.register_forward_pre_hook(self._begin, prepend=True),
            module.register_forward_hook(self._end, always_call=True),
        ]

    def detach(self) -> None:
        """Take it off all modules."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def now(self) -> dict[Hashable, Tensor] | None:
        """What is shared at this moment; None where each call is to look anew."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        return getattr(self._running, "seen", None)

    def _begin(self, _module: nn.Module, _args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        depth = getattr(self._running, "depth", 0)
        if not depth:
            self._running.seen = {}
        self._running.depth = depth + 1

    def _end(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._running.depth = max(getattr(self._running, "depth", 0) - 1, 0)
        if not self._running.depth:
            self._running.seen = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_handles": self._handles}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._handles = state["_handles"]
        self._running = threading.local()


class View:
    """What a layer sees of a memory: k planes of its input's size, or k features.

    Args:
        memory: The memory; the same module that lives under `aim`.
        planes: k.
        spatial: Spatial size that was planned with, () for features.
        shared: What calls in one forward share; None where there is nothing to share.
    """

    def __init__(
        self,
        memory: Memory,
        planes: int,
        spatial: tuple[int, ...],
        shared: SharedViews | None = None,
    ) -> None:
        self.memory, self.planes, self.spatial, self.shared = memory, planes, spatial, shared

    def for_input(self, x: Tensor) -> Tensor:
        """The view for an input: (k, *S) or (k,), of its size, dtype and device."""
        seen = self.shared.now() if self.shared is not None else None
        if seen is None:
            return self._seen_from(self.memory().to(x), x)
        autocast = torch.is_autocast_enabled(x.device.type)
        value = (id(self.memory), x.dtype, x.device, autocast)
        size = x.shape[-len(self.spatial) :] if self.spatial else ()  # nested tensors have no shape
        key = (*value, self.planes, self.spatial, size)
        if key not in seen:
            if value not in seen:
                seen[value] = self.memory().to(x)
            seen[key] = self._seen_from(seen[value], x)
        return seen[key]

    def _seen_from(self, memory: Tensor, x: Tensor) -> Tensor:
        """The view, from the memory's value (1, M)."""
        dims, floats = len(self.spatial), memory.shape[1]
        if not dims:
            if self.planes < floats:
                memory = averaged(memory, self.planes)
            return memory.reshape(self.planes)
        size = math.prod(self.spatial)
        available = -(-floats // size)
        planes = F.pad(memory, (0, available * size - floats)).reshape(1, available, size)
        if self.planes < available:
            planes = averaged(planes, self.planes)
        planes = planes.reshape(self.planes, *self.spatial)
        return ADAPTIVE_POOLS[dims](planes, x.shape[-dims:])


def of_each(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of each part of a nested tensor.

    `nn.TransformerEncoder` makes some of padded input, in evaluation without gradients.
    """
    parts = [function(part) for part in x.unbind()]
    return torch.nested.as_nested_tensor(parts, layout=x.layout)


class _Hook:
    """A hook that can be taken off again, also after a copy or a pickle.

    With its handle in the pickle, hooks that are registered after loading get other numbers.

    Attributes:
        handle: Takes it off its layer.
    """

    handle: RemovableHandle | None = None

    def attach(self, layer: nn.Module) -> None:
        """Put it on its layer, behind the hooks that are there."""
        raise NotImplementedError

    def detach(self) -> None:
        """Take it off its layer."""
        if self.handle is not None:
            self.handle.remove()
        self.handle = None


class JoinMemory(_Hook):
    """A forward pre-hook: the layer is called with cat[x, m] instead of x.

    Args:
        view: What the layer sees.
        groups: Of a convolution; each group gets all planes, behind its own channels.
        name: Keyword of the layer's input.
    """

    def __init__(self, view: View, groups: int = 1, name: str = "input") -> None:
        self.view, self.groups, self.name = view, groups, name

    def attach(self, layer: nn.Module) -> None:
        """Put it on its layer, whose weight is wide."""
        self.handle = layer.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Join the memory to the input, which comes by position or by name."""
        if args:
            return (self._joined(args[0]), *args[1:]), dict(kwargs)
        return (), {**kwargs, self.name: self._joined(kwargs[self.name])}

    def _joined(self, x: Tensor) -> Tensor:
        view = self.view.for_input(x)
        if x.is_nested:
            return of_each(x, lambda part: torch.cat([part, view.expand(*part.shape[:-1], -1)], -1))
        axis = -view.ndim
        if self.groups > 1:
            x = x.unflatten(axis, (self.groups, -1))
        view = view.expand(*x.shape[:axis], *view.shape)
        joined = torch.cat([x, view], axis)
        return joined.flatten(axis - 1, axis) if self.groups > 1 else joined


class AddMemory(_Hook):
    """A forward hook: conv(m, W_m) is added to what the layer gives.

    Where a layer's own forward gives another size than its geometry says (it pads by itself), the
    memory's part is resized to it, as views are.

    Args:
        view: What the layer sees.
        beside: The module that multiplies by W_m; the same that lives under `aim`.
        name: Keyword of the layer's input.
    """

    def __init__(self, view: View, beside: nn.Module, name: str = "input") -> None:
        self.view, self.beside, self.name = view, beside, name

    def attach(self, layer: nn.Module) -> None:
        """Put it on its layer, whose weight is its own."""
        self.handle = layer.register_forward_hook(self, with_kwargs=True)

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> Tensor:
        """Add the memory's part; it has no batch and broadcasts."""
        view = self.view_for(args[0] if args else kwargs[self.name])
        dims = len(self.view.spatial)
        if output.is_nested:
            return of_each(output, lambda part: part + self.beside(view).to(part))
        if not dims:
            return output + self.beside(view).to(output)
        size = list(output.shape[-dims:])
        if isinstance(self.beside, CONV_TRANSPOSE_TYPES) and _can_give(self.beside, view, size):
            part = self.beside(view, output_size=size)
        else:
            part = self.beside(view)
        part = part if list(part.shape[-dims:]) == size else ADAPTIVE_POOLS[dims](part, size)
        return output + part.to(output)

    def view_for(self, x: Tensor) -> Tensor:
        """What the layer sees, as W_m takes it.

        A layer may be moved to another dtype inside the call (a router's) or be a replica on
        another device; its W_m is not.
        """
        weight: Any = self.beside.weight  # no parameter where `torch.func` or pruning put a tensor
        return self.view.for_input(x).to(weight)


def keep_in_evaluation(module: nn.Module) -> None:
    """Let a module work in evaluation mode whatever `train` says: it is put there at each call."""
    if not any(isinstance(hook, _Evaluating) for hook in module._forward_pre_hooks.values()):
        hook = _Evaluating()
        hook.attach(module)


def detach_reads(root: nn.Module) -> None:
    """Take off all hooks that this package puts on layers; those of others stay.

    Args:
        root: An operated model; changed in place.
    """
    for module in root.modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        for hook in (*hooks, vars(module).get("forward")):
            owner = getattr(hook, "__self__", hook)  # `SharedViews` hooks in by bound methods
            if isinstance(owner, _Hook | StandIn | SharedViews):
                owner.detach()


class _Evaluating(_Hook):
    """A forward pre-hook that puts its module in evaluation mode."""

    def attach(self, layer: nn.Module) -> None:
        self.handle = layer.register_forward_pre_hook(self, prepend=True)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        layer.training = False


def _can_give(layer: nn.modules.conv._ConvTransposeNd, view: Tensor, size: list[int]) -> bool:
    """Whether a size is among those that a transposed convolution may have as its output's."""
    geometry = (layer.stride, layer.padding, layer.dilation, layer.kernel_size)
    for s, wanted, stride, padding, dilation, kernel in zip(
        view.shape[1:], size, *geometry, strict=True
    ):
        least = (s - 1) * stride - 2 * int(padding) + dilation * (kernel - 1) + 1
        if not least <= wanted < least + stride:
            return False
    return True
