"""Forms of an operated model: how a site's arithmetic is written. `lower(gm, form)`.

concat    conv(cat[x, m], [W_x ; W_m])      what `transform` emits, the article's
split     conv(x, W_x) + conv(m, W_m)       the same parameters, less work

Goes in: an operated model in either form. Comes out: another one, in the form asked for, with the
same parameters under the same names. It is one pass over each graph, linear in nodes.
"""

from __future__ import annotations

from typing import Any, TypeVar, get_args

from torch import nn

from aim_surgery.capture.copies import deep_copy
from aim_surgery.config import Form
from aim_surgery.errors import AimSurgeryError
from aim_surgery.lowering.inside import change_hooks
from aim_surgery.lowering.join import join_sites
from aim_surgery.lowering.split import split_sites
from aim_surgery.nn.aim_modules import aim_of, operated_in, plan_of
from aim_surgery.nn.graph_module import AimGraphModule, graphs_of
from aim_surgery.surgery.separate import separate

_Model = TypeVar("_Model", bound=nn.Module)


def lower(gm: _Model, form: Form) -> _Model:
    """Write an operated model in another form.

    Both forms are one function of the same parameters, in training and in evaluation; "split"
    does less work. Models of a class of their own (`emit="module"`) are taken, too. Layers whose
    memory weights live beside them (of a frozen base; shared, quantized or packed ones) are apart
    in either form, and stay as they are. In split form, widened layers are not called, so what is
    put on them (hooks, pruning) has no effect there.

    Args:
        gm: An operated model; left unchanged.
        form: "concat" or "split".

    Returns:
        A new model that shares its parameters and buffers with `gm`: an optimizer made for one
        trains both, and their state dicts have the same keys. Convert and move first, lower then:
        `to`, `half` or `cuda` give the one they are called on buffers of its own.

    Raises:
        AimSurgeryError: The model was not operated, there is no such form, or the graph was changed
            since, so that a site's pieces are no longer in it.

    Example:
        >>> from torch import nn
        >>> from aim_surgery import transform
        >>> gm = transform(nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)))
        >>> lower(gm, "split").aim.form
        'split'
    """
    twin: Any = _sharing(operated_in(gm))
    rewrite_as(twin, form)
    return twin


def rewrite_as(gm: nn.Module, form: Form) -> bool:
    """Write an operated model in another form, in place.

    Args:
        gm: An operated model; graphs and hooks change, its parameters don't.
        form: "concat" or "split".

    Returns:
        Whether anything had to be changed.

    Raises:
        AimSurgeryError: See `lower`.
    """
    check_form(form)
    plan = plan_of(gm)
    reads = {read.site.name: read for read in plan.reads if read.site.widens}
    modified = change_hooks(gm, form)
    for graph in graphs_of(gm):
        split = form == "split"
        changed = split_sites(graph, gm, reads) if split else join_sites(graph, plan, reads)
        modified = changed or modified
        graph.lint()
    if isinstance(gm, AimGraphModule) and modified:
        gm.recompile()
    aim_of(gm).form = form
    return modified


def take_apart(gm: nn.Module, why: str) -> None:
    """Give each widened layer its own weight back, in whatever form the model is.

    Args:
        gm: An operated model; changed in place, and of form "concat" afterwards.
        why: See `separate`.

    Raises:
        AimSurgeryError: See `separate`; the model is as it was.
    """
    form = form_of(gm)
    rewrite_as(gm, "concat")
    try:
        separate(gm, why)
    except AimSurgeryError:
        rewrite_as(gm, form)
        raise


def check_form(form: object) -> None:
    """Raise an `AimSurgeryError` where there is no such form to lower to."""
    if form not in get_args(Form):
        raise AimSurgeryError(f"form must be 'concat' or 'split', got {form!r}")


def form_of(gm: nn.Module) -> Form:
    """The form of an operated model."""
    return aim_of(gm).form  # type: ignore[return-value]


def _sharing(gm: nn.Module) -> nn.Module:
    """A copy with modules of its own and the same tensors."""
    tensors = {id(tensor): tensor for tensor in (*gm.parameters(), *gm.buffers())}
    return deep_copy(gm, tensors)
