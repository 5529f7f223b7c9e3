"""What a trace took for granted, and the checks that hold the graph to it.

A graph is one path through a model. Where Python branched on a value (`if x.shape[2] % 32:`), the
graph holds only the branch that the example took. Each such answer becomes one `torch._assert` in
the graph, placed right where its ingredients are known (for input shapes: at the entrance). An
input that would have gone another way gets an error that names the condition; it never gets the
result of another function.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

_SYMBOLS = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%",
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "and_": "&", "or_": "|",
}  # fmt: skip


# What takes time to compute, or may change before it is asked.
_STAY = (torch.Tensor, list, dict, set)

Question = Literal["bool", "int", "index", "float", "len", "keys", "value", "given"]

ANSWERS: dict[Question, Callable[[Any], Any]] = {
    "bool": bool,
    "int": int,
    "index": operator.index,
    "float": float,
    "len": len,
    "keys": list,
    "value": lambda value: value,
    "given": lambda value: value is not None,
}
_MEASURES = {"int": int, "float": float, "len": len, "keys": list}  # taken again at run time


@dataclass(frozen=True, eq=False)
class Assumption:
    """One answer that Python was given while the model was traced.

    Attributes:
        node: What was asked about.
        question: What Python wanted of it: its truth, its length, ...
        answer: The answer.
        path: The module that asked ("" for the model itself).
        place: File and number of the line of the model's own code that asked; None where unknown.
    """

    node: fx.Node
    question: Question
    answer: Any
    path: str
    place: tuple[str, int] | None = None

    @property
    def refusal(self) -> str:
        """What an input that breaks it is told."""
        return (
            f"this input breaks what the graph was captured with: {self}. "
            f"Capture again with such an input as the example."
        )

    def __str__(self) -> str:
        where = f" (asked in {self.path})" if self.path else ""
        return f"{self.claim}{where}"

    @property
    def claim(self) -> str:
        """What was taken for granted, as a clause."""
        what = describe(self.node)
        if self.question in ("len", "int", "float"):
            what = f"{self.question}({what})"
        if self.question == "bool":
            return f"{what} is {'true' if self.answer else 'false'}"
        if self.question == "given":
            return f"{what} is given"
        if self.question == "keys":
            return f"the keys of {what} are {self.answer!r}"
        return f"{what} is {self.answer!r}"


def insert_checks(graph: fx.Graph, assumptions: tuple[Assumption, ...]) -> tuple[Assumption, ...]:
    """Make a graph refuse inputs that break an assumption.

    Args:
        graph: The traced graph; gets one `torch._assert` for each assumption that an input can
            break (sizes of parameters can't change and need none).
        assumptions: Answers about nodes of this graph.

    Returns:
        Those that it checks now.
    """
    variable = dependent_nodes(graph, _differs_from_call_to_call)
    checked = tuple(a for a in assumptions if a.node in variable and not _asks_for_layout(a))
    for assumption in checked:
        _hoist(graph, assumption.node)
        _insert_check(graph, assumption)
    return checked


def _asks_for_layout(assumption: Assumption) -> bool:
    """Whether the graph holds what is done to any tensor, in place of a short cut for one layout.

    Strides depend on the batch size, and the operation itself changes some.
    """
    node = assumption.node
    asked = node.op == "call_method" and node.target == "is_contiguous"
    return asked and assumption.question == "bool" and not assumption.answer


def _insert_check(graph: fx.Graph, assumption: Assumption) -> None:
    node, question, answer = assumption.node, assumption.question, assumption.answer
    place = node
    while place.next.op == "placeholder":
        place = place.next

    def append(function: Callable[..., Any], *args: Any) -> fx.Node:
        nonlocal place
        with graph.inserting_after(place):
            place = graph.call_function(function, args)
        values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args]
        place.meta["val"] = None if function is torch._assert else function(*values)
        return place

    if question == "bool":
        condition = node if answer else append(operator.not_, node)
    elif question == "given":
        condition = append(operator.is_not, node, None)
    elif answer is None:
        condition = append(operator.is_, node, None)
    else:
        measured = append(_MEASURES[question], node) if question in _MEASURES else node
        condition = append(operator.eq, measured, answer)
    append(torch._assert, condition, assumption.refusal)


def _hoist(graph: fx.Graph, node: fx.Node) -> None:
    """Move a condition on input sizes up to the placeholders, with all that it is computed from."""
    chain: list[fx.Node] = []
    pending = [node]
    while pending:
        source = pending.pop()
        if source.op == "placeholder" or source in chain:
            continue
        if source.op == "call_module" or isinstance(source.meta.get("val"), _STAY):
            return
        chain.append(source)
        pending.extend(source.all_input_nodes)
    order = {member: index for index, member in enumerate(graph.nodes)} if len(chain) > 1 else {}
    place = next(n for n in graph.nodes if n.op == "placeholder")
    while place.next.op == "placeholder":
        place = place.next
    for member in sorted(chain, key=lambda member: order.get(member, 0)):
        place.append(member)
        place = member


def dependent_nodes(graph: fx.Graph, is_source: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The sources among a graph's nodes, and all that is computed from them."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if is_source(node) or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _differs_from_call_to_call(node: fx.Node) -> bool:
    """Inputs and training flags."""
    flag = node.op == "get_attr" and isinstance(node.meta.get("val"), bool)
    return node.op == "placeholder" or flag


def describe(node: fx.Node, depth: int = 6) -> str:
    """A node as the expression that a reader of the model would write, `x.shape[2] % 32`."""
    if node.op in ("placeholder", "get_attr"):
        return str(node.target)
    if depth == 0 or isinstance(node.meta.get("val"), torch.Tensor):
        return node.name
    args = [
        describe(arg, depth - 1) if isinstance(arg, fx.Node) else repr(arg) for arg in node.args
    ]
    if node.op == "call_method":
        return f"{args[0]}.{node.target}({', '.join(args[1:])})"
    if node.op != "call_function":
        return node.name
    if node.target is builtins.getattr:
        return f"{args[0]}.{node.args[1]}"
    if node.target is operator.getitem:
        return f"{args[0]}[{args[1]}]"
    if node.target is operator.contains:
        return f"{args[1]} in {args[0]}"
    name = getattr(node.target, "__name__", str(node.target))
    if name in _SYMBOLS and len(args) == 2:
        return f"{args[0]} {_SYMBOLS[name]} {args[1]}"
    return f"{name}({', '.join(args)})"
