"""The value-carrying tracer: a model and its example inputs go in, one fx graph comes out.

Built on `torch.fx.Tracer`: the model's own forward runs, and proxies record what it does. Ours know
their value (`ValueProxy`), so branches on sizes no longer stop the trace, and every node ends up
with its value on the example input in `node.meta["val"]`.

A stock layer of `torch.nn` stays one `call_module`; everything else is traced through. Where the
model asks for something that no graph can hold (a branch on data), the innermost module that asks
stays one Python call (`OpaqueCall`); where it branches on its training flag, the caller traces both
modes (`Answers.mode_dependent`).
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import FrameType
from typing import Any, cast

import numpy as np
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.immutable_collections import immutable_dict
from torch.utils._pytree import tree_leaves

from aim_surgery.capture.answers import Answers
from aim_surgery.capture.assumptions import describe
from aim_surgery.capture.belongings import Belongings
from aim_surgery.capture.changes import Changes, Mark
from aim_surgery.capture.decompose import opened, padding_note
from aim_surgery.capture.evaluate import DATA_DEPENDENT, Evaluator
from aim_surgery.capture.holders import holds_proxies, recipe
from aim_surgery.capture.inputs import Argument
from aim_surgery.capture.leaves import is_python_call, is_stock, tensor_names
from aim_surgery.capture.membership import entries_asked
from aim_surgery.capture.opaque import (
    STOPS,
    OpaqueCall,
    StayPython,
    first_line,
    holds_data,
    is_final,
    reason_of,
)
from aim_surgery.capture.patches import FACTORIES, tracing_patches
from aim_surgery.capture.proxy import ValueProxy
from aim_surgery.capture.values import FakeValues, node_value, with_dtypes

_IN_PLACE = frozenset(f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow"))
_CLOSED = object()
_RECORDABLE = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout)


@dataclass(frozen=True)
class _State:
    """A moment of a trace, to come back to."""

    last: fx.Node | None
    grad_mode: tuple[fx.Node | None, bool]
    mode_dependent: bool
    opaque: int
    failed: int
    changes: Mark


class _Entry(nn.Module):
    """The root that fx traces: its forward has no signature to get in the way."""

    def forward(self) -> None:
        """Never called; fx asks for its code object."""


class ValueTracer(fx.Tracer):
    """Traces one model in one mode (training or evaluation)."""

    def __init__(
        self,
        model: nn.Module,
        *,
        training: bool,
        belongings: Belongings,
        values: FakeValues,
        constants: dict[str, torch.Tensor],
        python: Mapping[str, str] | None = None,
        watches_draws: bool = False,
    ) -> None:
        """Start with an empty graph.

        Args:
            model: The model; left unchanged.
            training: The mode to trace it in.
            belongings: What hangs on the model, as it was before any trace.
            values: Fake values, which traces of one model share.
            constants: Names of tensors that belong to no module, likewise; filled in.
            python: Submodules that are not to be traced through, with the reason.
            watches_draws: Whether to look at each call of torch for one that draws numbers.
        """
        super().__init__(autowrap_functions=tuple(FACTORIES))
        self.model = model
        self.mode = training
        self.watches_draws = watches_draws
        self.opaque: list[OpaqueCall] = []
        self.entered: set[str] = set()  # submodules that were traced through
        self.complete = False  # whether the model's forward came to its end
        self.changed: set[str] = set()  # attributes that the forward set
        self.remarks: list[str] = []
        self.answers = Answers(self._caller)
        self.changes = Changes(belongings)
        self.constants = constants
        modules = dict(model.named_modules())
        self._python = dict(python or {})
        self._evaluator = Evaluator(values, modules, self.mode_of, self.changes)
        self._paths = {module: path for path, module in modules.items()}
        self._names = tensor_names(model)
        self._proxies: dict[str, ValueProxy] = {}  # parameters, buffers and flags by name
        self._stack: list[nn.Module] = []
        self._opening: list[Any] = []  # functions that are being traced through
        self._grad_mode: fx.Node | None = None
        self._grad_enabled = True
        self._failed: list[str] = []  # what could not be computed, and was not rolled back
        self._thread = threading.get_ident()

    @property
    def evaluating(self) -> bool:
        """Whether a node's value is being computed: nothing is recorded then."""
        return self._evaluator.busy

    @property
    def elsewhere(self) -> bool:
        """Whether another thread is running, which knows nothing of this trace."""
        return threading.get_ident() != self._thread

    @property
    def recording(self) -> bool:
        """Whether what runs now is the model's forward, in this thread."""
        return not self.evaluating and not self.elsewhere

    def computing(self) -> AbstractContextManager[None]:
        """Inside, nothing is recorded."""
        return self._evaluator.running()

    def trace_model(self, arguments: tuple[Argument, ...]) -> fx.Graph:
        """Trace the model called with these arguments.

        Args:
            arguments: The bound arguments of `forward`, in the order of its signature.

        Returns:
            The graph, with `node.meta["val"]` on every node. The model is left unchanged.
        """
        self._arguments = arguments
        with tracing_patches(self):
            return self.trace(_Entry())

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Create a placeholder for each argument, and the function that calls the model."""
        bound = {argument.name: argument.placeholder(self) for argument in self._arguments}

        def enter() -> Any:
            args, kwargs = [], {}
            for argument in self._arguments:
                value = bound[argument.name]
                if argument.given and argument.keyword is None:
                    args.append(value)
                elif argument.given:
                    kwargs[argument.keyword] = value
            result = self.model(*args, **kwargs)
            self._record_grad_mode()  # a `no_grad` that ended with the forward ends in the graph
            self.complete = True
            return result

        return enter, []

    # What Python forces ---------------------------------------------------------------------

    def answer_equal(self, proxy: ValueProxy, frame: FrameType) -> bool:
        """Answer whether two values are equal; as one question about all entries within an `in`."""
        value, entry = cast(tuple[fx.Node, Any], proxy.node.args)
        entries = entries_asked(frame, _RECORDABLE) if type(entry) in _RECORDABLE else None
        if entries is None or isinstance(proxy.aim_value, torch.Tensor):
            return self.answers.answer(proxy, "bool")
        if entry == entries[0]:  # the first that Python compares
            owner = ValueProxy(value, self, value.meta["val"])
            self.answers.answer(
                self.create_proxy("call_function", operator.contains, (entries, owner), {}), "bool"
            )
        return bool(proxy.aim_value)

    # Nodes and their values -----------------------------------------------------------------

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
        proxy_factory_fn: Any = None,
    ) -> Any:
        """Record a node and compute its value; what graphs can't carry (None) comes back as is."""
        if kind == "call_method" and target == "__getitem__":
            kind, target = "call_function", operator.getitem
        self._record_grad_mode()
        if kind == "call_function" and not self.evaluating:
            call = None if target in self._opening else opened(self, target, args, kwargs)
            result = _CLOSED if call is None else self._open(target, call)
            if result is not _CLOSED:
                return result
        args, kwargs = self._lowered(target, (args, kwargs))
        node = self.graph.create_node(kind, target, args, kwargs, name)
        try:
            value = self._evaluator.evaluate(node)
        except DATA_DEPENDENT as err:
            raise StayPython.here(f"{describe(node)} depends on tensor data ({err})") from err
        except Exception as err:
            self._failed.append(f"an error of {describe(node)} ({first_line(err)})")
            self.graph.erase_node(node)  # the model may catch it
            raise
        node.meta["val"] = value
        if self._evaluator.was_real:
            self.answers.note_real(node)
        return self._proxy(node, value)

    def _proxy(self, node: fx.Node, value: Any) -> Any:
        if value is None:
            if node.op == "call_module" or node.target in (operator.getitem, getattr):
                self.answers.assume(node, "value", None)
            return None
        if isinstance(value, str):
            self.answers.assume(node, "value", value)
            return value
        if node.target is operator.getitem and isinstance(value, torch.Tensor):
            container = node.args[0]
            if isinstance(container, fx.Node) and (
                container.op == "placeholder" or is_python_call(self.model, container)
            ):  # these may give None
                self.answers.assume(node, "given", True)
        if not isinstance(value, torch.Tensor):
            self.answers.inherit(node)
        return ValueProxy(node, self, value)

    def value_placeholder(self, name: str, default: Any, value: Any) -> Any:
        """A placeholder with a value and a default (`Argument.NO_DEFAULT`: none)."""
        args = () if default is Argument.NO_DEFAULT else (default,)
        node = self.create_node("placeholder", name, args, {})
        node.meta["val"] = self._evaluator.fake(value)
        return ValueProxy(node, self, node.meta["val"])

    def look(self, proxy: ValueProxy, name: str) -> Any:
        """An attribute of a carried value, without recording anything."""
        with self._evaluator.running():  # `x.data` computes
            return getattr(proxy.aim_value, name)

    def attribute(self, proxy: ValueProxy, name: str) -> Any:
        """A data attribute of a carried value (`x.shape`, `x.dtype`, `output.logits`)."""
        return self.create_proxy("call_function", getattr, (proxy, name), {})

    def _record_grad_mode(self) -> None:
        """Keep `with torch.no_grad():` inside a forward: record where the mode changes."""
        enabled = torch.is_grad_enabled()
        if self.evaluating or enabled == self._grad_enabled:
            return
        if self._grad_mode is None:
            self._grad_mode = self._plain_call(torch.is_grad_enabled)
        state = self._grad_mode if enabled else False
        self._plain_call(torch._C._set_grad_enabled, state)
        self._grad_enabled = enabled

    def _plain_call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        node = self.create_node("call_function", function, args, {})
        node.meta["val"] = None
        return node

    # Arguments ------------------------------------------------------------------------------

    def create_arg(self, a: Any) -> Any:
        """Lower a Python value to what an fx node can hold."""
        kind = type(a)
        if kind is ValueProxy:
            return a.node
        if kind in _RECORDABLE:
            return a
        if kind is tuple or kind is list:
            return kind(map(self.create_arg, a))
        if kind is dict:
            return {key: self.create_arg(value) for key, value in a.items()}
        if isinstance(a, torch.Tensor):
            return self._tensor_node(a)
        if isinstance(a, np.generic):
            return a.item()  # generated code would name it `np.float64(...)`
        if isinstance(a, nn.Module):
            return self.create_node("get_attr", self.path_of(a) or "", (), {})
        if isinstance(a, tuple | list | set | slice):
            return super().create_arg(a)
        if (isinstance(a, dict) and kind is not immutable_dict) or holds_proxies(a):
            make, args, kwargs = recipe(a, self.create_arg)
            node = self.create_node("call_function", make, args, kwargs)
            with self._evaluator.running():
                node.meta["val"] = make(*node_value(node.args), **node_value(node.kwargs))
            return node
        return super().create_arg(a)

    def _lowered(self, target: Any, arguments: Any) -> Any:
        """The arguments of a call; torch takes Python's types for its own (`dtype=int`)."""
        try:
            return self.create_arg(arguments)
        except NotImplementedError:  # fx has no place for a type
            home = getattr(target, "__module__", None) or "torch"
            if home.partition(".")[0] != "torch":
                raise
            return self.create_arg(with_dtypes(arguments))

    def can_record(self, values: Any) -> bool:
        """Whether a nested argument consists of proxies and literals only."""
        leaves = tree_leaves(values)
        return all(type(leaf) is ValueProxy or type(leaf) in _RECORDABLE for leaf in leaves)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        """What `module.attr` gives: parameters and buffers as proxies (fakes while evaluating)."""
        if not isinstance(attr_val, torch.Tensor):
            return attr_val
        if self._evaluator.for_real or self.elsewhere:
            return attr_val
        if self.evaluating:
            return self._evaluator.values.of(attr_val)
        name = self._names.get(id(attr_val))
        return attr_val if name is None else self._named_proxy(name, self._evaluator.fake(attr_val))

    def training_flag(self, module: nn.Module) -> Any:
        """What `module.training` gives: a flag in the graph, read anew at each call."""
        path = self._paths.get(module)
        if self.elsewhere or path is None:
            return module.__dict__["training"]
        value = self.mode_of(module)
        if self.evaluating or not self._stack:
            return value
        proxy = self._named_proxy(f"{path}.training" if path else "training", value)
        self.answers.note_flag(proxy.node)
        return proxy

    def mode_of(self, module: nn.Module) -> bool:
        """The module's mode in this trace: the traced one, unless it was set apart by hand."""
        root = self.model.__dict__["training"]
        own = module.__dict__.get("training", root)  # TorchScript's is not in Python
        return self.mode if own == root else own

    def _named_proxy(self, name: str, value: Any) -> ValueProxy:
        if name not in self._proxies:
            node = self.create_node("get_attr", name, (), {})
            node.meta["val"] = value
            self._proxies[name] = ValueProxy(node, self, value)
        return self._proxies[name]

    def _tensor_node(self, tensor: torch.Tensor) -> fx.Node:
        if isinstance(tensor, FakeTensor):
            raise StayPython.here("uses a tensor that a Python call left in an attribute")
        name = self._names.get(id(tensor))
        if name is None:
            known = (name for name, constant in self.constants.items() if constant is tensor)
            name = next(known, None)
        if name is None:
            name = f"_tensor_constant{len(self.constants)}"
            while hasattr(self.model, name):
                name += "_"
            self.constants[name] = tensor
        self._names[id(tensor)] = name
        return self._named_proxy(name, self._evaluator.fake(tensor)).node

    # Modules --------------------------------------------------------------------------------

    def _caller(self) -> tuple[nn.Module, str] | None:
        return (self._stack[-1], self.path_of(self._stack[-1]) or "") if self._stack else None

    def path_of(self, module: nn.Module) -> str | None:
        """The module's qualified name in the model ("" for the model), None if it has none."""
        return self._paths.get(module)

    def is_in_place(self, proxy: ValueProxy, of: tuple[nn.Module, str]) -> bool:
        """Whether a value is what an in-place operator made of that very attribute."""
        node, owner = proxy.node, self._proxies.get(self._qualname(*of))
        in_place = getattr(node.target, "__name__", "") in _IN_PLACE
        return in_place and owner is not None and node.args[0] is owner.node

    def _qualname(self, module: nn.Module, name: str) -> str:
        return f"{self._paths.get(module)}.{name}".removeprefix(".")

    def holds_data(self, proxy: ValueProxy, of: tuple[nn.Module, str]) -> bool:
        """Whether a value depends on input data or on an attribute (on sizes, it may)."""
        return holds_data(proxy.node, self._qualname(*of))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """A module is one call where its class's own forward is PyTorch's."""
        return is_stock(m) and m in self._paths and m is not self.model

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a leaf, or trace through; a module that no graph can hold stays a call."""
        if not self.recording:
            return forward(*args, **kwargs)
        state, path = self._state(), self._paths.get(m)
        self._stack.append(m)
        try:
            if self.is_leaf_module(m, ""):
                result = self.create_proxy("call_module", path, args, kwargs)
            elif isinstance(m, torch.jit.ScriptModule):
                result = self._call_opaque(m, args, kwargs, "it is compiled by TorchScript")
            elif path in self._python:
                result = self._call_opaque(m, args, kwargs, self._python[path])
            else:
                result = self._trace_through(m, forward, args, kwargs, state)
            return self._returned(m, result)
        except STOPS as err:
            if getattr(err, "aim_path", None) is None:
                err.aim_path = path or ""  # type: ignore[attr-defined]
            raise
        finally:
            self._stack.pop()

    def _trace_through(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, state: _State
    ) -> Any:
        """Trace a module's forward; where that fails and one call of it works, call it."""
        path = self._paths.get(m)
        try:
            result = forward(*args, **kwargs)
            if len(self._failed) > state.failed:  # whether it fails may depend on sizes
                raise StayPython(f"catches {self._failed[-1]}")
        except STOPS as err:
            self._roll_back(state, m)
            if not path or is_final(err) or any(self.changes.handed_in(state.changes, m)):
                raise
            try:
                return self._call_opaque(m, args, kwargs, reason_of(err))
            except STOPS:
                self._roll_back(state, m)
            raise  # what stopped it first: the module around it is tried
        note = padding_note(m, args, kwargs)
        self.remarks += [note] if note else []
        if path:
            self.entered.add(path)
        return result

    def _returned(self, m: nn.Module, result: Any) -> Any:
        """Note on a node which module calls returned it, innermost first."""
        path = self._paths.get(m)
        if path and type(result) is ValueProxy:
            result.node.meta.setdefault("returned_by", []).append(path)
        return result

    def _call_opaque(self, m: nn.Module, args: Any, kwargs: Any, reason: str) -> Any:
        path = self._paths[m]
        if path not in {call.path for call in self.opaque}:
            self.opaque.append(OpaqueCall(path, reason))
        return self.create_proxy("call_module", path, args, kwargs)

    def _open(self, function: Any, call: Callable[[], Any]) -> Any:
        """Trace through a function; `_CLOSED` where that can't be done."""
        state = self._state()
        self._opening.append(function)
        try:
            return call()
        except STOPS:  # whatever stops it here, it was one call before
            self._roll_back(state, None)
            return _CLOSED
        finally:
            self._opening.pop()

    def _state(self) -> _State:
        last = next(iter(reversed(self.graph.nodes)), None)
        grad_mode = self._grad_mode, self._grad_enabled
        counts = len(self.opaque), len(self._failed)
        return _State(last, grad_mode, self.answers.mode_dependent, *counts, self.changes.mark())

    def _roll_back(self, state: _State, m: nn.Module | None) -> None:
        """Erase the nodes that came after a state, what was remembered, and what `m` changed."""
        self.changes.undo(state.changes, m)
        erased = set()
        for node in reversed(self.graph.nodes):
            if node is state.last:
                break
            erased.add(node)
            self.graph.erase_node(node)
        self._proxies = {k: v for k, v in self._proxies.items() if v.node not in erased}
        self.answers.forget(erased)
        self._grad_mode, self._grad_enabled = state.grad_mode
        self.answers.mode_dependent = state.mode_dependent
        del self.opaque[state.opaque :]
        del self._failed[state.failed :]
