"""What a traced node's value is: its function run on the fake values of its arguments.

Where fake values don't do (the result depends on data, or some Python insists on numbers), a copy
of the module is run for real, on what the user gave or on noise, to see what shapes come of it.
What torch refuses for real, too, is an error of the model or of its inputs, and marked so.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
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

from aim_surgery.capture.changes import Changes
from aim_surgery.capture.copies import (
    deep_copy,
    noise_like,
    own_values,
    random_state_kept,
)
from aim_surgery.capture.leaves import is_stock
from aim_surgery.capture.opaque import STOPS, mark_final
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
        for_real: Whether something is being run on real tensors.
        was_real: Whether the last node's value came of that: numbers in it may depend on data.
    """

    def __init__(
        self,
        values: FakeValues,
        modules: Mapping[str, nn.Module],
        mode_of: Callable[[nn.Module], bool],
        changes: Changes,
    ) -> None:
        """Start with nothing evaluated.

        Args:
            values: Makes fake tensors.
            modules: The model's modules by name.
            mode_of: Tells a module's mode in this trace.
            changes: What forwards change of the model, to be undone.
        """
        self.values = values
        self.busy = False
        self.for_real = self.was_real = False
        self._modules = modules
        self._mode_of, self._changes = mode_of, changes

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
        self.was_real = False
        before, self.busy = self.busy, True  # `running`, spelled out: this is called for every node
        try:
            if node.op == "call_function":
                return self.values.call(node.target, args, kwargs)  # type: ignore[arg-type]
            if node.op == "call_method":
                method = getattr(args[0], str(node.target))
                return self.values.call(method, args[1:], kwargs)
            return self._call_module(self._modules[str(node.target)], args, kwargs)
        except DATA_DEPENDENT:
            raise
        except (RuntimeError, ValueError, IndexError, NotImplementedError) as err:
            return self._without_fakes(node, args, kwargs, err)
        finally:
            self.busy = before

    def _call_module(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return _orig_module_call(module, *args, **kwargs)

        if is_stock(module):
            try:
                return self.values.call_layer(module, forward, args, kwargs)
            except DataDependentOutputException:  # a norm without momentum asks how often it ran
                if not isinstance(module, nn.modules.batchnorm._NormBase):
                    raise
                return self._run_copy(module, args, kwargs)  # no number in its output's shape
        start = self._changes.mark()
        with random_state_kept():
            try:
                return self.values.call(forward, args, kwargs)
            except STOPS:
                self._changes.undo(start, module)
                output = self._run_copy(module, args, kwargs)
                self.was_real = True
                return output
            finally:
                for source in self._changes.belongings.sources:
                    source.put_back()

    def _run_copy(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self.for_real = True  # its tensors are asked for while it is copied
        try:
            twin = deep_copy(module)
        finally:
            self.for_real = False
        for own, copied in zip(module.modules(), twin.modules(), strict=False):
            vars(copied)["training"] = self._mode_of(own)
        return self._run_for_real(functools.partial(_orig_module_call, twin), args, kwargs)

    def _without_fakes(self, node: fx.Node, args: Any, kwargs: Any, err: Exception) -> Any:
        """What torch refuses of fake values may only lack a rule for them; else it is an error."""
        if node.op == "call_module":
            if is_stock(self._modules[str(node.target)]):
                mark_final(err)
            raise err
        function: Any = node.target if node.op == "call_function" else _method(str(node.target))
        try:
            return self._run_for_real(function, args, kwargs)
        except Exception:
            mark_final(err)
            raise err from None

    def _run_for_real(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with torch.no_grad(), random_state_kept():
            self.for_real = True
            try:
                output = self._on(function, 0, args, kwargs)
            except Exception as err:
                try:
                    output = self._on(function, 1, args, kwargs)
                except Exception:
                    raise err from None
            finally:
                self.for_real = False
        return self.values.of_all(output)

    def _on(self, function: Callable[..., Any], integer: int, args: Any, kwargs: Any) -> Any:
        """Its result for copies of real tensors where fakes stand for some, and noise elsewhere."""

        def real(tensor: torch.Tensor) -> torch.Tensor:
            source = self.values.source_of(tensor)
            return noise_like(tensor, integer) if source is None else own_values(source)

        args, kwargs = tree_map_only(torch.Tensor, real, (args, kwargs))
        return function(*args, **kwargs)


def _method(name: str) -> Callable[..., Any]:
    return lambda owner, *args, **kwargs: getattr(owner, name)(*args, **kwargs)
