"""Coverage: an audit of which weights read the memory, by what the kernels are really given.

The original runs under a dispatch mode that sees every ATen kernel. Each storage is followed from
where it comes from: parameters, constants, or the inputs (an *activation*). A product

    y = x · W,   x an activation, W made of parameters and constants only

uses the parameters that W is made of; each of them must read the memory or be listed as left out.
So do those that the weight of a convolution is made of together with an input; of other products,
the kernel does not tell the weight from the input then.
Where a read is claimed that no widened shape shows and no graph (inside a Python call, a recurrent
layer), the operated model runs likewise, and W_m's product has to meet an activation in a kernel.
Nothing here knows of graphs or sites: what `aim_surgery.sites` overlooks, this file finds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from aim_surgery.capture.copies import random_state_kept
from aim_surgery.errors import AimSurgeryError
from aim_surgery.planning import Plan, Read
from aim_surgery.surgery.modules import READS
from aim_surgery.verification.kernels import CONVOLUTIONS, PACKED, PRODUCTS
from aim_surgery.verification.samples import Samples
from aim_surgery.verification.twins import call, copy_of, set_mode

_BATCH = 2

# Kernels that take nothing but shape and dtype from their tensors, and `torch.tensor(...)`.
_CONSTANTS = frozenset(
    ("new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full",
     "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "lift_fresh")
)  # fmt: skip


@dataclass(frozen=True)
class Coverage:
    """Which weights read the memory.

    Attributes:
        covered: Parameters that are multiplied with activations and read the memory.
        skipped: Those that don't, with the plan's reason.
        unaccounted: Those that neither read nor are listed in the plan, with the kernel's name or
            what is wrong with the operated model.
        notes: What could not be judged.
    """

    covered: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    unaccounted: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every weight is accounted for."""
        return not self.unaccounted

    def __str__(self) -> str:
        used = len(self.covered) + len(self.skipped) + len(self.unaccounted)
        text = f"{len(self.covered)} of {used} weights read the memory"
        if self.skipped:
            text += f", {len(self.skipped)} left out for a reason"
        return f"{text}, {len(self.unaccounted)} unaccounted for" if self.unaccounted else text


def check_coverage(model: nn.Module, gm: nn.Module, plan: Plan, samples: Samples) -> Coverage:
    """Hold what the kernels of the original use against what the plan and the new model say.

    Args:
        model: The original; left unchanged.
        gm: The operated model; left unchanged.
        plan: What was done.
        samples: The inputs.

    Returns:
        Every weight, in one of three lists.

    Raises:
        AimSurgeryError: The original itself does not run on these inputs.
    """
    unseen_reads = any(read.site.inside and not read.site.widens for read in plan.reads)
    with random_state_kept():
        found = _run(copy_of(model), samples)
        seen = _run(copy_of(gm), samples) if unseen_reads else None
    if len(found.refusals) == 2:
        raise AimSurgeryError(
            f"the original model does not run on the example inputs ({samples.describe()}): "
            f"{found.refusals[0]}. Pass example_inputs that it accepts"
        )
    used, perhaps, notes = found.used, found.perhaps, [*found.notes]
    operated = dict(gm.named_parameters(remove_duplicate=False))
    original = dict(model.named_parameters(remove_duplicate=False))
    reads: dict[str, list[Read]] = {}
    for read in plan.reads:
        for name in read.site.weights:
            reads.setdefault(name, []).append(read)
    reasons = {name: skip.reason for skip in plan.skips for name in skip.weights}
    tied = _tied_names(model)
    covered, skipped, unaccounted = [], [], []
    for name, kernel in used.items():
        names = tied[name]
        mine = {read.site.name: read for n in names for read in reads.get(n, ())}.values()
        reason = next((reasons[n] for n in names if n in reasons), None)
        if mine:
            faults = (_fault(read, original, operated, seen) for read in mine)
            fault = next(filter(None, faults), "")
            (unaccounted if fault else covered).append((name, fault))
        elif reason is not None:
            skipped.append((name, reason))
        else:
            unaccounted.append((name, f"is used by {kernel}, and the plan does not mention it"))
    known = reads.keys() | reasons.keys()
    for name, kernel in perhaps.items():
        if name not in used and known.isdisjoint(tied[name]):
            notes.append(f"{name} reaches {kernel} through another weight: taken for an input")
    unseen = _unseen(plan, used.keys() | perhaps.keys(), tied)
    if unseen:
        notes.append(f"not seen in use: {', '.join(unseen[:5])}{' …' if len(unseen) > 5 else ''}")
    return Coverage(
        tuple(name for name, _ in covered), tuple(skipped), tuple(unaccounted), tuple(notes)
    )


