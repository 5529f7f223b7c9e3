"""Calls of aten operators, as exported programs have them, in the words that models are written in.

    aten.linear.default(x, W, b)               ->  F.linear(x, W, b)
    aten.convolution.default(x, W, b, ...)     ->  F.conv2d(x, W, b, ...)
    aten.slice.Tensor(x, 1, 0, n)              ->  x[:, 0:n]
    aten._to_copy.default(x, dtype=t)          ->  x.to(t, copy=True)

PyTorch generates an operator, the function of its name and the method of its name from one line, so
all three take the same arguments; where there is neither function nor method, or it takes others,
this file says what is the same. What it does not know stays the call of an operator that it was.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch._higher_order_ops.wrap import wrap_with_set_grad_enabled
from torch._ops import OpOverload

if TYPE_CHECKING:
    from aim_surgery.capture.tracer import ValueTracer

_HOMES = (*(getattr(torch._C, name) for name in ("_fft", "_special", "_linalg", "_nn")), torch)
_FUNCTIONS: dict[str, Any] = {
    name: function
    for home in _HOMES
    for name, function in vars(home).items()
    if isinstance(function, type(torch.conv2d))
}
_METHODS = frozenset(
    name
    for name, method in vars(torch._C.TensorBase).items()
    if isinstance(method, type(torch.Tensor.view))
)
_END = 2**63 - 1  # how a slice without an end is written


def in_torch(
    tracer: ValueTracer, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], Any] | None:
    """The call of an operator as a call of PyTorch's functions or methods.

    Args:
        tracer: What records it.
        function: What is called.
        args: Its arguments, proxies among them.
        kwargs: Its keyword arguments.

    Returns:
        A call without arguments that records the same; None where this is no operator, or none
        that has other words. It may fail: then the operator stays.
    """
    if function is wrap_with_set_grad_enabled:
        return lambda: _with_gradients(*args, **kwargs)
    if not isinstance(function, OpOverload) or function.namespace != "aten":
        return None
    name = function._schema.name.removeprefix("aten::")
    if name in _OTHER_WORDS:
        return lambda: _OTHER_WORDS[name](*args, **kwargs)
    if name in _FUNCTIONS:  # not called: it would ask proxies for their int
        return lambda: tracer.create_proxy("call_function", _FUNCTIONS[name], args, kwargs)
    if name in _METHODS:
        return lambda: tracer.create_proxy("call_method", name, args, kwargs)
    return None


@contextlib.contextmanager
def recorded_operators(tracer: ValueTracer) -> Iterator[None]:
    """Record operators that are called without any tensor: they make one, anew at each call."""
    call: Any = OpOverload.__call__

    def recorded(op: OpOverload, /, *args: Any, **kwargs: Any) -> Any:
        makes = op.namespace == "aten" and tracer.recording
        if makes and not _tensors(op) and tracer.can_record((args, kwargs)):
            return tracer.create_proxy("call_function", op, args, kwargs)
        return call(op, *args, **kwargs)

    OpOverload.__call__ = recorded  # type: ignore[method-assign]
    try:
        yield
    finally:
        OpOverload.__call__ = call  # type: ignore[method-assign]


@functools.cache
def _tensors(op: OpOverload) -> bool:
    return any("Tensor" in str(argument.type) for argument in op._schema.arguments)


def _with_gradients(enabled: bool, part: Callable[..., Any], *args: Any) -> Any:
    with torch.set_grad_enabled(enabled):
        return part(*args)


# What has other arguments, or no name of its own ----------------------------------------------


def _convolution(
    x: Any,
    weight: Any,
    bias: Any,
    stride: Sequence[int],
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Any:
    dims = len(stride)
    if transposed:
        function = getattr(F, f"conv_transpose{dims}d")
        return function(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return getattr(F, f"conv{dims}d")(x, weight, bias, stride, padding, dilation, groups)


def _batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float,
    eps: float, cudnn: bool = True,
) -> Any:  # fmt: skip
    return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)


def _batch_norm_in_evaluation(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
) -> Any:
    return _batch_norm(x, weight, bias, mean, var, False, momentum, eps), None, None


def _batch_norm_functional(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, *options: Any
) -> Any:
    """The new statistics are returned; torch's own has no backward once they are written back."""
    mean, var = mean.clone(), var.clone()
    return _batch_norm(x, weight, bias, mean, var, *options), None, None, mean, var


def _embedding(
    weight: Any, indices: Any, padding_idx: int = -1, scale: bool = False, sparse: bool = False
) -> Any:
    padding = None if padding_idx == -1 else padding_idx
    return F.embedding(
        indices, weight, padding_idx=padding, scale_grad_by_freq=scale, sparse=sparse
    )


def _slice(x: Any, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> Any:
    if type(end) is int and end == _END:
        end = None
    entries = slice(start, end, None if type(step) is int and step == 1 else step)
    if dim < 0:
        return x[(..., entries, *[slice(None)] * (-dim - 1))]
    return x[(*[slice(None)] * dim, entries)]


def _index(x: Any, indices: Sequence[Any]) -> Any:
    return x[tuple(slice(None) if index is None else index for index in indices)]


def _to_copy(x: Any, **options: Any) -> Any:
    kept = {name: options[name] for name in ("dtype", "device") if options.get(name) is not None}
    return x.to(**kept, copy=True, memory_format=options.get("memory_format"))


def _to(x: Any, *args: Any, layout: Any = None, pin_memory: Any = None, **options: Any) -> Any:
    if layout not in (None, torch.strided) or pin_memory:
        raise NotImplementedError
    return x.to(*args, **options)


def _softmax(x: Any, dim: int, to_float: bool = False) -> Any:
    return torch.softmax(x, dim, dtype=torch.float32 if to_float else None)


def _log_softmax(x: Any, dim: int, to_float: bool = False) -> Any:
    return torch.log_softmax(x, dim, dtype=torch.float32 if to_float else None)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Any = None,
    scale: float | None = None,
) -> Any:
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale
    )
    return output, None  # what stands behind is for a backward pass written out


_OTHER_WORDS: dict[str, Callable[..., Any]] = {
    "convolution": _convolution,
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm_in_evaluation,
    "_native_batch_norm_legit_functional": _batch_norm_functional,
    "embedding": _embedding,
    "slice": _slice,
    "index": _index,
    "_to_copy": _to_copy,
    "to": _to,
    "sym_size": lambda x, dim: x.size(dim),
    "sym_stride": lambda x, dim: x.stride(dim),
    "sym_numel": lambda x: x.numel(),
    "sym_storage_offset": lambda x: x.storage_offset(),
    "_softmax": _softmax,
    "_log_softmax": _log_softmax,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_unsafe_view": lambda x, shape: x.reshape(shape),
    "lift_fresh_copy": lambda x: x.clone(),
    "split": torch.split,
    "einsum": torch.einsum,
    "alias": lambda x: x.view_as(x),
}
