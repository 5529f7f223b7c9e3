"""Gradients: training reaches all that is new.

With W_m = 0, the first step moves W_m (its gradient is made of the memory's values) and not yet the
memory (its gradient is made of W_m); the second moves both. So two steps are taken on a copy, and
every new tensor has to get a gradient in one of them, finite in both.

A product that only chooses (the nearest entry of a codebook) passes no gradient on, and
what is added to it gets none either, though its weight may get one elsewhere: that is noted.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from aim_surgery.capture.copies import random_state_kept
from aim_surgery.capture.nested import named_leaves
from aim_surgery.errors import AimSurgeryError, in_one_line, listed
from aim_surgery.nn.graph_state import NOTE
from aim_surgery.planning import Plan, Read
from aim_surgery.surgery.modules import READS, WRITES, memory_path
from aim_surgery.surgery.notes import SiteNote
from aim_surgery.verification.samples import Samples
from aim_surgery.verification.twins import call, copy_of, own_dtype, split_entries

_BATCH = 2
_STEPS = 2
_STEP_SIZE = 0.01  # change of a parameter in one step, as a share of its own size
_LEAST_SIZE = 0.01  # the size that a parameter of zeros counts as
_ROUNDING = 1e-9  # a gradient below this share of its layer's is what rounding left


@dataclass(frozen=True)
class Gradients:
    """What two training steps reached.

    Attributes:
        mode: The mode they ran in, "training" or "evaluation"; "" where they could not run.
        reached: New tensors that got a gradient.
        unreached: New tensors that got none while their layer did, or a non-finite one; with what
            is wrong.
        memory: Share of the memory's floats that got a gradient.
        notes: What could not be judged.
    """

    mode: str
    reached: tuple[str, ...]
    unreached: tuple[tuple[str, str], ...]
    memory: float
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether gradients are finite and reach every new tensor."""
        return not self.unreached

    def __str__(self) -> str:
        if not self.mode:
            return "no step could be taken"
        return (
            f"two steps in {self.mode} mode reach {len(self.reached)} of "
            f"{len(self.reached) + len(self.unreached)} new tensors and "
            f"{self.memory:.1%} of the memory's floats"
        )


def check_gradients(model: nn.Module, gm: nn.Module, plan: Plan, samples: Samples) -> Gradients:
    """Take two training steps on a copy and see where gradients arrive.

    Args:
        model: The original; left unchanged.
        gm: The operated model; left unchanged.
        plan: What was done; tells original from new entries.
        samples: The inputs.

    Returns:
        What was reached, in training mode or, if the model doesn't run there, in evaluation mode;
        nothing where the original's own outputs have no gradient.
    """
    refusals: list[str] = []
    own = own_dtype(gm)
    small = samples.take(min(samples.batch, _BATCH))
    # where the first axis of some input is not the batch (a mask), a small batch does not fit
    batches = (small, samples) if small is not samples else (samples,)
    with random_state_kept(), torch.enable_grad():
        for dtype in dict.fromkeys((torch.float64, own)):
            twin = copy_of(gm, None if dtype == own else dtype)
            inputs = batches
            if dtype != own:
                both = itertools.product(batches, (False, True))
                inputs = tuple(batch.to(dtype, first_only=first) for batch, first in both)
            for training, batch in itertools.product((True, False), inputs):
                steps = _Steps(twin, plan)
                try:
                    twin.train(training)
                    steps.run(batch)
                except Exception as err:
                    twin.zero_grad(set_to_none=True)
                    refusals.append(in_one_line(err))
                    continue
                if dtype != own and steps.broken:
                    refusals.append(steps.broken[0])
                    break
                mode = "training" if training else "evaluation"
                result = steps.result(mode, _why(refusals, mode, dtype))
                return _without_dead_ends(result, twin, plan, batch)
            del twin
        if _passes_none(model, samples):
            note = "no output of the original has a gradient, so none of the operated model's has"
            return Gradients("", (), (), 0.0, (note,))
    return Gradients("", (), (("the operated model", f"does not train: {refusals[0]}"),), 0.0)


def _passes_none(model: nn.Module, samples: Samples) -> bool:
    """Whether no output of a model has a gradient, even if all of it is trained (an argmax)."""
    twin = copy_of(model)
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    try:
        leaves = named_leaves(call(twin, samples)).values()
    except Exception:
        return False
    return not any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves)


