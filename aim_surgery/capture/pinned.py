"""Assumptions that narrow the batch: other sizes, which the model takes, would be refused.

Python that goes through the samples one by one, or takes a batch's size as a number, is told the
example's; the graph holds for no other. Whoever asks has to stay a Python call. Three steps, as
models that never ask shall not pay: does an answer change if all axes that may run over samples are
stretched by new/old (arithmetic on sizes alone)? Does the graph refuse that many samples (one run)?
Does the original take them (another)? A model that takes one batch size only is left as it is.

Likewise with what Python calls gave, whose length or presence may hang on the data (tokens that a
layer picks): a run on other data shows whether an answer about it holds.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map_only

from aim_surgery.capture.assumptions import ANSWERS, Assumption, dependent_nodes
from aim_surgery.capture.batches import count_samples, is_list_of_samples, take_samples
from aim_surgery.capture.copies import own_values, random_state_kept, twin_of
from aim_surgery.capture.inputs import Argument, ExampleInputs
from aim_surgery.capture.leaves import is_python_call
from aim_surgery.capture.values import node_value
from aim_surgery.capture.where import shown

_UNBIND = ("unbind", torch.unbind)


def find_pinned(
    model: nn.Module,
    inputs: ExampleInputs,
    arguments: Sequence[Argument],
    graph: fx.Graph,
    checked: Sequence[Assumption],
    *,
    training: bool,
    constants: dict[str, torch.Tensor],
) -> dict[str, str]:
    """Find the modules that must stay Python calls for the batch to stay free.

    Args:
        model: The model; left unchanged.
        inputs: The example inputs.
        arguments: The parameters of the captured forward.
        graph: A trace of it, with its checks.
        checked: The assumptions that the graph checks.
        training: The mode that was traced.
        constants: Tensors of the graph that belong to no module.

    Returns:
        Their qualified names ("" for the model itself), with what they ask; whoever asks by
        the same line of code together. Empty where the graph takes what the model takes.
    """
    given = tuple(argument.value for argument in arguments)  # a list would be one of samples
    by_data = _asked_of_calls(model, graph, checked)
    if by_data:
        try:
            twin = _twin(model, training, constants)
        except Exception:  # no copy to be had: the graph refuses other data openly
            return {}
        found = _refuted_by_data(twin, graph, given, by_data)
        if found:
            return found
    count = count_samples((*inputs.args, *inputs.kwargs.values()))
    unrefuted = list(checked)
    for other in dict.fromkeys((count + 1, 2 * count, 3 * count)) if count else ():
        stretched = _Stretched(count, other)
        suspects = [one for one in unrefuted if stretched.changes(one)]
        if not suspects:
            continue
        try:
            run = _Run(_twin(model, training, constants), graph, suspects)
        except Exception:  # no copy to be had: the graph refuses other sizes openly
            return {}
        took = run.takes(take_samples(given, count, other))
        if took:
            unrefuted = [one for one in unrefuted if one not in suspects or one in run.broken]
        if run.broken and _takes(model, inputs, count, other, training):
            return _askers(checked, run.broken, "batch sizes")
    return {}


def _askers(
    checked: Sequence[Assumption], broken: Sequence[Assumption], refused: str
) -> dict[str, str]:
    """Who asks what does not hold, and who asks by the same line; why it stays a Python call."""
    places = {one.place for one in broken} - {None}
    alike = [one for one in checked if one in broken or one.place in places]
    return {one.path: _reason(one, refused) for one in reversed(alike)}


def _reason(one: Assumption, refused: str) -> str:
    line = shown(one.place)
    what = f"other {refused} would be refused, as Python is told that {one.claim}"
    return f"{what} at {line}" if line else what


def _asked_of_calls(
    model: nn.Module, graph: fx.Graph, checked: Sequence[Assumption]
) -> list[Assumption]:
    """The assumptions about what comes out of Python calls."""
    given = dependent_nodes(graph, lambda node: is_python_call(model, node))
    return [one for one in checked if one.node in given]


def _refuted_by_data(
    twin: nn.Module, graph: fx.Graph, given: tuple[Any, ...], suspects: Sequence[Assumption]
) -> dict[str, str]:
    """Who asks what does not hold for other floats of the same shapes, with what is asked."""
    run = _Run(twin, graph, suspects)
    with random_state_kept():
        torch.manual_seed(0)
        run.takes(tree_map_only(torch.Tensor, _normal_noise, given))
    return _askers(suspects, run.broken, "data")


def _normal_noise(tensor: torch.Tensor) -> torch.Tensor:
    return torch.randn_like(tensor) if tensor.is_floating_point() else tensor


class _Stretched:
    """Sizes and what is computed from them, for another number of samples."""

    def __init__(self, old: int, new: int) -> None:
        self._old, self._new = old, new
        self._known: dict[fx.Node, Any] = {}

    def changes(self, one: Assumption) -> bool:
        """Whether another answer would be given."""
        value = one.node.meta["val"]
        if one.question in ("given", "keys") or value is None:
            return False
        if isinstance(value, torch.Tensor):  # len(x)
            return one.question == "len" and self._size(one.node)[0] != one.answer
        try:
            return bool(ANSWERS[one.question](self._of(one.node)) != one.answer)
        except Exception:
            return True

    def _of(self, node: fx.Node) -> Any:
        pending = [node]
        while pending:
            last = pending[-1]
            inputs = [] if last in self._known else last.all_input_nodes
            missing = [n for n in inputs if n not in self._known and not _is_tensor(n)]
            pending += missing
            if not missing:
                self._known.setdefault(last, self._compute(last))
                pending.pop()
        return self._known[node]

    def _compute(self, node: fx.Node) -> Any:
        value = node.meta["val"]
        if _is_tensor(node) or node.op == "get_attr":
            return value
        if node.op in ("placeholder", "call_module"):
            return self._listed(value)
        owner = node.args[0] if node.args else None
        if isinstance(owner, fx.Node) and _is_tensor(owner):
            return self._asked(node, owner)
        if any(_is_tensor(source) for source in node.all_input_nodes):
            return value

        def known(n: fx.Node) -> Any:
            return self._known[n]

        args, kwargs = fx.map_arg(node.args, known), fx.map_arg(node.kwargs, known)
        try:
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            function: Callable[..., Any] = node.target  # pyright: ignore[reportAssignmentType]
            return function(*args, **kwargs)
        except Exception:
            return value

    def _asked(self, node: fx.Node, tensor: fx.Node) -> Any:
        """What is asked of a tensor: its size, or its parts."""
        rest = node_value(node.args[1:])
        if node.target == "numel":
            return math.prod(self._size(tensor))
        if node.target == "size" or (node.target is getattr and rest == ("shape",)):
            size = self._size(tensor)
            axes = rest if node.target == "size" else ()
            axis: Any = axes[0] if axes else node.kwargs.get("dim")
            return size[axis] if isinstance(axis, int) else size
        if node.target in _UNBIND:
            axis = rest[0] if rest else node_value(node.kwargs).get("dim", 0)
            return (tensor.meta["val"],) * self._size(tensor)[axis]
        return node.meta["val"]

    def _listed(self, value: Any) -> Any:
        """A list of one entry a sample, with others as many."""
        if is_list_of_samples(value) and len(value) == self._old:
            return [value[i % self._old] for i in range(self._new)]
        return value

    def _size(self, tensor: fx.Node) -> torch.Size:
        """Its first axis may hold samples, and any that is as long as the batch."""
        old, new = self._old, self._new

        def stretched(axis: int, size: int) -> int:
            may = (axis == 0 and size % old == 0) or size == old > 1
            return size // old * new if may and not _is_literal(tensor, axis) else size

        return torch.Size(stretched(*each) for each in enumerate(tensor.meta["val"].shape))


def _is_literal(tensor: fx.Node, axis: int) -> bool:
    """Whether a number in the model's code says how long an axis is: `reshape(b, n, 2, h, -1)`."""
    while tensor.op == "call_method" and isinstance(tensor.args[0], fx.Node):
        args = tuple(tensor.args[1:])
        sizes: Any = args[0] if len(args) == 1 and isinstance(args[0], tuple | list) else args
        name, ndim = str(tensor.target), tensor.meta["val"].ndim
        if name in ("view", "reshape", "expand", "new_zeros", "new_ones") and len(sizes) == ndim:
            return isinstance(sizes[axis], int) and sizes[axis] != -1
        if name == "permute" and all(isinstance(size, int) for size in sizes):
            axis = sizes[axis] % ndim
        elif name == "transpose" and all(isinstance(size, int) for size in sizes):
            one, two = (size % ndim for size in sizes)
            axis = {one: two, two: one}.get(axis, axis)
        elif name not in ("contiguous", "float", "clone"):
            return False
        tensor = tensor.args[0]
    return False


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], torch.Tensor)


