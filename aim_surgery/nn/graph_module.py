"""The module that surgery returns: a `torch.fx.GraphModule` that keeps what fx would drop.

A plain `GraphModule` keeps only the attributes that its graph names, so a deep copy would lose
parameters that this mode does not use and make buffers persistent that were not; its pickle traces
its own code again, which would freeze training flags. `AimGraphModule` copies and pickles whole.
Where training and evaluation take different paths through the model, it holds both graphs and
changes over in `train()`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import fx, nn
from torch.fx.graph import PythonCode

from aim_surgery.nn.graph_state import graph_from_state, graph_state


class AimGraphModule(fx.GraphModule):
    """A model with a memory, as an fx graph.

    Attributes:
        contrary: Submodules that the original's own `train(mode)` puts in the other mode (frozen
            batch norm), for each mode.
    """

    contrary: dict[bool, tuple[str, ...]]
    _graphs: dict[bool, fx.Graph]

    def __init__(self, graphs: dict[bool, fx.Graph], *, training: bool, class_name: str) -> None:
        """Compile the graph(s); `adopt` then gives them the modules that they name.

        Args:
            graphs: The graph for training (True) and for evaluation (False); one may do for both.
            training: The mode to begin in.
            class_name: Name of the original model's class, for `repr`.
        """
        super().__init__(nn.Module(), fx.Graph(), class_name)
        self.training = training
        self.contrary = {True: (), False: ()}
        only = next(iter(graphs.values()))
        self._install({mode: graphs.get(mode, only) for mode in (True, False)})

    @property
    def plan(self) -> Any:
        """The plan that it was operated by, `aim.plan`; None where it has been restored."""
        return getattr(self._modules.get("aim"), "plan", None)

    def adopt(self, root: nn.Module) -> None:
        """Take over all that a module tree holds: children, tensors, plain attributes.

        Args:
            root: The tree whose names the graphs use; not to be used afterwards.
        """
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = vars(root)[name]
        self.__dict__.update({k: v for k, v in vars(root).items() if k not in self.__dict__})

    def _install(self, graphs: dict[bool, fx.Graph]) -> None:
        self._graphs = graphs
        self.graph = graphs[self.training]

    def train(self, mode: bool = True) -> Self:
        """Set the mode, as the original's `train` would, and change graphs where there are two."""
        super().train(mode)
        for path in self.contrary[mode]:
            self.get_submodule(path).training = not mode  # each has its own path here
        if self._graphs[mode] is not self._graph:
            self.graph = self._graphs[mode]
        return self

    def recompile(self) -> PythonCode:
        """Compile the graph; one that changes the grad mode puts it back whatever happens."""
        code = super().recompile()
        if any(node.target is torch._C._set_grad_enabled for node in self.graph.nodes):
            type(self).forward = _restoring_grad_mode(type(self).forward)
        return code

    def _state(self) -> dict[str, Any]:
        dropped = ("_graph", "_graphs", "_code", "_lineno_map", "_prologue_start")
        dropped += ("_compiled_call_impl",)  # of `compile`: it calls this very module
        return {name: value for name, value in vars(self).items() if name not in dropped}

    def __deepcopy__(self, memo: dict[int, Any]) -> AimGraphModule:
        twin = _bare()
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self._state(), memo))
        twin._install(_by_mode([copy.deepcopy(graph) for graph in graphs_of(self)]))
        return twin

    def __copy__(self) -> AimGraphModule:
        return _assembled(self._state(), [copy.deepcopy(g) for g in graphs_of(self)])

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._state(), [graph_state(g) for g in graphs_of(self)])


def graphs_of(gm: nn.Module) -> tuple[fx.Graph, ...]:
    """The graphs of a model: that for training and that for evaluation, or one that is both.

    Args:
        gm: An operated model; one that kept its class has none.
    """
    if not isinstance(gm, AimGraphModule):
        return ()
    both = gm._graphs[True], gm._graphs[False]
    return both[:1] if both[0] is both[1] else both


def use_graph(gm: AimGraphModule, graph: fx.Graph) -> None:
    """Let one graph do for training and evaluation, and compile it."""
    gm._install({True: graph, False: graph})


def _restoring_grad_mode(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def restoring(self: AimGraphModule, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            return forward(self, *args, **kwargs)

    return restoring


def _bare() -> AimGraphModule:
    return AimGraphModule.__new__(AimGraphModule)


def _by_mode(graphs: list[fx.Graph]) -> dict[bool, fx.Graph]:
    return {True: graphs[0], False: graphs[-1]}


def _assembled(state: dict[str, Any], graphs: list[fx.Graph]) -> AimGraphModule:
    module = _bare()
    module.__dict__.update(state)
    module._install(_by_mode(graphs))
    return module


def _rebuild(state: dict[str, Any], graph_states: list[Any]) -> AimGraphModule:
    return _assembled(state, [graph_from_state(graph) for graph in graph_states])
