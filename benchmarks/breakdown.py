"""Where the time of a training step goes: one profile, split by what the time was spent on.

    time of a part = Σ self time of its operators, forward and backward

A part is a module's (its operators are recorded between its hooks) or, outside those, a kind of
operator. An operator of the backward pass belongs where the forward operator does whose autograd
node it runs: both carry that node's sequence number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from aim_surgery.nn.memory import Memory
from aim_surgery.nn.write_block import WriteBlock

FIRST, OTHERS = "the first convolution", "the other convolutions"
UPDATE_BLOCKS, MEMORY_LAYER = "update blocks", "memory layer"
OPTIMIZER, REST = "optimizer", "all the rest"
_SCOPE = "part: "
_BACKWARD = "autograd::engine::evaluate_function: "
_KINDS = {  # operators outside the modules of interest, by words in their names
    "concatenation": ("cat", "narrow", "slice"),
    "views of the memory": ("pool1d", "adaptive", "pad", "expand", "repeat"),
    "batch norm": ("batch_norm", "batchnorm"),
}


def parts_of(model: nn.Module, first: nn.Module) -> dict[nn.Module, str]:
    """What time inside a ResNet's modules counts as.

    Args:
        model: The model, operated or not.
        first: Its first convolution, which is a part of its own: alone it needs no gradient of its
            input, unless that is joined by a memory.

    Returns:
        Update blocks, memory layers and convolutions, with the names of their parts.
    """
    parts: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, WriteBlock):
            parts[module] = UPDATE_BLOCKS
        elif isinstance(module, Memory):
            parts[module] = MEMORY_LAYER
    inside = {module for block in parts for module in block.modules()}
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module not in inside:
            parts[module] = FIRST if module is first else OTHERS
    return parts


def profiled(step: Callable[[], object], parts: Mapping[nn.Module, str]) -> dict[str, float]:
    """Profile one step.

    Args:
        step: Forward, backward and optimizer step.
        parts: What time inside a module counts as; an outer module goes before those in it.

    Returns:
        Milliseconds by part.
    """
    with _recorded(parts), profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    events = list(found.events() or ())
    owners = _owners(events)
    spent: defaultdict[str, float] = defaultdict(float)
    for event in events:
        spent[_part_of(event, owners)] += event.self_cpu_time_total / 1e3
    return dict(spent)


@contextmanager
def _recorded(parts: Mapping[nn.Module, str]) -> Iterator[None]:
    running: list[record_function] = []
    handles: list[Any] = []

    def enter(module: nn.Module, _: Any) -> None:
        running.append(record_function(f"{_SCOPE}{parts[module]}"))
        running[-1].__enter__()

    def leave(module: nn.Module, *_: Any) -> None:
        running.pop().__exit__(None, None, None)

    for module in parts:
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _owners(events: list[Any]) -> dict[int, str]:
    """The part of each autograd node that was made inside a module, by its sequence number."""
    owners: dict[int, str] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr < 0 or any(up.name.startswith(_BACKWARD) for up in _upwards(event)):
            continue
        # operators that make no node carry the next one's number: the last one made it
        owners[event.sequence_nr] = _scope(event)
    return owners


def _part_of(event: Any, owners: Mapping[int, str]) -> str:
    scope = _scope(event)
    if scope:
        return scope
    chain = tuple(_upwards(event))
    if any(up.name.startswith("Optimizer.") for up in chain):
        return OPTIMIZER
    nodes = [up for up in chain if up.name.startswith(_BACKWARD)]
    if nodes and owners.get(nodes[-1].sequence_nr):
        return owners[nodes[-1].sequence_nr]
    name = (nodes[-1] if nodes else chain[-1]).name.removeprefix(_BACKWARD).lower()
    return next((kind for kind, words in _KINDS.items() if any(w in name for w in words)), REST)


def _scope(event: Any) -> str:
    scopes = [up.name for up in _upwards(event) if up.name.startswith(_SCOPE)]
    return scopes[-1].removeprefix(_SCOPE) if scopes else ""


def _upwards(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def least(profiles: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The least that each part took in several profiles: what other programs added is gone."""
    names = dict.fromkeys(name for found in profiles for name in found)
    return {name: min(found.get(name, 0.0) for found in profiles) for name in names}
