"""What is changed in torch while a model is traced, and put back afterwards whatever happens.

What escapes `torch.fx`, and what is done about it:

* what modules do with attributes: see `module_patches`;
* tensor factories: `torch.arange(n)` has no tensor argument that could record it, and a traced
  `torch.rand` would become a constant: recorded;
* sizes handed to torch's own functions: `torch.reshape(x, [n, -1])` would ask a proxy for its int
  before it asks whose call it is, and so do methods of a tensor that is no proxy (an attribute of
  the model that is no buffer): recorded;
* caches (`functools.lru_cache`): what is computed from proxies is not remembered, see `caches`;
* builtins that ask what a proxy is: see the proxy's value, see `builtins_by_value`;
* what `torch.distributions` check of their arguments' values: not checked;
* autocast regions and autograd functions: the module that holds one stays a Python call;
* `torch._assert(x.ndim == 3, f"got {x.shape}")`: what only a message shows is not assumed;
* numbers drawn from a random state without any tensor: refused, see `random_sources`.

The patches are torch's own names, seen by all threads: one thread captures at a time, and each
patch steps aside for the others.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch._functorch import utils as functorch
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointFunction

from aim_surgery.capture.aten import recorded_operators
from aim_surgery.capture.builtins_by_value import builtins_by_value
from aim_surgery.capture.caches import nothing_remembered
from aim_surgery.capture.decompose import packed_calls_open
from aim_surgery.capture.module_patches import (
    parameters_by_proxy,
    symbolic_training_flag,
    undone_changes,
)
from aim_surgery.capture.opaque import StayPython
from aim_surgery.capture.proxy import ValueProxy
from aim_surgery.capture.random_sources import no_numbers_drawn
from aim_surgery.capture.wrappers import compiled_code_as_python
from aim_surgery.errors import CaptureError

if TYPE_CHECKING:
    from aim_surgery.capture.tracer import ValueTracer

# Functions of torch's that take sizes, places, lengths or groups.
_SIZED = (
    *("reshape", "broadcast_to", "tile", "as_strided", "unflatten", "permute", "flip", "roll"),
    *("narrow", "select", "split_with_sizes", "topk", "tril", "triu", "diagonal"),
    *("broadcast_shapes", "tensor_split", "kthvalue"),
)

_SIZED_F = (
    *("pad", "one_hot", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d"),
)

_SIZED_FFT = (
    *(f"{inverse}{kind}fft{dims}" for inverse in ("", "i") for kind in ("", "r", "h")
      for dims in ("", "2", "n")),
)  # fmt: skip

# Methods of tensors likewise; those of proxies are no methods of tensors.
_SIZED_METHODS = (
    *("expand", "repeat", "repeat_interleave", "tile", "broadcast_to", "view", "reshape", "roll"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "unflatten", "narrow", "select", "split"),
    *("chunk", "__getitem__"),
)

FACTORIES = frozenset(_device_constructors()) | {torch.normal}


_LOCK = threading.Lock()
_CAPTURING = threading.local()


def refuse_nested() -> None:
    """Refuse to capture a model in the forward of another.

    Raises:
        CaptureError: One is being captured in this thread.
    """
    if getattr(_CAPTURING, "now", False):
        raise CaptureError("a model can't be captured inside the forward of one being captured")


@contextlib.contextmanager
def tracing_patches(tracer: ValueTracer) -> Iterator[None]:
    """Make visible to the tracer what fx can't see; one thread at a time."""
    refuse_nested()
    with _LOCK:
        _CAPTURING.now = True
        try:
            with (
                torch.autocast("cpu", enabled=False),
                torch.autocast("cuda", enabled=False),
                symbolic_training_flag(tracer),
                _recorded_factories(tracer),
                _recorded_sizes(tracer),
                recorded_operators(tracer),
                packed_calls_open(tracer),
                compiled_code_as_python(),
                _regions_stay_python(tracer),
                _messages_assume_nothing(tracer),
                undone_changes(tracer),
                nothing_remembered(tracer),
                parameters_by_proxy(tracer),
                builtins_by_value(tracer),
                _silent_checks(),
                no_numbers_drawn(tracer),
                warnings.catch_warnings(),
                torch.enable_grad(),
            ):
                # of torch, about proxies; that backward hooks are lost is a note of the plan
                warnings.filterwarnings("ignore", message="For backward hooks to be called")
                yield
        finally:
            _CAPTURING.now = False