def _without_dead_ends(
    result: Gradients, twin: nn.Module, plan: Plan, samples: Samples
) -> Gradients:
    """Take out of the unreached what is added to products that pass no gradient on."""
    if not result.unreached or not isinstance(twin, fx.GraphModule):
        return result
    watch = _Products(twin)
    try:
        _distance_to_noise(call(watch, samples), seed=0).backward()
    except Exception:
        return result
    finally:
        twin.zero_grad(set_to_none=True)
    sites: dict[str, list[str]] = {}
    for read in plan.reads:
        if not read.site.widens and not read.site.inside:
            sites.setdefault(f"{READS}.{read.site.layer}.weight", []).append(read.site.name)
    dead = [
        name
        for name, _ in result.unreached
        if name in sites
        and watch.met.issuperset(sites[name])
        and watch.live.isdisjoint(sites[name])
    ]
    if not dead:
        return result
    left = tuple(item for item in result.unreached if item[0] not in dead)
    note = f"what they are added to passes no gradient on: {listed(dead, 4)}"
    return replace(result, unreached=left, notes=(*result.notes, note))


class _Products(nn.Module):
    """Runs an emitted graph node by node, and sees which sites' own products get gradients."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__()
        self._gm = gm
        self.met: set[str] = set()
        self.live: set[str] = set()

    def forward(self, *args: object, **kwargs: object) -> object:
        """Call it as the model is called."""
        inputs = [node for node in self._gm.graph.nodes if node.op == "placeholder"]
        given = dict(zip((str(node.target) for node in inputs), args, strict=False)) | kwargs
        defaults = {str(node.target): node.args[0] for node in inputs if node.args}
        values = {**defaults, **given}
        return _Run(self).run(*(values[str(node.target)] for node in inputs))


class _Run(fx.Interpreter):
    def __init__(self, products: _Products) -> None:
        super().__init__(products._gm)
        self._products = products

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        note = n.meta.get(NOTE)
        if isinstance(note, SiteNote) and isinstance(result, torch.Tensor):
            self._products.met.add(note.site)
            if result.requires_grad:
                result.register_hook(functools.partial(self._see, note.site))
        return result

    def _see(self, site: str, gradient: torch.Tensor) -> None:
        if bool((gradient != 0).any()):
            self._products.live.add(site)


def _why(refusals: list[str], mode: str, dtype: torch.dtype) -> list[str]:
    """Why the steps were not taken in training mode, in float64, or with a small batch."""
    if not refusals:
        return []
    if mode != "training":
        return [f"no step in training mode: {refusals[0]}"]
    if dtype != torch.float64:
        own = str(dtype).removeprefix("torch.")
        return [f"steps taken in {own}, not in float64: {refusals[0]}"]
    return [f"steps taken with the whole batch: {refusals[0]}"]


@dataclass
class _Seen:
    """What one parameter's gradients were, if any came."""

    came: bool = False
    finite: bool = True
    new: float = 0.0
    old: float = 0.0


