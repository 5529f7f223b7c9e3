"""Example inputs: given by the user, declared by the model, or found by trial.

`transform(model)` needs one input that the model accepts, for its shapes alone. In this order:
what the user gives; what the model declares (timm's `default_cfg`, a `dummy_inputs` attribute);
what its first layer suggests (a 2-d convolution over 3 channels: images of the usual sizes), tried
one after the other until one can be captured. A forward that wants several arguments gets the same
for each; one that takes a list of tensors, by its annotation or its name (`images`), a list of
samples.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from aim_surgery.errors import CaptureError

if TYPE_CHECKING:
    from aim_surgery.capture.tracer import ValueTracer

Inputs = torch.Tensor | tuple[Any, ...] | Mapping[str, Any]

_LITERALS = (bool, int, float, str, type(None), torch.dtype, torch.device)
_BATCH = 2  # one sample would make batch norm fail in training and every size-1 rule apply
_LISTS = ("images", "image_list")  # arguments without annotation that are lists of samples
_USUAL_SIZES: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((1024,), (16000,), (256,), (128,), (64,), (32,), (16,)),
    2: tuple((s, s) for s in (224, 299, 256, 384, 512, 128, 64, 32, 28, 16, 8)),
    3: ((16, 112, 112), (16, 224, 224), (32, 64, 64), (16, 16, 16), (8, 8, 8)),
}


@dataclass(frozen=True)
class Argument:
    """One parameter of the captured forward, with its value on the example input.

    Attributes:
        name: Name of the placeholder, and of the parameter in the emitted forward.
        value: Its example value: a tensor, a literal, or a nest of them.
        default: Its default in the emitted forward, `NO_DEFAULT` where it has none.
        keyword: The model's own name for it, where it is called with it by name.
        given: Whether the model is called with it at all, or left to its default.
    """

    NO_DEFAULT: ClassVar[object] = inspect.Parameter.empty

    name: str
    value: Any
    default: Any
    keyword: str | None
    given: bool = True

    def placeholder(self, tracer: ValueTracer) -> Any:
        """Create the placeholder; what the forward of the model is called with."""
        if type(self.value) not in _LITERALS:
            proxy = tracer.value_placeholder(self.name, self.default, self.value)
            if self.default is None:
                tracer.answers.assume(proxy.node, "given", True)
            return proxy
        default = self.value if self.default is self.NO_DEFAULT else self.default
        proxy = tracer.value_placeholder(self.name, default, self.value)
        tracer.answers.assume(proxy.node, "value", self.value)
        return self.value


@dataclass(frozen=True)
class ExampleInputs:
    """Positional and keyword arguments to capture a model with, and where they come from."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    source: str

    @classmethod
    def given(cls, inputs: Inputs) -> ExampleInputs:
        """From what a user passes: a tensor, a tuple of arguments, or a dict of keyword ones."""
        if isinstance(inputs, Mapping):
            return cls((), dict(inputs), "given")
        return cls(inputs if isinstance(inputs, tuple) else (inputs,), {}, "given")

    def describe(self) -> str:
        """The shapes in words: `x: float32[2, 3, 224, 224]`."""
        parts = [_describe_value(value) for value in self.args]
        parts += [f"{name}={_describe_value(value)}" for name, value in self.kwargs.items()]
        return ", ".join(parts)


