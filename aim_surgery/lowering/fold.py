"""fold: the form for inference, in which constant memory is no longer computed.

Every tensor t of the folded graph stands for the value T = t + o. The offset o is a constant map
without batch. A read adds the constant W_m m to the offset of what its layer gives, and what
follows carries it on, at no cost as long as there is a rule (`fold_rules`):

    product       W(t + o) + b         = (W t + b) + W o
    batch norm    s (t + o) + c        = s t + (s o + c)      one pass, as before; o is gone
    relu          max(t + o, 0)        = max(t, -o) + o       one pass, as before; -o is stored
    sum, concatenation, average pooling, flatten, resize, ...: of t and of o

An offset that is the same at all positions goes into the bias of the product that it is added to
(linear layers, convolutions on 1x1). Where somebody needs T itself (max pooling, other activations,
an update block, the output), or o has grown to several times T and would take digits off it, o is
added once.

    maps of other sizes    The maps belong to the sizes of the example. For others they are computed
                           by a second graph (the recipe) over the same layers, once for each size.
    per-sample memory      What a sample wrote is no constant: reads after such a write keep their
                           sum of two products; offsets from before it go through W_x all the same.
    pointwise products     Convolutions with kernels of one position become products of matrices
                           where these are faster (`nn.pointwise`).
    per-batch memory       In evaluation, that is a constant: the running average.

In: an operated model in evaluation mode. Out: another, of one graph.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from aim_surgery.capture import ExampleInputs, Inputs
from aim_surgery.capture.copies import deep_copy
from aim_surgery.errors import AimSurgeryError, MissingInputsError, in_one_line
from aim_surgery.lowering.fold_graph import FoldWriter
from aim_surgery.lowering.fold_hooks import fold_hooks
from aim_surgery.lowering.fold_norms import fold_batch_norms
from aim_surgery.lowering.fold_rules import rule_of
from aim_surgery.lowering.fold_sums import add_products
from aim_surgery.lowering.fold_watch import Watched, watch
from aim_surgery.lowering.forms import take_apart
from aim_surgery.lowering.resizing import resize_where_needed
from aim_surgery.nn.aim_modules import AimModules, aim_of, operated_in, plan_of, set_result
from aim_surgery.nn.eager import autocast_off
from aim_surgery.nn.folded import Maps
from aim_surgery.nn.graph_module import AimGraphModule, graphs_of, use_graph
from aim_surgery.nn.inside import AddMemory
from aim_surgery.nn.pointwise import use_matrices
from aim_surgery.nn.recurrent import GateMemory
from aim_surgery.nn.shifted_bias import ShiftedBias
from aim_surgery.nn.spatial import CHANNELS_LAST
from aim_surgery.planning import Plan, inputs_of_plan
from aim_surgery.sites.calls import CONV_FUNCTIONS
from aim_surgery.surgery.modules import AIM
from aim_surgery.surgery.notes import noted_sites
from aim_surgery.surgery.outputs import drawn_anew, floating_dtype
from aim_surgery.surgery.pieces import pieces_of

_Model = TypeVar("_Model", bound=nn.Module)


def fold(gm: _Model, example_inputs: Inputs | None = None, *, batch_norm: bool = False) -> _Model:
    """Fold constant memory away, for inference.

    The result computes what `gm` computes in evaluation mode. Layers of the base keep their names
    and the shapes that they had before the operation (a bias may be new); maps are buffers under
    `aim.maps`. It is never trained again: its parameters ask for no gradients, and a `GraphModule`
    stays in evaluation mode whatever `train` says.

    Args:
        gm: An operated model in evaluation mode, in any form; left unchanged.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments, of
            the sizes that are worked with most: maps of these sizes are stored, those of others
            are computed when they first come, and a few remembered. By default the sizes that
            `gm` was operated with.
        batch_norm: Whether batch norms that follow a convolution are merged into it as well.

    Returns:
        A new model that shares nothing with `gm`: a `GraphModule`, or one of the same class where
        `gm` kept it. What still reads the memory, and why, stands in its attribute `notes`.

    Raises:
        MissingInputsError: Its plan holds no example inputs, or the model takes no noise of their
            sizes: pass `example_inputs`.
        AimSurgeryError: The model was not operated, is in training mode or folded already.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from aim_surgery import transform
        >>> gm = transform(nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)))
        >>> folded = fold(gm.eval())
        >>> folded.get_submodule("0").weight.shape, folded(torch.zeros(5, 3, 32, 32)).shape
        (torch.Size([64, 3, 3, 3]), torch.Size([5, 64, 28, 28]))
    """
    inner = operated_in(gm)
    if inner.training:
        raise AimSurgeryError(
            "fold is for inference, and this model is in training mode: call gm.eval() first"
        )
    with torch.inference_mode(False), autocast_off(inner):
        twin: Any = deep_copy(inner)
        take_apart(twin, "it is folded")
        notes = fold_hooks(twin)
        if isinstance(twin, AimGraphModule):
            notes = (*notes, *_fold_graph(twin, example_inputs, batch_norm=batch_norm))
        _finish(twin, notes)
        aim_of(twin).plan = plan_of(inner)
    return cast(_Model, twin)


def _fold_graph(
    twin: AimGraphModule, example_inputs: Inputs | None, *, batch_norm: bool
) -> tuple[str, ...]:
    graph = graphs_of(twin)[-1]
    use_graph(twin, graph)
    _save_work(graph)
    if batch_norm:
        fold_batch_norms(graph, twin)
    inputs, watched = _watched(twin, graph, example_inputs)
    aim = twin.get_submodule(AIM)
    name = "maps"
    while name in aim._modules:
        name += "_"
    writer = FoldWriter(twin, graph, watched, rule_of, f"{AIM}.{name}")
    folded = writer.write()
    recipe = _recipe(writer)
    if writer.maps or writer.biases:
        aim.add_module(name, _maps(twin, writer, recipe, inputs))
    _look_up(writer, f"{AIM}.{name}", sized=recipe is not None)
    _erase_unused(writer)
    add_products(folded, twin)
    for path in {str(node.target) for node in folded.nodes if node.op == "call_module"}:
        use_matrices(twin.get_submodule(path))
    folded.lint()
    use_graph(twin, folded)
    return _unfolded(writer)


def _save_work(graph: fx.Graph) -> None:
    """What `split` does for sums and views; some will stay."""
    for pieces in pieces_of(graph, {}):
        node, total = pieces.node, pieces.total()
        if node.op == "call_module" or node.target is F.linear or node.target in CONV_FUNCTIONS:
            total.target = operator.iadd
        resize_where_needed(pieces.view)


def _watched(
    twin: AimGraphModule, graph: fx.Graph, example_inputs: Inputs | None
) -> tuple[tuple[Any, ...], Watched]:
    """Run on the example; without one, on noise of the sizes and, if need be, another dtype."""
    if example_inputs is not None:
        inputs = _bound(graph, ExampleInputs.given(example_inputs))
        return inputs, watch(graph, twin, inputs)
    plan: Plan = twin.plan
    example = inputs_of_plan(plan.inputs, twin)
    if example is None:
        raise MissingInputsError(
            "this model's example inputs hold objects that its plan can't store: pass "
            "example_inputs to fold"
        )
    inputs = drawn_anew(_bound(graph, example), None)
    try:
        return inputs, watch(graph, twin, inputs)
    except (AssertionError, RuntimeError, TypeError, ValueError):  # it may have another dtype now
        inputs = drawn_anew(inputs, floating_dtype(twin))
    try:
        return inputs, watch(graph, twin, inputs)
    except Exception as err:
        raise MissingInputsError(
            "the model does not take noise of its example's sizes; pass example_inputs to fold "
            f"({in_one_line(err)})"
        ) from err


def _bound(graph: fx.Graph, inputs: ExampleInputs) -> tuple[Any, ...]:
    """One value for each placeholder."""
    values = [*inputs.args]
    kwargs = dict(inputs.kwargs)
    for node in [n for n in graph.nodes if n.op == "placeholder"][len(values) :]:
        if node.target in kwargs:
            values.append(kwargs.pop(node.target))
        elif node.args:
            values.append(node.args[0])
        else:
            raise AimSurgeryError(f"example_inputs: there is no value for {node.target}")
    if kwargs:
        raise AimSurgeryError(f"example_inputs: the model takes no {', '.join(kwargs)}")
    return tuple(values)


# Maps ---------------------------------------------------------------------------------------


def _recipe(writer: FoldWriter) -> fx.Graph | None:
    """What computes the maps that depend on sizes, from the inputs."""
    sized = [made.part.node for made in writer.maps if made.part.node is not None]
    if not sized:
        return None
    recipe, copied = fx.Graph(), {}
    recipe.graph_copy(writer.graph, copied)
    recipe.output(tuple(copied[node] for node in sized))
    for node in reversed(recipe.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            recipe.erase_node(node)
    return recipe


def _maps(
    twin: AimGraphModule, writer: FoldWriter, recipe: fx.Graph | None, inputs: tuple[Any, ...]
) -> Maps:
    tensors = {}
    for made in writer.maps:
        value = made.part.value
        layout = torch.contiguous_format
        if made.channels_last:
            layout = CHANNELS_LAST[value.ndim - 2]
        tensors[f"at_{made.name}"] = value.detach().clone(memory_format=layout)
    used = {str(n.target) for n in recipe.nodes if n.op == "get_attr"} if recipe else set()
    given = {
        path.rpartition(".")[2]: value for path, value in writer.parts.given.items() if path in used
    }
    plan: Plan = twin.plan
    batched = all(read.site.sample_axis == 0 for read in plan.reads if not read.site.inside)
    sized = [index for index, made in enumerate(writer.maps) if made.part.node is not None]
    maps = Maps(tensors, sized, recipe, given, _shell(twin), inputs, batched=batched)
    maps.biases = nn.Module()
    for path, value in writer.biases.items():
        maps.biases.register_buffer(path.rpartition(".")[2], value)
    return maps


def _shell(twin: AimGraphModule) -> nn.Module:
    """A module that holds, for good, what the model holds: they share their dictionaries."""
    shell = nn.Module()
    for name in ("_parameters", "_buffers", "_modules"):
        vars(shell)[name] = vars(twin)[name]
    own = {k: v for k, v in vars(twin).items() if isinstance(v, Tensor)}
    vars(shell).update(own)
    return shell.eval()


def _look_up(writer: FoldWriter, path: str, *, sized: bool) -> None:
    """Take maps from where they are stored, instead of computing them in place."""
    first = next((node for node in writer.graph.nodes if node in writer.mapped), None)
    if first is None:
        return
    inputs = [node for node in writer.graph.nodes if node.op == "placeholder"] if sized else []
    with writer.graph.inserting_before(first):
        maps = writer.graph.call_module(path, tuple(inputs))
    for node, places in writer.mapped.items():
        at = next(i for i, argument in enumerate(node.args) if isinstance(argument, tuple))
        rest = node.args[at + 1 + len(places) :]
        node.args = (*node.args[:at], maps, *places, *rest)


def _erase_unused(writer: FoldWriter) -> None:
    """Erase what was written for maps alone."""
    for node in reversed(writer.graph.nodes):
        if node.users or node.op in ("placeholder", "output"):
            continue
        original = writer.copies.get(node)
        had_users = original is not None and bool(original.users)
        if node in writer.parts.made or had_users:
            writer.graph.erase_node(node)


# The rest -----------------------------------------------------------------------------------


def _unfolded(writer: FoldWriter) -> tuple[str, ...]:
    """The sites whose memory is no constant."""
    notes = []
    nodes = {node.name: node for node in writer.source.nodes}
    for _, note in noted_sites(writer.source):
        if nodes[note.beside] not in writer.aside:
            notes.append(f"{note.site}: reads what each sample wrote, which is no constant")
    return tuple(notes)


def _finish(twin: nn.Module, notes: tuple[str, ...]) -> None:
    """Drop what nobody reads any more, and keep the rest as it is."""
    aim = aim_of(twin)
    _drop_unused(twin, aim)
    aim.form = "folded"
    twin.eval()
    twin.requires_grad_(False)
    set_result(twin, "notes", notes)
    if isinstance(twin, AimGraphModule):
        kept = tuple(name for name, module in twin.named_modules() if not module.training)
        twin.contrary = {True: kept, False: twin.contrary[False]}


def _drop_unused(twin: nn.Module, aim: AimModules) -> None:
    """Drop memories, weights and update blocks under `aim` that neither graph nor hook needs."""
    used = {id(module) for hook in _hooks(twin) for module in _modules_of(hook)}
    graphs = [*graphs_of(twin)]
    for module in aim.children():
        if isinstance(module, Maps) and module.recipe is not None:
            graphs.append(module.recipe)
    for node in (node for graph in graphs for node in graph.nodes):
        if node.op in ("call_module", "get_attr"):
            path = str(node.target) if node.op == "call_module" else node.target.rpartition(".")[0]
            used.add(id(twin.get_submodule(path)))
    used |= {id(m) for module in aim.modules() if id(module) in used for m in module.modules()}
    _prune(aim, used)


def _hooks(root: nn.Module) -> Iterator[Any]:
    for module in root.modules():
        yield from module._forward_hooks.values()
        yield vars(module).get("forward")


def _modules_of(hook: Any) -> Iterator[nn.Module]:
    if isinstance(hook, AddMemory):
        yield from (hook.view.memory, hook.beside)
    if isinstance(hook, ShiftedBias):
        yield hook.shift
    if isinstance(hook, GateMemory):
        for view, beside in hook.reads.values():
            yield from (view.memory, beside)


def _prune(module: nn.Module, used: set[int]) -> bool:
    """Drop children that are not used; whether any is left."""
    for name, child in [*module.named_children()]:
        if not _prune(child, used) and id(child) not in used:
            del module._modules[name]
    return bool(module._modules)