class _Steps:
    """Two steps; each parameter is moved, and its gradient let go, as soon as that is complete."""

    def __init__(self, twin: nn.Module, plan: Plan) -> None:
        self._twin, self._plan = twin, plan
        self._widened = {
            name: read for read in plan.reads if read.site.widens for name in read.site.weights
        }
        self._seen: dict[str, _Seen] = {}
        memory = plan.memory
        self._memory = f"{memory_path(memory.name)}."
        self._floats = torch.zeros(memory.floats // memory.shared, dtype=torch.bool, device="cpu")

    def run(self, samples: Samples) -> None:
        handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(name))
            for name, parameter in self._twin.named_parameters()
            if parameter.requires_grad and parameter.is_leaf
        ]
        try:
            for step in range(_STEPS):
                _distance_to_noise(call(self._twin, samples), seed=step).backward()
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[torch.Tensor], None]:
        seen = self._seen.setdefault(name, _Seen())
        read = self._widened.get(name)

        def take(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                return
            old, new = _parts(gradient, read)
            seen.came = True
            seen.finite &= bool(gradient.isfinite().all())
            seen.new = max(seen.new, _largest(new))
            seen.old = max(seen.old, _largest(old))
            if name.startswith(self._memory):
                self._floats |= (gradient != 0).reshape(len(self._floats), -1).any(1).cpu()
            _step(parameter, gradient)

        return take

    def _cancels(self, weight: str) -> bool:
        """Whether nothing reaches a layer's own bias either, exactly: of |f(a) - f(b)|."""
        bias = self._seen.get(f"{weight.rpartition('.')[0]}.bias")
        return bias is not None and bias.came and not bias.old and not bias.new

    def result(self, mode: str, refusals: list[str]) -> Gradients:
        notes = list(refusals)
        reached, unreached, idle, cancelled = [], [], [], []
        unread = self._unread_writes()
        for name, original in self._new_tensors():
            seen = self._seen.get(name)
            if seen is None:
                notes.append(f"{name} is frozen")
                continue
            layer = self._seen.get(original, _Seen()).old
            if not seen.finite:
                unreached.append((name, "gets a gradient that is not finite"))
            elif seen.new:
                reached.append(name)
                if seen.new < _ROUNDING * layer:
                    cancelled.append(name)
            elif layer and self._cancels(original):
                cancelled.append(name)
            elif layer or not (original or name.startswith(unread)):
                part = "the memory's part of it" if name == original else "it"
                unreached.append((name, f"no gradient reaches {part}"))
            else:
                idle.append(name)
        if idle:
            notes.append(f"without gradient, as their layers in {mode} mode: {listed(idle, 4)}")
        if cancelled:
            notes.append(
                f"only rounding, if that, reaches them in {mode} mode (norms, softmax and "
                f"differences take away what all samples or positions share): "
                f"{listed(cancelled, 4)}"
            )
        notes += self.broken
        share = float(self._floats.double().mean())
        return Gradients(mode, tuple(reached), tuple(unreached), share, tuple(notes))

    def _unread_writes(self) -> tuple[str, ...]:
        """Where the blocks lie after which no read is in a layer that got a gradient itself.

        A frozen layer gets none, and passes on what it gets: it counts as if it did.
        """
        live = [
            read
            for read in self._plan.reads
            if any(name not in self._seen or self._seen[name].old for name in read.site.weights)
        ]
        return tuple(
            f"{WRITES}.{write.name}."
            for write in self._plan.writes
            if not any(r.memory == write.memory and r.version >= write.version for r in live)
        )

    def _new_tensors(self) -> Iterator[tuple[str, str]]:
        """Every new tensor, with the original weight whose layer it serves ("" for the memory)."""
        names = dict(self._twin.named_parameters(remove_duplicate=False))
        beside = {
            f"{READS}.{read.site.layer}.weight": read.site.weights[0]
            for read in self._plan.reads
            if not read.site.widens
        }
        for name in names:
            if name.startswith("aim."):
                yield name, beside.get(name, "")
            elif name in self._widened:
                yield name, name

    @property
    def broken(self) -> list[str]:
        """The original's own gradients that are not finite."""
        new = {name for name, _ in self._new_tensors()}
        bad = [name for name, seen in self._seen.items() if not seen.finite and name not in new]
        return [f"gradients that are not finite: {listed(bad, 4)}"] if bad else []


def _parts(gradient: torch.Tensor, read: Read | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Original and new entries of a gradient; a tensor that is all of one kind is both."""
    if read is None:
        return gradient, gradient
    return split_entries(gradient, read)


@torch.no_grad()
def _step(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
    """Move a parameter against its gradient, by a fixed share of the parameter's own size."""
    norm = float(gradient.norm())
    if norm > 0 and norm < float("inf"):
        size = max(float(parameter.norm()), _LEAST_SIZE * parameter.numel() ** 0.5)
        # not through the parameter itself: backward may still hold it for a use without gradient
        parameter.data.sub_(gradient, alpha=_STEP_SIZE * size / norm)


def _distance_to_noise(output: object, *, seed: int) -> torch.Tensor:
    """Mean squared distance of everything that has a gradient to random targets."""
    generator = torch.Generator().manual_seed(seed)
    terms = []
    for value in named_leaves(output).values():
        if isinstance(value, torch.Tensor) and value.requires_grad and value.numel():
            value = torch.view_as_real(value) if value.is_complex() else value
            target = torch.randn(value.shape, generator=generator, device="cpu").to(value)
            distance = torch.where(value.isfinite(), value - target, 0).square().mean()
            terms.append(distance.double())
    if not terms:
        raise AimSurgeryError("no output has a gradient")
    return torch.stack(terms).sum()


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
