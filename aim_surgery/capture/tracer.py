"""The value-carrying tracer: a model and its example inputs go in, one fx graph comes out.

Built on `torch.fx.Tracer`: the model's own forward runs, and proxies record what it does. Ours know
their value (`ValueProxy`), so branches on sizes no longer stop the trace, and every node ends up
with its value on the example input in `node.meta["val"]`.

A stock layer of `torch.nn` stays one `call_module`; everything else is traced through. Where the
model asks for something that no graph can hold (a branch on data), the innermost module that asks
stays one Python call (`OpaqueCall`); where it branches on its training flag, the caller traces both
modes (`mode_dependent`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.fx._symbolic_trace import _orig_module_call
from torch.fx.immutable_collections import immutable_dict
from torch.utils._pytree import tree_leaves, tree_map_only

from aim_surgery.capture.assumptions import Assumption, describe
from aim_surgery.capture.inputs import Argument
from aim_surgery.capture.patches import FACTORIES, tracing_patches
from aim_surgery.capture.proxy import ValueProxy
from aim_surgery.capture.values import FakeValues, node_value
from aim_surgery.errors import CaptureError

_DATA_DEPENDENT = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
_RECORDABLE = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout)


@dataclass(frozen=True)
class OpaqueCall:
    """A submodule that stays one Python call in the graph, and why."""

    path: str
    reason: str


class _StayPython(Exception):  # noqa: N818 - control flow, not an error
    """Raised inside a traced module that must stay one Python call."""


class _Entry(nn.Module):
    """The root that fx traces: its forward has no signature to get in the way."""

    def forward(self) -> None:
        """Never called; fx asks for its code object."""


class ValueTracer(fx.Tracer):
    """Traces one model in one mode (training or evaluation)."""

    def __init__(self, model: nn.Module, *, training: bool, values: FakeValues) -> None:
        super().__init__(autowrap_functions=tuple(FACTORIES))
        self.model = model
        self.mode = training
        self.evaluating = False
        self.mode_dependent = False
        self.assumptions: dict[tuple[fx.Node, Callable[..., Any]], Assumption] = {}
        self.opaque: list[OpaqueCall] = []
        self.constants: dict[str, torch.Tensor] = {}
        self._values = values
        self._modules = dict(model.named_modules())
        self._paths = {module: path for path, module in self._modules.items()}
        self._names = _tensor_names(model)
        self._proxies: dict[str, ValueProxy] = {}  # parameters, buffers and flags by name
        self._flags: set[fx.Node] = set()  # nodes computed from training flags alone
        self._stack: list[nn.Module] = []
        self._grad_mode: fx.Node | None = None
        self._grad_enabled = True

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
            return self.model(*args, **kwargs)

        return enter, []

    # What Python forces ---------------------------------------------------------------------

    def answer(self, proxy: ValueProxy, how: Callable[[Any], Any]) -> Any:
        """Answer what Python must know of a proxy, and note that it was asked."""
        if isinstance(proxy.aim_value, torch.Tensor) and how is not len:
            raise self._stay_python(f"{how.__name__}({describe(proxy.node)}) asks for tensor data")
        value = how(proxy.aim_value)
        if proxy.node in self._flags:
            if not _holds_weights(self._stack[-1]):
                raise _StayPython("branches on its training flag")
            self.mode_dependent = True
        if (proxy.node, how) not in self.assumptions:
            path = self.path_of(self._stack[-1]) if self._stack else ""
            self.assumptions[proxy.node, how] = Assumption(proxy.node, how, value, path or "")
        return value

    def _stay_python(self, reason: str) -> _StayPython:
        return _StayPython(reason)

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
        node = self.graph.create_node(
            kind, target, self.create_arg(args), self.create_arg(kwargs), name
        )
        try:
            value = self._evaluate(node)
        except _DATA_DEPENDENT as err:
            raise _StayPython(f"{describe(node)} depends on tensor data ({err})") from err
        node.meta["val"] = value
        return self._proxy(node, value)

    def _proxy(self, node: fx.Node, value: Any) -> Any:
        if value is None and node.op != "call_module":
            if node.target in (operator.getitem, getattr):
                self.assumptions[node, _itself] = Assumption(node, _itself, None, "")
            return None
        if isinstance(value, str):
            self.assumptions[node, _itself] = Assumption(node, _itself, value, "")
            return value
        if self._flags and not isinstance(value, torch.Tensor):
            inputs = node.all_input_nodes
            if inputs and all(source in self._flags for source in inputs):
                self._flags.add(node)
        return ValueProxy(node, self, value)

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return node.meta["val"]
        args, kwargs = node_value(node.args), node_value(node.kwargs)
        with self._evaluation():
            if node.op == "call_function":
                return self._values.call(node.target, args, kwargs)  # type: ignore[arg-type]
            if node.op == "call_method":
                method = getattr(args[0], str(node.target))
                return self._values.call(method, args[1:], kwargs)
            return self._evaluate_module(self._modules[str(node.target)], args, kwargs)

    @contextlib.contextmanager
    def _evaluation(self) -> Iterator[None]:
        """Inside, modules and factories run as usual and nothing is recorded."""
        before, self.evaluating = self.evaluating, True
        try:
            yield
        finally:
            self.evaluating = before

    def _fake(self, value: Any) -> Any:
        with self._evaluation():
            return self._values.of_all(value)

    def _evaluate_module(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return _call_untraced(module, *args, **kwargs)

        if is_stock(module):
            return self._values.call_layer(module, forward, args, kwargs)
        try:
            return self._values.call(forward, args, kwargs)
        except _DATA_DEPENDENT:
            return self._run_for_real(module, args, kwargs)

    def _run_for_real(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The output of a module whose shape depends on data, from a copy fed with noise."""
        args, kwargs = tree_map_only(torch.Tensor, _noise_like, (args, kwargs))
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = _call_untraced(copy.deepcopy(module), *args, **kwargs)
        return self._values.of_all(output)

    def value_placeholder(self, name: str, default: Any, value: Any) -> Any:
        """A placeholder with a value and a default (`Argument.NO_DEFAULT`: none)."""
        args = () if default is Argument.NO_DEFAULT else (default,)
        node = self.create_node("placeholder", name, args, {})
        node.meta["val"] = self._fake(value)
        return ValueProxy(node, self, node.meta["val"])

    def assume_literal(self, proxy: ValueProxy) -> None:
        """Hold an argument that is no tensor to the value it had on the example input."""
        value = proxy.aim_value
        self.assumptions[proxy.node, _itself] = Assumption(proxy.node, _itself, value, "")

    def look(self, proxy: ValueProxy, name: str) -> Any:
        """An attribute of a carried value, without recording anything."""
        with self._evaluation():  # `x.data` computes
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
        if isinstance(a, nn.Module):
            return self.create_node("get_attr", self.path_of(a) or "", (), {})
        if isinstance(a, dict) and kind is not immutable_dict:
            items = {str(key): self.create_arg(value) for key, value in a.items()}
            if is_dataclass(a):
                return self.create_node("call_function", type(a), (), items)
            return self.create_node("call_function", type(a), (items,), {})
        return super().create_arg(a)

    def can_record(self, values: Any) -> bool:
        """Whether a nested argument consists of proxies and literals only."""
        leaves = tree_leaves(values)
        return all(type(leaf) is ValueProxy or type(leaf) in _RECORDABLE for leaf in leaves)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        """What `module.attr` gives: parameters and buffers as proxies (fakes while evaluating)."""
        if not isinstance(attr_val, torch.Tensor):
            return attr_val
        if self.evaluating:
            return self._values.of(attr_val)
        name = self._names.get(id(attr_val))
        return attr_val if name is None else self._named_proxy(name, self._fake(attr_val))

    def training_flag(self, module: nn.Module) -> Any:
        """What `module.training` gives: a flag in the graph, read anew at each call."""
        value = self.mode_of(module)
        path = self._paths.get(module)
        if self.evaluating or path is None or not self._stack:
            return value
        proxy = self._named_proxy(f"{path}.training" if path else "training", value)
        self._flags.add(proxy.node)
        return proxy

    def mode_of(self, module: nn.Module) -> bool:
        """The module's mode in this trace: the traced one, unless it was set apart by hand."""
        own, root = module.__dict__["training"], self.model.__dict__["training"]
        return self.mode if own == root else own

    def _named_proxy(self, name: str, value: Any) -> ValueProxy:
        if name not in self._proxies:
            node = self.create_node("get_attr", name, (), {})
            node.meta["val"] = value
            self._proxies[name] = ValueProxy(node, self, value)
        return self._proxies[name]

    def _tensor_node(self, tensor: torch.Tensor) -> fx.Node:
        name = self._names.get(id(tensor))
        if name is None:
            name = f"_tensor_constant{len(self.constants)}"
            self.constants[name] = tensor
            self._names[id(tensor)] = name
        return self._named_proxy(name, self._fake(tensor)).node

    # Modules --------------------------------------------------------------------------------

    def path_of(self, module: nn.Module) -> str | None:
        """The module's qualified name in the model ("" for the model), None if it has none."""
        return self._paths.get(module)

    def path_of_module(self, mod: nn.Module) -> str:
        """The qualified name that fx writes into nodes."""
        return self._paths.get(mod, type(mod).__name__)

    def holds_data(self, proxy: ValueProxy, of: tuple[nn.Module, str]) -> bool:
        """Whether a value depends on input data or on an attribute (on sizes, it may)."""
        module, name = of
        qualname = f"{self._paths.get(module)}.{name}".removeprefix(".")
        pending, seen = [proxy.node], set()
        while pending:
            node = pending.pop()
            if node in seen or not isinstance(node.meta["val"], torch.Tensor):
                continue
            if node.op == "placeholder" or (node.op == "get_attr" and node.target == qualname):
                return True
            seen.add(node)
            pending.extend(node.all_input_nodes)
        return False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """A module is one call where its class's own forward is PyTorch's."""
        return is_stock(m) and m in self._paths and m is not self.model

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a leaf, or trace through; a module that no graph can hold stays a call."""
        if self.evaluating:
            return forward(*args, **kwargs)
        last = next(iter(reversed(self.graph.nodes)), None)
        self._stack.append(m)
        try:
            if self.is_leaf_module(m, ""):
                return self.create_proxy("call_module", self._paths[m], args, kwargs)
            return forward(*args, **kwargs)
        except _StayPython as stop:
            if not self._paths.get(m):
                where = "the model itself" if m is self.model else f"{type(m).__name__}"
                raise CaptureError(
                    f"{where} can't be captured as a graph: {stop}. Move that code into a "
                    f"submodule of its own, which then stays one Python call."
                ) from stop
            self._roll_back(last)
            return self._call_opaque(m, args, kwargs, str(stop))
        except CaptureError:
            raise
        except Exception as err:
            if getattr(err, "aim_path", None) is None:
                err.aim_path = self._paths.get(m, type(m).__name__)  # type: ignore[attr-defined]
            raise
        finally:
            self._stack.pop()

    def _call_opaque(self, m: nn.Module, args: Any, kwargs: Any, reason: str) -> Any:
        path = self._paths[m]
        if path not in {call.path for call in self.opaque}:
            self.opaque.append(OpaqueCall(path, reason))
        return self.create_proxy("call_module", path, args, kwargs)

    def _roll_back(self, last: fx.Node | None) -> None:
        """Erase the nodes after `last`, and what was remembered of them."""
        erased = set()
        for node in reversed(self.graph.nodes):
            if node is last:
                break
            erased.add(node)
            self.graph.erase_node(node)
        self._proxies = {k: v for k, v in self._proxies.items() if v.node not in erased}
        self.assumptions = {k: v for k, v in self.assumptions.items() if k[0] not in erased}
        self._flags -= erased


def is_stock(module: nn.Module) -> bool:
    """Whether calling the module runs PyTorch's own code and nothing else.

    True for `nn.Conv2d` and for a subclass that keeps its forward; false for containers, for a
    subclass with its own forward or `_conv_forward`, and for an instance with a patched forward.
    """
    return "forward" not in vars(module) and _is_stock_class(type(module))


@functools.cache
def _is_stock_class(kind: type[nn.Module]) -> bool:
    functions = [getattr(kind, name, None) for name in ("forward", "_conv_forward")]
    homes = [getattr(function, "__module__", "") or "" for function in functions if function]
    traced = ("torch.nn.modules.container", "torch.nn.modules.transformer")
    return all(
        home.startswith(("torch.nn.modules.", "torch.ao.nn.")) and home not in traced
        for home in homes
    )


def _call_untraced(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _orig_module_call(module, *args, **kwargs)


def _holds_weights(module: nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in module.parameters())


def _tensor_names(model: nn.Module) -> dict[int, str]:
    """Qualified names of all parameters, buffers and plain tensor attributes, by identity."""
    names: dict[int, str] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for home in (module._parameters, module._buffers, vars(module)):
            for name, value in home.items():
                if isinstance(value, torch.Tensor):
                    names.setdefault(id(value), prefix + name)
    return names


def _noise_like(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype.is_floating_point:
        return torch.rand(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _itself(value: Any) -> Any:
    return value