def _fault(
    read: Read,
    original: Mapping[str, torch.Tensor],
    operated: Mapping[str, torch.Tensor],
    seen: _Found | None,
) -> str:
    """Why a claimed read is none, "" if it is one."""
    site = read.site
    if not site.widens:
        name = f"{READS}.{site.layer}.weight"
        if name not in operated:
            return f"has no memory weights: {name} is missing"
        if site.inside and seen is not None and name not in seen.met:
            if len(seen.refusals) == 2:
                return f"can't be judged: the operated model does not run: {seen.refusals[0]}"
            return f"has memory weights that reach no activation: {name}"
        return ""
    name = site.weights[0]
    if name not in operated or name not in original:
        return "is missing"
    expected = list(original[name].shape)
    if site.kind == "conv_transpose":
        expected[0] += site.groups * read.planes
    else:
        expected[1] += read.planes
    shape = list(operated[name].shape)
    return "" if shape == expected else f"should be widened to {expected}, has shape {shape}"


def _unseen(plan: Plan, seen: Iterable[str], tied: Mapping[str, tuple[str, ...]]) -> list[str]:
    names = {other for name in seen for other in tied[name]}
    layers = {read.site.layer: read.site.weights for read in plan.reads}
    return [layer for layer, weights in layers.items() if names.isdisjoint(weights)]


