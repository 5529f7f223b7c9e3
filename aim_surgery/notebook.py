"""The notebook of an operated model: train it alone, look into it, forget it, leave it out.

memory_parameters   what is new, for an optimizer
freeze_base         nothing but what is new is trained
read_memory         the memory before and after each write
reset_memory        forget what batches wrote
disable             all reads give zeros, for ablation
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from aim_surgery.capture import ExampleInputs, Inputs
from aim_surgery.errors import AimSurgeryError
from aim_surgery.lowering.forms import take_apart
from aim_surgery.nn.aim_modules import BeforeFreezing, aim_of, operated_in, plan_of
from aim_surgery.nn.graph_module import AimGraphModule, graphs_of
from aim_surgery.nn.inside import keep_in_evaluation
from aim_surgery.nn.memory import Memory
from aim_surgery.nn.recurrent import own_parameters
from aim_surgery.nn.write_block import WriteBlock
from aim_surgery.planning import Memory as PlannedMemory
from aim_surgery.planning import Plan
from aim_surgery.surgery.modules import AIM, memory_path, write_path
from aim_surgery.surgery.outputs import evaluating

_Model = TypeVar("_Model", bound=nn.Module)
_COUNTED = "num_batches_tracked"


def memory_parameters(gm: nn.Module) -> Iterator[nn.Parameter]:
    """Go through what the operation added, for optimizers that train only what is new.

    Memory, update blocks, memory weights. A widened weight is one parameter, old entries and new,
    so it comes whole; after `freeze_base` the new entries are parameters of their own, and nothing
    old comes with them.

    Args:
        gm: An operated model, also inside `torch.compile` or a parallel wrapper.

    Returns:
        An iterator over parameters, each once.

    Raises:
        AimSurgeryError: The model was not operated.

    Example:
        >>> from torch import nn
        >>> from aim_surgery import transform
        >>> gm = transform(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
        >>> optimizer = torch.optim.SGD(memory_parameters(freeze_base(gm)), lr=0.1)
    """
    inner = operated_in(gm)
    widened = {
        own
        for read in plan_of(inner).reads
        if read.site.widens
        for name in read.site.weights
        for own in _parts(inner, name)
    }
    return (
        parameter
        for name, parameter in inner.named_parameters()
        if name.startswith(f"{AIM}.") or name in widened
    )


def _parts(model: nn.Module, name: str) -> list[str]:
    """Names of the parameters that a weight is, or is made of where it was pruned since."""
    path, _, own = name.rpartition(".")
    parts = own_parameters(model.get_submodule(path), own)
    return [f"{path}.{part}" if path else part for part in parts]


def freeze_base(gm: _Model, *, statistics: bool = False) -> _Model:
    """Train only what is new: the base stays as it is, to the bit, under any optimizer.

    A widened weight holds old entries and new ones, and weight decay or momentum would move the old
    ones even where their gradient is masked. So each widened layer becomes what it was, and its
    memory weights a parameter beside it:

        conv(cat[x, m], [W_x ; W_m])  ->  conv(x, W_x) + conv(m, W_m)

    The model computes what it computed before. Make the optimizer afterwards: widened weights are
    replaced. The plan says then that the memory weights live beside, so that `save` and `load` give
    the same parameters under the same names; but which of them are trained, and `statistics`, no
    file carries: call this again after `load` (that takes nothing apart twice).

    Shapes:
        (C_out, C_in/g + k, *kernel) -> (C_out, C_in/g, *kernel) and, under `aim.reads.`, (C_out, k,
        *kernel); transposed (C_in + g·k, C_out/g, *kernel) -> (C_in, C_out/g, *kernel) and (k,
        C_out, *kernel); linear (out, in + k) -> (out, in) and (out, k)

    Args:
        gm: An operated model, also inside `torch.compile`; changed in place. Parameters that it
            shares with its original (`copy=False`) no longer ask for gradients there either.
        statistics: Whether running statistics of the base stay too: modules that hold some
            (`running_…`, as batch norm does) work in evaluation mode from now on, whatever `train`
            says. What else training changes in buffers is not kept.

    Returns:
        The same model. Parameters under `aim.` ask for gradients, all others don't.

    Raises:
        AimSurgeryError: The model was not operated, its graph was changed since, a parallel
            wrapper holds on to its parameters (freeze first, wrap then), or a module with
            statistics branches on its training flag in Python. Nothing is changed.
    """
    inner = operated_in(gm)
    if gm is not inner and getattr(gm, "_orig_mod", None) is not inner:
        raise AimSurgeryError(
            f"{type(gm).__name__} holds on to the parameters that this replaces: call freeze_base "
            f"on the operated model first, and wrap it then"
        )
    kept = _modules_with_statistics(inner) if statistics else []
    with torch.inference_mode(False):  # parameters made inside it could never be trained
        take_apart(inner, "the base is frozen")
    _note_before_freezing(inner, kept)
    for name, parameter in inner.named_parameters():
        parameter.requires_grad_(name.startswith(f"{AIM}."))
    _keep_in_evaluation(inner, kept)
    return gm


def read_memory(gm: nn.Module, inputs: Inputs | None = None) -> dict[str, Tensor]:
    """Look into the notebook: the memory before any write and after each one.

    Shapes:
        (1, C_m, *home) before per-sample writes, (N, C_m, *home) after; (…, M) without home size

    Args:
        gm: An operated model, also inside `torch.compile` or a parallel wrapper; left unchanged,
            modes and buffers too. It runs once, uncompiled, in evaluation mode, without gradients.
        inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments. Without
            any, only what does not depend on them: the memory itself, and averages of writes for
            the whole batch.

    Returns:
        Tensors of their own in the home layout (where that has more places than there are floats,
        the rest is zeros), in the order in which they come to be: by the memory's name ("memory")
        what it is before any write, by the name of each write point what it is after that write
        (by `aim.writes.<point>` where a memory has that name).

    Raises:
        AimSurgeryError: The model was not operated.
    """
    gm = operated_in(gm)
    notes = _notes_by_name(plan_of(gm))
    found: dict[str, Tensor] = {}
    with evaluating(gm), torch.no_grad():
        if inputs is None:
            _read_constants(gm, found)
        else:
            given = ExampleInputs.given(inputs)
            with _watched(gm, found), _uncompiled(gm):
                _run(gm, given)
    return {
        name: _at_home(found[path], memory)
        for name, (path, memory) in notes.items()
        if path in found
    }


def reset_memory(gm: nn.Module) -> None:
    """Forget what batches wrote: the carried state and the running averages of writes.

    What was learned stays: the memory's weights and biases, and the update blocks.

    Args:
        gm: An operated model; changed in place.

    Raises:
        AimSurgeryError: The model was not operated.
    """
    for module in _notes(operated_in(gm)):
        module.reset()


@contextmanager
def disable(gm: nn.Module) -> Iterator[None]:
    """Leave the memory out: inside, all reads give zeros, and nothing is written or noted.

    A model made with `init="preserve"` and not trained since is exactly its original here; a
    trained one shows what it is without its notebook. For evaluation: a training step inside finds
    no way to memory and update blocks, which DDP refuses unless told to look for unused parameters.

    Args:
        gm: An operated model; as before afterwards.

    Raises:
        AimSurgeryError: The model was not operated.
    """
    modules = _notes(operated_in(gm))
    before = [module.enabled for module in modules]
    for module in modules:
        module.enabled = False
    try:
        yield
    finally:
        for module, enabled in zip(modules, before, strict=True):
            module.enabled = enabled


def _modules_with_statistics(gm: nn.Module) -> list[str]:
    """Modules of the base that hold running statistics, by name."""
    found = [
        name
        for name, module in gm.named_modules()
        if name and name.split(".")[0] != AIM and _holds_statistics(module)
    ]
    flags = {f"{name}.training": name for name in found}
    graphs = graphs_of(gm)
    for node in (node for graph in graphs for node in graph.nodes):
        if str(node.target) in flags and any(user.target is torch._assert for user in node.users):
            raise AimSurgeryError(
                f"{flags[str(node.target)]}: its Python code goes another way in evaluation, which "
                f"the graph for training has not; for statistics=True, let its class's train() "
                f"keep it in evaluation mode, and operate anew"
            )
    return found


def _note_before_freezing(gm: nn.Module, kept: list[str]) -> None:
    """What `restore` will put back; what stands there from an earlier call counts."""
    aim = aim_of(gm)
    before = aim.before_freezing
    if before is None:
        trained = {name: p.requires_grad for name, p in gm.named_parameters()}
        contrary = gm.contrary if isinstance(gm, AimGraphModule) else {}
        before = BeforeFreezing(trained, dict(contrary))
    evaluating = tuple(dict.fromkeys((*before.evaluating, *kept)))
    aim.before_freezing = replace(before, evaluating=evaluating)


def _keep_in_evaluation(gm: nn.Module, names: list[str]) -> None:
    for name in names:
        gm.get_submodule(name).training = False
    if not isinstance(gm, AimGraphModule):  # its class has a `train` of its own
        for name in names:
            keep_in_evaluation(gm.get_submodule(name))
        return
    gm.contrary = {
        True: tuple(dict.fromkeys((*gm.contrary[True], *names))),
        False: tuple(name for name in gm.contrary[False] if name not in names),
    }


def _holds_statistics(module: nn.Module) -> bool:
    names = (name for name, buffer in module._buffers.items() if buffer is not None)
    return any(name.startswith("running_") or name == _COUNTED for name in names)


def _notes(gm: nn.Module) -> list[Memory | WriteBlock]:
    return [m for m in gm.get_submodule(AIM).modules() if isinstance(m, Memory | WriteBlock)]


def _notes_by_name(plan: Plan) -> dict[str, tuple[str, PlannedMemory]]:
    """Paths of memories and update blocks, by the names that `read_memory` gives them."""
    memories = {memory.name: memory for memory in plan.memories}
    named = {name: (memory_path(name), memory) for name, memory in memories.items()}
    for write in plan.writes:
        path = write_path(write)
        name = path if write.point.name in memories else write.point.name
        named[name] = (path, memories[write.memory])
    return named


@contextmanager
def _watched(gm: nn.Module, found: dict[str, Tensor]) -> Iterator[None]:
    """Note what memories and update blocks give, by their paths."""

    def noting(path: str) -> Callable[..., None]:
        def note(_module: nn.Module, _args: object, output: Tensor | None) -> None:
            if output is not None:  # a memory that takes notes gives nothing
                found[path] = output

        return note

    paths = [path for path, _ in _notes_by_name(plan_of(gm)).values()]
    handles = [gm.get_submodule(path).register_forward_hook(noting(path)) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _uncompiled(gm: nn.Module) -> AbstractContextManager[Any]:
    """Modules compiled in place run as they are: compiled code knows no hooks added later."""
    if any(module._compiled_call_impl is not None for module in gm.modules()):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def _run(gm: nn.Module, inputs: ExampleInputs) -> None:
    """Run the model; what it writes into buffers goes to copies of them."""
    buffers = {name: buffer.clone() for name, buffer in gm.named_buffers()}
    torch.func.functional_call(gm, buffers, inputs.args, dict(inputs.kwargs))


def _read_constants(gm: nn.Module, found: dict[str, Tensor]) -> None:
    versions: dict[tuple[str, int], Tensor] = {}
    plan = plan_of(gm)
    for memory in plan.memories:
        path = memory_path(memory.name)
        found[path] = versions[memory.name, 0] = gm.get_submodule(path)()
    for write in plan.writes:
        source = versions.get((write.memory, write.source))
        if write.per == "batch" and source is not None:
            path = write_path(write)
            written = gm.get_submodule(path)(None, None, source)  # evaluating, it needs no features
            found[path] = versions[write.memory, write.version] = written


def _at_home(memory: Tensor, planned: PlannedMemory) -> Tensor:
    places = torch.Size(planned.layout).numel()
    return F.pad(memory.detach(), (0, places - planned.floats)).unflatten(1, planned.layout)
