"""The module tree of the operated model: same names, same tensors, widened where the plan says.

Layers that the graph calls are copied whole (hooks and hyperparameters too). Modules that were
traced through keep their place, their tensors and their mode, but not their class: their forward is
in the graph now, and a stale one would be a trap.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from aim_surgery.capture import Capture
from aim_surgery.capture.copies import (
    deep_copy,
    derived_tensors,
    keep_attributes,
    own_script_parameters,
)
from aim_surgery.capture.leaves import is_stock

_IMMUTABLE = frozenset((bool, int, float, str, type(None), torch.dtype))
_COLLECTIONS = (dict, OrderedDict, set, list)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def build_tree(
    capture: Capture, replaced: Mapping[int, torch.Tensor], *, copy_tensors: bool
) -> nn.Module:
    """Build the tree that an emitted graph refers to.

    Args:
        capture: The captured model; left unchanged.
        replaced: New tensors by the identity of those they stand for (widened weights).
        copy_tensors: Whether all other tensors are copied or shared with the model.

    Returns:
        A module with every parameter and buffer of the model under its old name.
    """
    model = capture.model
    memo: dict[int, Any] = {**derived_tensors(model), **replaced}
    if not copy_tensors:
        for tensor in (*model.parameters(), *model.buffers()):
            memo.setdefault(id(tensor), tensor)
    nodes = [node for trace in capture.traces for node in trace.graph.nodes]
    called = {str(node.target) for node in nodes if node.op == "call_module"}
    root = _Builder(called, memo).build(model, "")
    keep_attributes(model, root)
    _add_plain_tensors(capture, root, memo, {str(n.target) for n in nodes if n.op == "get_attr"})
    return root


class _Builder:
    def __init__(self, called: set[str], memo: dict[int, Any]) -> None:
        self._called, self._memo = called, memo
        self._built: dict[nn.Module, nn.Module] = {}

    def build(self, module: nn.Module, path: str) -> nn.Module:
        if module not in self._built:
            whole = path and (path in self._called or (is_stock(module) and not module._modules))
            build = self._copy if whole else self._shell
            self._built[module] = build(module, path)
        return self._built[module]

    def _copy(self, module: nn.Module, path: str) -> nn.Module:
        if type(module).__module__.startswith("torch.nn.modules."):
            return self._copy_stock(module)
        twin = copy.deepcopy(module, self._memo)
        own_script_parameters(module, twin, self._memo)
        return twin

    def _copy_stock(self, module: nn.Module) -> nn.Module:
        """`deepcopy`, with short cuts for what a stock layer mostly holds: numbers and nothing."""
        twin = type(module).__new__(type(module))
        self._memo[id(module)] = twin
        for name, value in vars(module).items():
            kind = type(value)
            if kind in _IMMUTABLE or (kind is tuple and _IMMUTABLE.issuperset(map(type, value))):
                vars(twin)[name] = value
            elif kind in _COLLECTIONS and not value:
                vars(twin)[name] = kind()
            else:
                vars(twin)[name] = copy.deepcopy(value, self._memo)
        return twin

    def _shell(self, module: nn.Module, path: str) -> nn.Module:
        kind = next((kind for kind in _CONTAINERS if isinstance(module, kind)), nn.Module)
        shell = kind()
        shell.training = module.training
        for name, parameter in module._parameters.items():
            shell._parameters[name] = copy.deepcopy(parameter, self._memo)
        for name, buffer in module._buffers.items():
            shell._buffers[name] = copy.deepcopy(buffer, self._memo)
        shell._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        prefix = f"{path}." if path else ""
        for name, child in module._modules.items():
            if child is not None:
                shell._modules[name] = self.build(child, prefix + name)
        return shell


def _add_plain_tensors(
    capture: Capture, root: nn.Module, memo: dict[int, Any], names: set[str]
) -> None:
    """Tensors that are no parameters or buffers: plain attributes, and constants of the trace."""
    constants = {name: t for trace in capture.traces for name, t in trace.constants.items()}
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = root.get_submodule(path)
        if name in constants:
            # not persistent, so the state dict gets no key that the model did not have
            module.register_buffer(attribute, constants[name].detach().clone(), persistent=False)
        elif not hasattr(module, attribute):
            tensor = vars(capture.model.get_submodule(path))[attribute]
            vars(module)[attribute] = copy.deepcopy(tensor, memo)


def contrary_modules(model: nn.Module) -> dict[bool, tuple[str, ...]]:
    """Modules that end up in the other mode when the model's own `train(mode)` is called.

    Frozen batch norm is written so: a `train` that calls `self.bn.eval()`. Found by calling it on a
    copy, as such methods may do more (merge the weights of an adapter).

    Args:
        model: The model; left unchanged.

    Returns:
        Qualified names for training (True) and evaluation (False); none where it has no copy, or
        its `train` fails.
    """
    found: dict[bool, tuple[str, ...]] = {True: (), False: ()}
    if all(type(module).train is nn.Module.train for module in model.modules()):
        return found
    try:
        twin = deep_copy(model)
        for mode in (True, False):
            twin.train(mode)
            modules = twin.named_modules()
            found[mode] = tuple(n for n, m in modules if n and m.training is not mode)
    except Exception:
        return {True: (), False: ()}
    return found