def _tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """All names of the parameter that a name stands for."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(group) for group in names.values() for name in group}


@dataclass
class _Found:
    """What runs in both modes showed: kernels by the parameter that they are given.

    Attributes:
        used: Parameters that are multiplied with activations.
        perhaps: Those that enter as the input of such a weight's product.
        met: Those whose products, or they themselves, meet an activation in a kernel.
        refusals: Why it did not run, by mode.
        notes: What could not be seen.
    """

    used: dict[str, str] = field(default_factory=dict)
    perhaps: dict[str, str] = field(default_factory=dict)
    met: dict[str, str] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _run(model: nn.Module, samples: Samples) -> _Found:
    """Run a model in both modes and see what its kernels are given."""
    found = _Found()
    for training in (False, True):
        set_mode(model, training)
        refusal = ""
        few = samples.take(min(samples.batch, _BATCH))
        for grad, inputs in ((False, few), (False, samples), (True, few), (True, samples)):
            watch = _Watch(model, inputs)
            try:
                with torch.set_grad_enabled(grad), watch:  # it may take derivatives in its forward
                    call(model, inputs)
            except Exception as err:
                refusal = f"{type(err).__name__}: {err}"
                continue
            found.used |= watch.used
            found.perhaps |= watch.perhaps
            found.met |= watch.met
            refusal = ""
            break
        if refusal:
            found.refusals.append(refusal)
            mode = "training" if training else "evaluation"
            found.notes.append(f"the audit saw no run in {mode} mode: {refusal.splitlines()[0]}")
    return found


# Following storages -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Origin:
    """Where a value comes from.

    Attributes:
        activation: Whether it depends on an input.
        weights: The parameters that it is made of, if it doesn't.
        perhaps: Parameters that entered as the input of another weight's product.
        mixed: Parameters that an activation was made of, too, since its last product (scaled by the
            input, picked by it).
    """

    activation: bool = False
    weights: frozenset[str] = frozenset()
    perhaps: frozenset[str] = frozenset()
    mixed: frozenset[str] = frozenset()


_CONSTANT = _Origin()
_ACTIVATION = _Origin(activation=True)


def _merged(origins: Iterable[_Origin]) -> _Origin:
    origins = tuple(origins)
    if any(origin.activation for origin in origins):
        names = (origin.weights | origin.mixed for origin in origins)
        return _Origin(activation=True, mixed=frozenset[str]().union(*names))
    weights = frozenset[str]().union(*(origin.weights for origin in origins))
    perhaps = frozenset[str]().union(*(origin.perhaps for origin in origins))
    return _Origin(False, weights, perhaps - weights)


class _Watch(TorchDispatchMode):
    """Sees each kernel; follows where storages come from and notes which weights are used."""

    def __init__(self, model: nn.Module, samples: Samples) -> None:
        super().__init__()
        self.used: dict[str, str] = {}
        self.perhaps: dict[str, str] = {}
        self.met: dict[str, str] = {}
        self._matrices = {n for n, p in model.named_parameters() if p.ndim >= 2}
        self._parameters: dict[int, list[tuple[int, int, str]]] = {}
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() or parameter.is_complex():
                entry = (*_span(parameter), name)
                self._parameters.setdefault(_storage(parameter), []).append(entry)
        self._origins = {_storage(buffer): _CONSTANT for buffer in model.buffers()}
        self._origins |= {
            _storage(t): _ACTIVATION for t in _tensors((samples.args, samples.kwargs))
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        namespace, _, name = func._schema.name.partition("::")
        arguments = _arguments(func, args, kwargs)
        tensors = _tensors(list(arguments.values()))
        origin = self._origin_of_result(namespace, name, list(arguments.values()), tensors)
        inputs = {_storage(tensor) for tensor in tensors}
        for tensor in _written(func, arguments):
            self._origins[_storage(tensor)] = _merged((origin, self._origin_of(tensor)))
        for tensor in _tensors(result):
            key = _storage(tensor)
            if key not in inputs or name == "lift_fresh":  # a view stays what its base is
                self._origins[key] = origin
        return result

    def _origin_of_result(
        self, namespace: str, name: str, arguments: list[Any], tensors: list[torch.Tensor]
    ) -> _Origin:
        if name in _CONSTANTS:
            return _CONSTANT
        origins = [self._origin_of(tensor) for tensor in tensors]
        if any(origin.activation for origin in origins):
            for weight in frozenset[str]().union(*(origin.weights for origin in origins)):
                self.met.setdefault(weight, name)
        operands = PRODUCTS.get(name)
        if operands is not None:
            values = _tensors([arguments[i] for i in operands if i < len(arguments)])
            product = self._product(name, [self._origin_of(value) for value in values])
            added = [t for t in tensors if not any(t is value for value in values)]
            return _merged((product, *map(self._origin_of, added)))
        opaque = name in PACKED or not namespace.startswith(("aten", "prim"))
        if opaque and any(origin.activation for origin in origins):
            return self._product(name, origins)
        return _merged(origins)

    def _product(self, kernel: str, operands: list[_Origin]) -> _Origin:
        """Note the weights of a product; say what its result is made of."""
        if any(origin.activation for origin in operands):
            for origin in operands:
                self._note(origin, kernel)
            if kernel in CONVOLUTIONS:
                self._note(_Origin(weights=operands[1].mixed), kernel)
            return _ACTIVATION
        *inputs, weight = operands
        self._note(weight, kernel)
        constant = _merged(inputs)
        perhaps = constant.weights | constant.perhaps | weight.perhaps
        return _Origin(False, weight.weights, perhaps - weight.weights)

    def _note(self, origin: _Origin, kernel: str) -> None:
        for name in sorted(origin.weights & self._matrices):
            self.used.setdefault(name, kernel)
        for name in sorted(origin.perhaps & self._matrices):
            self.perhaps.setdefault(name, kernel)

    def _origin_of(self, tensor: torch.Tensor) -> _Origin:
        key = _storage(tensor)
        if key in self._parameters:  # by place, as parameters can share a storage
            start, end = _span(tensor)
            names = (name for a, b, name in self._parameters[key] if a < end and start < b)
            return _Origin(weights=frozenset(names))
        return self._origins.get(key, _CONSTANT)


def _arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, in the order of the schema; those left at a default are not in it."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    return {name: given.get(name) for name in names}


def _written(func: Any, arguments: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that a kernel writes into."""
    infos = {argument.name: argument.alias_info for argument in func._schema.arguments}
    return _tensors([v for name, v in arguments.items() if infos[name] and infos[name].is_write])


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and other layouts have none
        return id(tensor)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last byte of a tensor within its storage."""
    if not tensor.numel():
        return 0, 0
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((int(size) - 1) * int(stride) for size, stride in sizes)
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + (last + 1) * tensor.element_size()
