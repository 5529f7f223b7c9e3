"""What Python forced while a model was traced: answered from carried values, and written down.

`if x.shape[2] % 32:` asks a proxy for a bool, and gets that of the value it carries. Each such
answer is an assumption, which the graph checks where it is entered. Three kinds of values are never
answered for: tensor data, what a Python call computed from data, and autograd's state, which fake
values don't have. Answers that rest on a training flag alone are no assumptions of the graph's: the
caller traces both modes (`mode_dependent`).
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import torch
from torch import fx, nn

from aim_surgery.capture.assumptions import ANSWERS, Assumption, Question, describe
from aim_surgery.capture.leaves import holds_weights
from aim_surgery.capture.opaque import StayPython
from aim_surgery.capture.proxy import ValueProxy
from aim_surgery.capture.where import calling_place

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
        self._shown: dict[fx.Node, str] = {}  # values that were asked for as text
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

    def show(self, proxy: ValueProxy, spec: str) -> str:
        """A value as text; assumed, unless it goes into an assertion's message alone."""
        known = (proxy.node, "value") in self.assumptions
        text = format(self.answer(proxy, "value"), spec)
        if not known:
            self._shown[proxy.node] = text
        return text

    def forget_shown(self, message: str) -> None:
        """Take back assumptions about what was only shown in a message."""
        for node, text in tuple(self._shown.items()):
            if text in message:
                del self._shown[node]
                self.assumptions.pop((node, "value"), None)

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