def bind_arguments(model: nn.Module, inputs: ExampleInputs) -> tuple[Argument, ...]:
    """Match example inputs with the parameters of the model's forward.

    Args:
        model: The model; its forward's signature is read, nothing is called.
        inputs: The arguments.

    Returns:
        One `Argument` for each value given, and for each parameter left at a literal default.

    Raises:
        CaptureError: The arguments don't fit the signature (the message shows both), or are nested
            tensors.
    """
    leaves = tree_leaves((inputs.args, inputs.kwargs))
    if any(isinstance(leaf, torch.Tensor) and leaf.is_nested for leaf in leaves):
        raise CaptureError(
            f"nested tensors have no sizes to plan for: give {type(model).__name__} padded example "
            f"inputs (torch.nested.to_padded_tensor), with a mask where it takes one"
        )
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as err:
        raise CaptureError(
            f"example inputs don't fit {type(model).__name__}.forward{signature}: {err}; "
            f"got ({inputs.describe()})"
        ) from err
    arguments: list[Argument] = []
    missing = Argument.NO_DEFAULT
    defaults_begun = False
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            for index, value in enumerate(bound.arguments.get(name, ())):
                arguments.append(Argument(f"{name}_{index}", value, missing, None))
        elif parameter.kind is parameter.VAR_KEYWORD:
            for key, value in bound.arguments.get(name, {}).items():
                arguments.append(Argument(key, value, None, key))
        elif name in bound.arguments or type(parameter.default) in _LITERALS:
            value = bound.arguments.get(name, parameter.default)
            default = parameter.default if type(parameter.default) in _LITERALS else missing
            if default is missing and defaults_begun:
                default = None
            defaults_begun |= default is not missing
            keyword = None if len(arguments) < len(inputs.args) else name
            arguments.append(Argument(name, value, default, keyword, name in bound.arguments))
    return tuple(arguments)


def propose_inputs(model: nn.Module) -> Iterator[ExampleInputs]:
    """Inputs that the model may accept, the likeliest first, on the meta device's terms.

    Args:
        model: The model; its attributes and first layers are looked at, nothing is called.

    Yields:
        Candidates of zeros, whose shapes count; the caller tries them in turn.
    """
    yield from _declared(model)
    dtype, device = _floating_type(model)
    for layer in model.modules():
        shapes = _usual_shapes(layer)
        if shapes is None:
            continue
        integers = isinstance(layer, nn.Embedding | nn.EmbeddingBag)
        kind = torch.int64 if integers else dtype
        examples = [torch.zeros(shape, dtype=kind, device=device) for shape in shapes]
        for wanted in _wanted(model):
            for example in examples:
                given = tuple(list(example) if listed else example for listed in wanted)
                words = " and ".join(_describe_shape(value) for value in given)
                yield ExampleInputs(given, {}, f"found: {words} fits")
        return


def _wanted(model: nn.Module) -> Iterator[tuple[bool, ...]]:
    """For each argument that the forward wants, whether it is a list; the likeliest first."""
    parameters = inspect.signature(model.forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty] or positional[:1]
    lists = tuple(_takes_list(parameter) for parameter in required)
    if any(lists):
        yield lists
    yield (False,) * max(len(required), 1)


def _takes_list(parameter: inspect.Parameter) -> bool:
    if parameter.annotation is parameter.empty:
        return parameter.name in _LISTS
    annotation = parameter.annotation
    words = annotation if isinstance(annotation, str) else repr(annotation)
    return re.sub(r"[\w.]+\.", "", words).lower() in ("list[tensor]", "sequence[tensor]")


def _describe_shape(value: torch.Tensor | list[torch.Tensor]) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)} of {list(value[0].shape)}"
    return f"{list(value.shape)}"


def _declared(model: nn.Module) -> Iterator[ExampleInputs]:
    dtype, device = _floating_type(model)
    for name in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, name, None)
        size = config.get("input_size") if isinstance(config, Mapping) else None
        if size:
            example = torch.zeros((_BATCH, *size), dtype=dtype, device=device)
            yield ExampleInputs((example,), {}, f"declared by {name}")
            break
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping) and dummy:
        there = tree_map_only(torch.Tensor, lambda value: value.to(device), dict(dummy))
        yield ExampleInputs((), there, "declared by dummy_inputs")


def _usual_shapes(layer: nn.Module) -> tuple[tuple[int, ...], ...] | None:
    if isinstance(layer, nn.modules.conv._ConvNd):
        dims = len(layer.kernel_size)
        return tuple((_BATCH, layer.in_channels, *size) for size in _USUAL_SIZES[dims])
    if isinstance(layer, nn.Linear):
        return ((_BATCH, layer.in_features), (_BATCH, 16, layer.in_features))
    if isinstance(layer, nn.RNNBase):
        return ((_BATCH, 16, layer.input_size),)
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        return ((_BATCH, 16),)
    return None


def _floating_type(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.dtype, parameter.device
    return torch.get_default_dtype(), torch.device("cpu")


def _describe_value(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_describe_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_describe_value(v) for v in value) + "]"
    return repr(value)
