"""Models as people have them: compiled, wrapped for several devices, not yet initialised.

A wrapper computes what its inner model computes, so the inner model is captured; the names of its
parameters are then its own, without `_orig_mod.` or `module.` before them.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._pytree import tree_map_only

from aim_surgery.capture.exported import as_module, program_notes
from aim_surgery.capture.inputs import ExampleInputs
from aim_surgery.capture.proxy import ValueProxy
from aim_surgery.errors import CaptureError

# what torch._dynamo is told of tensors
_MARKS = ("mark_dynamic", "maybe_mark_dynamic", "mark_static", "mark_static_address")


def unwrap(model: nn.Module | ExportedProgram) -> tuple[nn.Module, tuple[str, ...]]:
    """Take a model out of `torch.compile`, `DataParallel` and `DistributedDataParallel`.

    Args:
        model: Any module or exported program; left unchanged.

    Returns:
        The inner model, and notes: each wrapper that was taken off, how a program was exported.
    """
    notes: list[str] = []
    inner: nn.Module = as_module(model)
    while True:
        kind = type(inner).__name__
        if _is_compiled(inner):
            inner = inner._orig_mod  # type: ignore[assignment]
            notes.append("torch.compile was taken off: compile the operated model instead")
        elif isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = inner.module
            notes.append(f"{kind} was taken off: wrap the operated model instead")
        else:
            inner = as_module(inner)
            return inner, (*notes, *program_notes(inner))


def _is_compiled(model: nn.Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # importing it takes seconds
    return dynamo is not None and isinstance(model, dynamo.OptimizedModule)


def refuse_uninitialised(model: nn.Module) -> None:
    """Refuse lazy layers that have never been called.

    Args:
        model: Any module.

    Raises:
        CaptureError: It holds a parameter or buffer without a shape.
    """
    for path, module in model.named_modules():
        tensors = (*module._parameters.values(), *module._buffers.values())
        if any(
            isinstance(tensor, UninitializedParameter | UninitializedBuffer) for tensor in tensors
        ):
            raise CaptureError(
                f"{path or 'the model'} is a {type(module).__name__} that has no weights yet: call "
                f"the model once, `model(example)`, and operate it then"
            )


def on_meta(model: nn.Module, inputs: ExampleInputs) -> ExampleInputs:
    """Example inputs where a model is: on the meta device, if all its parameters are there.

    Args:
        model: Any module.
        inputs: What it is to be called with; only shapes and dtypes count.

    Returns:
        The same inputs, or their likes without data.
    """
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices != {"meta"}:
        return inputs
    args, kwargs = tree_map_only(
        torch.Tensor, lambda tensor: tensor.to("meta"), (inputs.args, dict(inputs.kwargs))
    )
    return replace(inputs, args=args, kwargs=kwargs)


@contextlib.contextmanager
def compiled_code_as_python() -> Iterator[None]:
    """Let functions and submodules under `torch.compile` run as what they were compiled from.

    What a forward tells the compiler of a traced tensor (`mark_static_address`) is passed over.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        yield
        return
    marks = {name: getattr(dynamo, name) for name in _MARKS}
    for name, mark in marks.items():
        setattr(dynamo, name, _for_tensors(mark))
    try:
        with dynamo.config.patch(error_on_nested_fx_trace=False):
            yield
    finally:
        for name, mark in marks.items():
            setattr(dynamo, name, mark)


def _for_tensors(mark: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(mark)
    def marked(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return None if type(tensor) is ValueProxy else mark(tensor, *args, **kwargs)

    return marked