# Runs ---------------------------------------------------------------------------------------


def _twin(
    model: nn.Module, training: bool, constants: Mapping[str, torch.Tensor] | None = None
) -> nn.Module:
    twin = twin_of(model, training)
    for name, constant in (constants or {}).items():
        setattr(twin, name, constant.detach().clone())  # a run may write into it
    return twin


def _takes(model: nn.Module, inputs: ExampleInputs, old: int, new: int, training: bool) -> bool:
    """Whether a copy of the model runs on so many samples."""
    try:
        twin = _twin(model, training)
        with torch.no_grad(), random_state_kept():
            given = take_samples((inputs.args, dict(inputs.kwargs)), old, new)
            args, kwargs = tree_map_only(torch.Tensor, own_values, given)
            twin(*args, **kwargs)
    except Exception:
        return False
    return True


class _Run(fx.Interpreter):
    """Runs a graph; notes broken assumptions, and goes on."""

    def __init__(self, module: nn.Module, graph: fx.Graph, suspects: Sequence[Assumption]) -> None:
        super().__init__(module, graph=graph)
        self._suspects = {one.refusal: one for one in suspects}
        self.broken: list[Assumption] = []

    def takes(self, given: Sequence[Any]) -> bool:
        """Whether it comes to its end; what follows a broken assumption may not."""
        try:
            with torch.no_grad(), random_state_kept():
                self.run(*tree_map_only(torch.Tensor, own_values, list(given)))
        except Exception:
            return False
        return True

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """One function of the graph."""
        if target is torch._assert and operator.not_(args[0]) and args[1] in self._suspects:
            self.broken.append(self._suspects[args[1]])
            return None
        return super().call_function(target, args, kwargs)
