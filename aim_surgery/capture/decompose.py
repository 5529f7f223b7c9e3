"""Opens calls that hide their products: packed attention, and functions that are handed weights.

A site is a product that the graph shows. `F.multi_head_attention_forward(q, k, v, ..., W_in, b_in,
..., W_out, b_out)` is one call that holds several:

    [q ; k ; v] = linear(x, W_in, b_in),  attention(q, k, v),  linear(·, W_out, b_out)

Such a function is Python, so it is called with the proxies instead of being recorded, and its own
code writes its products into the graph. What is not Python, or gets no weight, stays the one call
that its author wanted (`torch.fx.wrap`).

The fused kernels of `nn.MultiheadAttention` and `nn.TransformerEncoder` compute the same as their
Python, in evaluation alone; they are left out. One thing differs: for padded positions the nested
fast path of `nn.TransformerEncoder` returns zeros, its Python whatever attention gives there.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.fx import _symbolic_trace
from torch.utils._pytree import tree_leaves

from aim_surgery.capture.aten import in_torch
from aim_surgery.capture.proxy import ValueProxy

if TYPE_CHECKING:
    from aim_surgery.capture.tracer import ValueTracer

_ASKS_FOR_PROXIES = ("has_torch_function", "has_torch_function_unary")


def opened(
    tracer: ValueTracer, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], Any] | None:
    """The call of a function that shows what it does; None where a call should stay one.

    Args:
        tracer: What records it.
        function: What is called.
        args: Its arguments, proxies among them.
        kwargs: Its keyword arguments.

    Returns:
        A call without arguments that records the function's own operations.
    """
    if not isinstance(function, types.FunctionType):
        return in_torch(tracer, function, args, kwargs)
    if function is F.multi_head_attention_forward:
        return _open_attention(function, args, kwargs)
    if function.__module__.partition(".")[0] == "torch" or not _gets_weights((args, kwargs)):
        return None
    return lambda: _twin(function)(*args, **kwargs)


def _open_attention(
    function: types.FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], Any]:
    names = function.__code__.co_varnames
    given = dict(zip(names, args, strict=False)) | kwargs
    query = given["query"]
    batched = len(query.aim_value.shape if type(query) is ValueProxy else query.shape) == 3

    def linear(x: Any, w: Any, b: Any = None) -> Any:
        if not batched:
            return F.linear(x, w, b)
        graph, source = x.tracer.graph, x.node.args[0]
        graph.erase_node(x.node)  # to (T·B, C), which nothing else needs
        source = ValueProxy(source, x.tracer, source.meta["val"])
        tokens = source.reshape(query.shape[0], query.shape[1], x.aim_value.shape[-1])
        return _Rows(F.linear(tokens, w, b))

    instead = {"_in_projection_packed": _packed_projection, "_in_projection": _projection}
    twin = _twin(function, **instead, linear=linear)
    if given["dropout_p"] == 0:
        given["training"] = False  # else it would be asked for nothing, and both modes traced
    return lambda: twin(**given)


class _Rows:
    """A result (T, B, C) for code that takes it for (T·B, C), and views it as (T, B, C) at the end.

    No axis runs over the samples of (T·B, C), and `torch.export` takes B for fixed where a view is
    viewed again.
    """

    def __init__(self, tokens: Any) -> None:
        self._tokens = tokens

    def size(self, _: int) -> Any:
        return self._tokens.size(-1)

    def view(self, *_: Any) -> Any:
        return self._tokens


def _packed_projection(q: Any, k: Any, v: Any, w: Any, b: Any = None) -> Any:
    """As torch's, with W in thirds where keys are the values and queries are not.

    Torch would split W by a size of the input, and what depends on the input is no weight.
    """
    if k is v and q is not k and type(v) is ValueProxy:
        v = ValueProxy(v.node, v.tracer, v.aim_value)
    return _projection(q, k, v, w, b, name="_in_projection_packed")


def _projection(q: Any, k: Any, v: Any, *weights: Any, name: str = "_in_projection") -> Any:
    """As torch's, with inputs projected as they were before samples and tokens changed places.

    Torch would copy them, or multiply token by token.
    """
    packed = name == "_in_projection_packed" and q is k is v  # made contiguous there

    def linear(x: Any, w: Any, b: Any = None) -> Any:
        before = _before_transpose(x)
        if before is None:
            return F.linear(x, w, b)
        projected = F.linear(before, w, b).transpose(0, 1)
        return projected if packed else projected.contiguous()  # as what views it expects

    return _twin(vars(F)[name], linear=linear)(q, k, v, *weights)


def _before_transpose(x: Any) -> Any:
    """What samples and tokens of which are exchanged; None where they are not, or in no batch."""
    if type(x) is not ValueProxy or x.aim_value.ndim != 3:
        return None
    if x.node.op != "call_method" or x.node.target != "transpose":
        return None
    given: Any = x.node.args
    source, *axes = given
    if x.node.kwargs or {*axes} != {0, 1}:
        return None
    return ValueProxy(source, x.tracer, source.meta["val"])


def _twin(function: types.FunctionType, **instead: Any) -> types.FunctionType:
    """The function, with other globals, and not asking proxies to do its work."""
    asks = [name for name in _ASKS_FOR_PROXIES if name in function.__code__.co_names]
    if not asks and not instead:
        return function
    space = {**function.__globals__, **dict.fromkeys(asks, lambda _: False), **instead}
    twin = types.FunctionType(
        function.__code__, space, function.__name__, function.__defaults__, function.__closure__
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def _gets_weights(arguments: Any) -> bool:
    """Whether a matrix or kernel is among the arguments, or what is made of one alone."""
    proxies = (leaf for leaf in tree_leaves(arguments) if type(leaf) is ValueProxy)
    return any(_is_made_of_weights(proxy) for proxy in proxies)


def _is_made_of_weights(proxy: ValueProxy) -> bool:
    pending, seen, weights = [proxy.node], set(), False
    while pending:
        node = pending.pop()
        if node.op in ("placeholder", "call_module"):
            return False
        if node not in seen:
            seen.add(node)
            value = node.meta["val"]
            if node.op == "get_attr" and isinstance(value, torch.Tensor):
                weights |= value.ndim >= 2 and value.is_floating_point()
            pending.extend(node.all_input_nodes)
    return weights


def padding_note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What differs where `nn.TransformerEncoder` would take its nested fast path; "" if nothing."""
    if not isinstance(module, nn.TransformerEncoder) or not module.use_nested_tensor:
        return ""
    padding = args[2] if len(args) > 2 else kwargs.get("src_key_padding_mask")
    if padding is None:
        return ""
    return (
        "padded positions: in evaluation without gradients, nn.TransformerEncoder returns zeros "
        "there (its nested fast path), the operated model what it returns in training"
    )