@contextlib.contextmanager
def _regions_stay_python(tracer: ValueTracer) -> Iterator[None]:
    """Autocast regions and hand-written backward passes: a graph of calls can't hold either."""
    enter = torch.autocast.__enter__
    apply: Any = vars(torch.autograd.Function)["apply"]  # the classmethod itself, to be put back
    unwrap = functorch.unwrap_dead_wrappers

    def enter_region(region: torch.autocast) -> Any:
        if not tracer.recording:
            return enter(region)
        raise StayPython.here("has an autocast region")

    def apply_function(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if not tracer.recording:
            return apply.__func__(cls, *args, **kwargs)
        if cls is CheckpointFunction:
            return args[0](*args[2:])  # (function, preserve_rng_state, *its arguments)
        raise StayPython.here(f"calls the autograd function {cls.__name__}")

    def check_arguments(args: tuple[Any, ...]) -> tuple[Any, ...]:
        """`f = Swish.apply`, taken before the trace, is torch's own, which asks this."""
        recorded = any(type(leaf) is ValueProxy for leaf in args) and not tracer.evaluating
        if recorded and not tracer.elsewhere:
            cls = sys._getframe(1).f_locals["cls"]
            raise StayPython.here(f"calls the autograd function {cls.__name__}")
        return unwrap(args)

    torch.autocast.__enter__ = enter_region  # type: ignore[method-assign]
    torch.autograd.Function.apply = classmethod(apply_function)  # type: ignore[assignment]
    functorch.unwrap_dead_wrappers = check_arguments
    try:
        yield
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]
        torch.autograd.Function.apply = apply
        functorch.unwrap_dead_wrappers = unwrap


@contextlib.contextmanager
def _messages_assume_nothing(tracer: ValueTracer) -> Iterator[None]:
    """Messages of assertions are written before anything is asked: they branch on nothing."""
    check, check_with = torch._assert, torch._check_with

    def check_recorded(condition: Any, message: str) -> Any:
        if not tracer.recording:
            return check(condition, message)
        with tracer.answers.only_shown(sys._getframe(1)):
            pass
        if isinstance(condition, ValueProxy):
            return tracer.create_proxy("call_function", check, (condition, message), {})
        return check(condition, message)

    def check_answered(error: Any, condition: Any, message: Any) -> None:
        # torch's own insists on a bool, and asks for it
        check_with(error, bool(condition) if type(condition) is ValueProxy else condition, message)

    torch._assert, torch._check_with = check_recorded, check_answered
    try:
        yield
    finally:
        torch._assert, torch._check_with = check, check_with


@contextlib.contextmanager
def _recorded_factories(tracer: ValueTracer) -> Iterator[None]:

    def record(factory: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if not tracer.recording or not tracer.can_record((args, kwargs)):
            return factory(*args, **kwargs)
        return tracer.create_proxy("call_function", factory, args, kwargs)

    def record_sized(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if _holds_proxy((args, kwargs)):
            return tracer.create_proxy("call_function", function, args, kwargs)
        return function(*args, **kwargs)

    def record_method(method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if _holds_proxy((args[1:], kwargs)):
            if method.__name__ == "__getitem__":
                return tracer.create_proxy("call_function", operator.getitem, args, kwargs)
            return tracer.create_proxy("call_method", method.__name__, args, kwargs)
        return method(*args, **kwargs)

    def wrapper(function: Callable[..., Any], record: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            return record(function, args, kwargs)

        return recorded

    # By name and not by a TorchFunctionMode: torch's parser would ask proxies for their int
    # before the mode is asked. `from torch import arange` is covered by fx's autowrap.
    originals = {
        name: value
        for name, value in vars(torch).items()
        if callable(value) and isinstance(value, type(torch.arange)) and value in FACTORIES
    }
    originals |= {"finfo": torch.finfo, "iinfo": torch.iinfo}  # these ask a dtype, maybe a proxy's
    patched = [(torch, name, value, record) for name, value in originals.items()]
    patched += [(torch, name, getattr(torch, name), record_sized) for name in _SIZED]
    patched += [(F, name, getattr(F, name), record_sized) for name in _SIZED_F]
    patched += [(torch.fft, name, getattr(torch.fft, name), record_sized) for name in _SIZED_FFT]
    methods = {name: getattr(torch.Tensor, name) for name in _SIZED_METHODS}
    patched += [(torch.Tensor, name, method, record_method) for name, method in methods.items()]
    before = [(home, name, vars(home).get(name)) for home, name, _, _ in patched]
    for home, name, value, how in patched:
        setattr(home, name, wrapper(value, how))
    try:
        yield
    finally:
        for home, name, own in before:
            if own is None:
                delattr(home, name)  # a method that is inherited
            else:
                setattr(home, name, own)


@contextlib.contextmanager
def _recorded_sizes(tracer: ValueTracer) -> Iterator[None]:
    """`torch.Size((n, 8))`, which would ask for each of its numbers; it is asked for as a class."""
    size = torch.Size

    class Asked(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, size)

        def __call__(cls, *args: Any) -> Any:
            if _holds_proxy(args):
                return tracer.create_proxy("call_function", size, args, {})
            return size(*args)

    class Size(metaclass=Asked):
        pass

    torch.Size = Size  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch.Size = size  # type: ignore[misc]


def _holds_proxy(arguments: Any) -> bool:
    leaves = tree_leaves(arguments)
    parts = [leaf for leaf in leaves if type(leaf) is slice]
    leaves += [end for part in parts for end in (part.start, part.stop, part.step)]
    return any(type(leaf) is ValueProxy for leaf in leaves)


@contextlib.contextmanager
def _silent_checks() -> Iterator[None]:
    """Take no checks of distributions for branches, and log no rule for shapes that refuses.

    A refusal of the former is an error, never another result; of the latter, it is tried for real.
    """
    validates = torch.distributions.Distribution._validate_args
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(validates)
        log.disabled = disabled
