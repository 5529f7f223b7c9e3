"""What a captured model is: its graphs, and what was assumed and left as Python calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from aim_surgery.capture.assumptions import Assumption
from aim_surgery.capture.inputs import Argument, ExampleInputs
from aim_surgery.capture.opaque import OpaqueCall


@dataclass(frozen=True, eq=False)
class Trace:
    """The model in one mode.

    Attributes:
        graph: Its nodes carry their example value in `meta["val"]`.
        training: The mode that was traced.
        assumptions: What Python was told on the way; checked inside the graph.
        opaque: Submodules that stay Python calls.
        constants: Tensors that belong to no module, by the name that the graph gives them.
    """

    graph: fx.Graph
    training: bool
    assumptions: tuple[Assumption, ...]
    opaque: tuple[OpaqueCall, ...]
    constants: dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Capture:
    """A model as one graph, or as two where training and evaluation part ways.

    Attributes:
        model: The model, unchanged; its tensors are what the graph's names stand for.
        inputs: The example inputs that were used.
        arguments: The parameters of the captured forward.
        traces: The trace in the model's own mode first; the other mode's only where it differs.
            None where the model was taken as a whole (`capture_whole`).
        notes: What a reader should know, such as a mode that could not be captured.
        missing: Why the other mode has no trace, where the model branches on its mode.
        pinned: Why the graphs hold for one batch size only, where the model takes others.
        why_whole: Why the model was taken as a whole, where nobody asked for that.
        findings: What was found out about it later, such as the sites of a graph (`found_once`).
    """

    model: nn.Module
    inputs: ExampleInputs
    arguments: tuple[Argument, ...]
    traces: tuple[Trace, ...]
    notes: tuple[str, ...] = ()
    missing: str = ""
    pinned: str = ""
    why_whole: str = ""
    findings: dict[Any, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The model's modules by qualified name; one in two places has both names."""
        return dict(self.model.named_modules(remove_duplicate=False))

    @cached_property
    def owners(self) -> dict[int, list[str]]:
        """All qualified names of each parameter, by identity: more than one where it is tied."""
        owners: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
        return owners

    @cached_property
    def floating_parameters(self) -> frozenset[str]:
        """Qualified names of all parameters of floating numbers, real or complex."""
        named = self.model.named_parameters(remove_duplicate=False)
        return frozenset(n for n, p in named if p.is_floating_point() or p.is_complex())

    @property
    def whole(self) -> bool:
        """Whether the model was taken as one Python call: there is no graph then."""
        return not self.traces

    @property
    def evaluation_first(self) -> tuple[Trace, ...]:
        """The traces in an order that does not depend on the model's own mode."""
        return tuple(sorted(self.traces, key=lambda trace: trace.training))

    @property
    def graph(self) -> fx.Graph:
        """The graph in the model's own mode."""
        return self.traces[0].graph
