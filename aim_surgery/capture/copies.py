"""Running for real: copies of modules, and what to call them with.

The user's own values where there are any; noise where only shapes are known.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map

from aim_surgery.capture.belongings import Belonging, Belongings
from aim_surgery.capture.inputs import ExampleInputs
from aim_surgery.capture.nested import attributes_of
from aim_surgery.capture.opaque import failed


def derived_tensors(model: nn.Module) -> dict[int, Any]:
    """What `deepcopy` refuses, since it has a history: pruned weights, activations that were kept.

    In attributes, or as deep in collections and objects as they lie there.

    Args:
        model: Left unchanged.

    Returns:
        Copies without history by identity, to begin the memo of `deepcopy` with.
    """
    found: dict[int, Any] = {}
    pending = [value for module in model.modules() for value in vars(module).values()]
    opened: dict[int, Any] = {}  # kept alive, so that no other object gets its identity
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            if not value.is_leaf:
                found[id(value)] = value.detach().clone()
        elif id(value) not in opened and (parts := _parts(value)):
            opened[id(value)] = value
            pending += parts
    return found


def _parts(value: Any) -> tuple[Any, ...]:
    """What `deepcopy` copies along with a value, of what may hold tensors that are no module's."""
    if isinstance(value, dict):
        return tuple(value.values())
    if isinstance(value, list | tuple | set | frozenset | deque):
        return tuple(value)
    return tuple(attributes_of(value).values())


def keep_attributes(model: nn.Module, twin: nn.Module) -> None:
    """Give a copy's parameters what was noted on the model's, which `deepcopy` drops.

    Scripts make optimizers' groups by such notes (`no_weight_decay`).

    Args:
        model: The model; left unchanged.
        twin: Its copy; parameters of other names have nothing to keep.
    """
    noted = {name: vars(p) for name, p in model.named_parameters() if vars(p)}
    for name, parameter in twin.named_parameters() if noted else ():
        vars(parameter).update(noted.get(name, {}))


def deep_copy(module: nn.Module, memo: dict[int, Any] | None = None) -> Any:
    """A deep copy of a module, also of one whose hooks have computed weights.

    Args:
        module: Left unchanged.
        memo: What stands for which object, by identity, besides.

    Returns:
        The copy.
    """
    known = derived_tensors(module) | (memo or {})
    twin = copy.deepcopy(module, known)
    own_script_parameters(module, twin, known)
    keep_attributes(module, twin)
    return twin


def own_script_parameters(module: nn.Module, twin: nn.Module, memo: Mapping[int, Any]) -> None:
    """Give copies of TorchScript modules parameters of their own.

    `deepcopy` leaves them clones with a history, whose gradients reach the model's.

    Args:
        module: The model, or a part of it; left unchanged.
        twin: Its copy.
        memo: What stands for which parameter, by identity; the others get copies.
    """
    scripts = {p: m for p, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)}
    twins = dict(twin.named_modules()) if scripts else {}
    for path, script in scripts.items():
        for name, parameter in script.named_parameters(recurse=False):
            own = memo.get(id(parameter))
            if own is None:
                own = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            setattr(twins[path], name, own)


def twin_of(model: nn.Module, training: bool) -> nn.Module:
    """A copy of a model, to be run in a mode; what the model refuses of copies is raised.

    Args:
        model: Left unchanged.
        training: The mode; a copy that is in it already is not asked to change.

    Returns:
        The copy.
    """
    twin = deep_copy(model)
    if twin.training != training:
        twin.train(training)  # a `train` of the model's own may return nothing
    return twin


def is_shape_only(tensor: torch.Tensor) -> bool:
    """Whether a tensor's floats are all the same: then its shape counts, and not its values."""
    if tensor.is_meta or not tensor.is_floating_point() or tensor.numel() < 2:
        return False
    if tensor.layout != torch.strided:  # where its values are is some of what it says
        return False
    return bool((tensor == tensor.flatten()[0]).all())


def noise_like(tensor: torch.Tensor, integer: int = 0) -> torch.Tensor:
    """Floats between 0 and 1; one integer for what is no float."""
    if tensor.dtype.is_floating_point:
        return torch.rand(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return torch.full(tensor.shape, integer, dtype=tensor.dtype, device=tensor.device)


def own_values(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor; noise where only its shape counts."""
    return noise_like(tensor) if is_shape_only(tensor) else tensor.detach().clone()


def own_arguments(inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of what a model is to be called with; noise where only shapes count."""

    def own(value: Any) -> Any:
        return own_values(value) if isinstance(value, torch.Tensor) else copy.deepcopy(value)

    args, kwargs = tree_map(own, (inputs.args, dict(inputs.kwargs)))
    return args, kwargs


@contextlib.contextmanager
def random_state_kept(sources: Iterable[Belonging] = ()) -> Iterator[None]:
    """Give back the random state that the caller had: torch's, Python's and NumPy's.

    Args:
        sources: Further ones that get theirs back, too, such as a model's own; copies may share
            them.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for source in sources:
            source.put_back()
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def shared_state_kept(model: nn.Module) -> Iterator[None]:
    """Give back what copies of a model share with it: tables of its files, random states.

    Args:
        model: Of whose classes and files dicts, lists, sets and arrays get their items back.
    """
    belongings = Belongings.of(model)
    try:
        with random_state_kept(belongings.sources):
            yield
    finally:
        for table in belongings.of_files:
            table.put_back()


def has_values(model: nn.Module) -> bool:
    """Whether all of a model has values, none is on the meta device: a copy can run for real."""
    return not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def why_not_run(model: nn.Module, inputs: ExampleInputs) -> str:
    """Why a copy of a model runs on no such inputs in either mode, "" if it does in one.

    That it can't be copied, surgery tells.
    """
    faults = []
    for training in (False, True):
        for grad in (False, True):  # it may take derivatives in its forward
            try:
                twin = twin_of(model, training)
            except Exception:
                return ""
            try:
                with torch.set_grad_enabled(grad), shared_state_kept(model):
                    args, kwargs = own_arguments(inputs)
                    twin(*args, **kwargs)
            except Exception as err:
                faults.append(failed(err))
            else:
                return ""
    return faults[0]
