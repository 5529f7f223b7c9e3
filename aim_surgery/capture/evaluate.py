"""What a traced node's value is: its function run on the fake values of its arguments.

A module whose result depends on data has no fake result; a copy of it is then run for real, on
noise, to see the shape of what it returns. So is a function that fails on fake values: torch's rule
for the shape of its result may refuse what its kernel takes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.fx._symbolic_trace import _orig_module_call
from torch.utils._pytree import tree_map_only

from aim_surgery.capture.leaves import is_stock
from aim_surgery.capture.values import FakeValues, node_value

DATA_DEPENDENT = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)


class Evaluator:
    """Computes node values of one model, and says what runs meanwhile.

    Attributes:
        busy: Whether a node is being evaluated: nothing that runs now is to be recorded.
        for_real: Whether a module is being run on real tensors.
    """

    def __init__(self, values: FakeValues, modules: Mapping[str, nn.Module]) -> None:
        self.values = values
        self.busy = False
        self.for_real = False
        self._modules = modules

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, modules and factories run as usual and nothing is recorded."""
        before, self.busy = self.busy, True
        try:
            yield
        finally:
            self.busy = before

    def fake(self, value: Any) -> Any:
        """A nested value with its tensors replaced by their fake twins."""
        with self.running():
            return self.values.of_all(value)

    def evaluate(self, node: fx.Node) -> Any:
        """The value of a node whose arguments carry theirs."""
        args, kwargs = node_value(node.args), node_value(node.kwargs)
        before, self.busy = self.busy, True  # `running`, spelled out: this is called for every node
        try:
            if node.op == "call_function":
                return self._call(node.target, args, kwargs)  # type: ignore[arg-type]
            if node.op == "call_method":
                name = str(node.target)
                return self._call(
                    lambda owner, *a, **k: getattr(owner, name)(*a, **k), args, kwargs
                )
            return self._call_module(self._modules[str(node.target)], args, kwargs)
        finally:
            self.busy = before

    def _call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            return self.values.call(function, args, kwargs)
        except DATA_DEPENDENT:
            raise
        except (RuntimeError, NotImplementedError):
            with contextlib.suppress(Exception):
                return self._on_noise(function, args, kwargs)
            raise

    def _call_module(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return _orig_module_call(module, *args, **kwargs)

        if is_stock(module):
            return self.values.call_layer(module, forward, args, kwargs)
        try:
            return self.values.call(forward, args, kwargs)
        except DATA_DEPENDENT:
            return self._run_for_real(module, args, kwargs)

    def _run_for_real(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self.for_real = True
        try:
            return self._on_noise(partial(_orig_module_call, copy.deepcopy(module)), args, kwargs)
        finally:
            self.for_real = False

    def _on_noise(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Its result for floats between 0 and 1 and integers of 0, or of 1 where that fails."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                output = _on(function, 0, args, kwargs)
            except Exception as err:
                try:
                    output = _on(function, 1, args, kwargs)
                except Exception:
                    raise err from None
        return self.values.of_all(output)


def _on(function: Callable[..., Any], integer: int, args: Any, kwargs: Any) -> Any:
    def noise(tensor: torch.Tensor) -> torch.Tensor:
        like = {"dtype": tensor.dtype, "device": tensor.device}
        if tensor.dtype.is_floating_point:
            return torch.rand(tensor.shape, **like)
        return torch.full(tensor.shape, integer, **like)

    args, kwargs = tree_map_only(torch.Tensor, noise, (args, kwargs))
    return function(*args, **kwargs)
