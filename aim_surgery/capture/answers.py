"""What Python forced while a model was traced: answered from carried values, and written down.

`if x.shape[2] % 32:` asks a proxy for a bool, and gets that of the value it carries. Each such
answer is an assumption, which the graph checks where it is entered. Three kinds of values are never
answered for: tensor data, what a Python call computed from data, and autograd's state, which fake
values don't have. Answers that rest on a training flag alone are no assumptions of the graph's: the
caller traces both modes (`mode_dependent`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Set
from types import FrameType
from typing import Any

import torch
from torch import fx, nn

from aim_surgery.capture.assumptions import ANSWERS, Assumption, Question, describe
from aim_surgery.capture.leaves import holds_weights
from aim_surgery.capture.opaque import StayPython
from aim_surgery.capture.proxy import ValueProxy
from aim_surgery.capture.where import Span, calling_place, running_code

_AUTOGRAD_STATE = ("requires_grad", "grad_fn", "is_leaf", "grad")


class Answers:
    """The answers of one trace."""

    def __init__(self, caller: Callable[[], tuple[nn.Module, str] | None]) -> None:
        """Start with none.

        Args:
            caller: The innermost module that runs now, and its path; None outside of all.
        """
        self.assumptions: dict[tuple[fx.Node, Question], Assumption] = {}
        self.mode_dependent = False
        self._caller = caller
        self._shown: list[tuple[fx.Node, FrameType, Span]] = []  # values asked for as text, where
        self._flags: set[fx.Node] = set()  # nodes computed from training flags alone
        self._real: set[fx.Node] = set()  # what Python calls gave that were run for real

    def answer(self, proxy: ValueProxy, question: Question) -> Any:
        """Answer what Python must know of a proxy, and note that it was asked.

        Raises:
            StayPython: No value that the trace carries may answer that.
        """
        node, value = proxy.node, proxy.aim_value
        if isinstance(value, torch.Tensor) and question != "len":
            raise StayPython.here(f"{question}({describe(node)}) asks for tensor data")
        if node.target is getattr and node.args[1] in _AUTOGRAD_STATE:
            raise StayPython.here(f"branches on {describe(node)}")
        if node in self._real and isinstance(value, int | float):
            raise StayPython.here(f"{question}({describe(node)}) asks what data gave")
        found = ANSWERS[question](value)
        if node in self._flags:
            caller = self._caller()
            if caller is not None and not holds_weights(caller[0]):
                raise StayPython.here("branches on its training flag")
            self.mode_dependent = True
        self.assume(node, question, found)
        return found

    def assume(self, node: fx.Node, question: Question, answer: Any) -> None:
        """Note an answer; the graph will check it."""
        if (node, question) not in self.assumptions:
            caller = self._caller()
            path = caller[1] if caller else ""
            assumed = Assumption(node, question, answer, path, calling_place())
            self.assumptions[node, question] = assumed

    def write(self, proxy: ValueProxy, write: Callable[[Any], str], frame: FrameType) -> str:
        """A value as text; assumed, unless the text goes into a message alone.

        Args:
            proxy: The value, no tensor.
            write: `str`, `repr` or a format.
            frame: Whose running instruction asks.
        """
        node = proxy.node
        shown = any(node is entry[0] for entry in self._shown)
        known = (node, "value") in self.assumptions and not shown
        text = write(self.answer(proxy, "value"))
        if not known:
            self._shown.append((node, frame, running_code(frame)))
        return text

    @contextlib.contextmanager
    def only_shown(self, frame: FrameType) -> Iterator[None]:
        """Take back what is assumed of values whose text goes only into the call that is running.

        Args:
            frame: Whose running instruction is that call: `torch._assert(ok, f"{n} is odd")`. What
                becomes text within the context goes into it, too.
        """
        call, before = running_code(frame), len(self._shown)
        yield
        inside = [
            at >= before or (asking is frame and _lies_in(part, call))
            for at, (_, asking, part) in enumerate(self._shown)
        ]
        used = {entry[0] for entry, within in zip(self._shown, inside, strict=True) if not within}
        for node in {entry[0] for entry in self._shown} - used:
            self.assumptions.pop((node, "value"), None)
        self._shown = [entry for entry in self._shown if entry[0] in used]

    def note_flag(self, node: fx.Node) -> None:
        """Note that a node gives a training flag."""
        self._flags.add(node)

    def note_real(self, node: fx.Node) -> None:
        """Note that a node's value came of a Python call on real data."""
        self._real.add(node)

    def inherit(self, node: fx.Node) -> None:
        """Note what a value that is no tensor takes over from those it is computed from."""
        sources = node.all_input_nodes
        if sources and all(source in self._flags for source in sources):
            self._flags.add(node)
        if not self._real.isdisjoint(sources):
            self._real.add(node)

    def forget(self, erased: Set[fx.Node]) -> None:
        """Forget nodes that are no longer in the graph."""
        kept = {key: value for key, value in self.assumptions.items() if key[0] not in erased}
        self.assumptions = kept
        self._flags -= erased
        self._real -= erased
        self._shown = [entry for entry in self._shown if entry[0] not in erased]


def _lies_in(part: Span, whole: Span) -> bool:
    """Whether a stretch of source lies within another."""
    if None in part or None in whole:
        return False
    line, end_line, column, end_column = part
    first, last, left, right = whole
    return (first, left) <= (line, column) and (end_line, end_column) <= (last, right)  # type: ignore[operator]