@contextlib.contextmanager
def packed_calls_open(tracer: ValueTracer) -> Iterator[None]:
    """Let attention run as Python, and functions marked by `torch.fx.wrap` be opened."""

    def aside() -> bool:
        return not tracer.recording

    enabled = torch.backends.mha.get_fastpath_enabled
    dtype_of = F._none_or_dtype
    detect = nn.modules.transformer._detect_is_causal_mask
    wrap = _symbolic_trace._create_wrapped_func

    def fast_path_enabled() -> bool:
        return enabled() if aside() else False

    def none_or_dtype(value: Any) -> Any:
        # torch's own insists on a tensor
        return value.dtype if type(value) is ValueProxy else dtype_of(value)

    def is_causal_mask(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        # looking for a causal mask asks for data, and what is found is only a hint
        return detect(mask, is_causal, size) if aside() else is_causal is True

    def wrapped(function: Any) -> Any:
        @functools.wraps(function)
        def record(*args: Any, **kwargs: Any) -> Any:
            found = _symbolic_trace._find_proxy(args, kwargs)
            if found is None:
                return function(*args, **kwargs)
            result = found.tracer.create_proxy("call_function", function, args, kwargs)
            # fx's own takes for granted that a proxy of this very call comes back
            if type(result) is ValueProxy and result.node.target is function:
                result.node.meta["is_wrapped"] = True
            return result

        return record

    torch.backends.mha.get_fastpath_enabled = fast_path_enabled
    F._none_or_dtype = none_or_dtype
    nn.modules.transformer._detect_is_causal_mask = is_causal_mask
    _symbolic_trace._create_wrapped_func = wrapped
    try:
        yield
    finally:
        torch.backends.mha.get_fastpath_enabled = enabled
        F._none_or_dtype = dtype_of
        nn.modules.transformer._detect_is_causal_mask = detect
        _symbolic_trace._create_wrapped_func = wrap
