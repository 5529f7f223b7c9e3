"""Equivalence: the operated model computes what the original computes.

With W_m = 0, conv(cat[x, m], [W_x ; W_m]) = conv(x, W_x): outputs are the same, and so are the
gradients of every original entry. Both are held against each other in float64, where only the
order of sums can differ, in both modes, for several batches and sizes; outputs once more in the
model's own dtype. A mode is what `train()` and `eval()` of each model make of it, overrides too.
After training, or with init="fresh", the two are different functions, and the check says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from aim_surgery.capture.copies import random_state_kept
from aim_surgery.capture.nested import named_leaves
from aim_surgery.errors import AimSurgeryError
from aim_surgery.planning import Plan
from aim_surgery.verification.comparison import TOLERANCES, Case, Comparison, dtype_name
from aim_surgery.verification.pair import Pair
from aim_surgery.verification.samples import Samples
from aim_surgery.verification.twins import call, copy_of, own_dtype

_REFUSAL = "this input breaks what the graph was captured with"
_PRECISION = ".dtype is torch."
_FAILS, _NAN = "does not run", "gives NaN"
_GRADIENT_BATCH = 2
_OTHER_BATCHES = (3, 1)


@dataclass(frozen=True)
class Equivalence:
    """What came of comparing the original with the operated model.

    Attributes:
        comparisons: One for each mode, batch, size and quantity.
        own: Outputs in the model's own dtype, in evaluation mode.
        notes: What could not be compared, and why.
    """

    comparisons: tuple[Comparison, ...]
    own: Comparison
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything agrees."""
        return not self.offenders

    @property
    def offenders(self) -> tuple[Comparison, ...]:
        """The comparisons that fail."""
        return tuple(found for found in (self.own, *self.comparisons) if not found.ok)

    def largest(self, what: str) -> float | None:
        """The largest relative difference of one quantity, None where it was not compared."""
        found = [item.difference for item in self.comparisons if item.what == what]
        return max(found, default=None)

    def __str__(self) -> str:
        parts = [
            f"{what} {largest:.1e}"
            for what in ("outputs", "gradients", "buffers")
            if (largest := self.largest(what)) is not None
        ]
        cases = len({item.case for item in self.comparisons if item.what == "outputs"})
        dtype = dtype_name(self.comparisons[0].dtype) if self.comparisons else ""
        own = f"outputs {self.own.difference:.1e} in {dtype_name(self.own.dtype)}"
        return f"largest relative difference: {', '.join(parts)} in {dtype} ({cases} cases); {own}"


def check_equivalence(model: nn.Module, gm: nn.Module, plan: Plan, samples: Samples) -> Equivalence:
    """Run both models side by side, on copies.

    Args:
        model: The original; left unchanged.
        gm: The operated model; left unchanged.
        plan: What was done; tells original from new entries.
        samples: The inputs.

    Returns:
        Every comparison that was made.

    Raises:
        AimSurgeryError: The original itself does not run on these inputs.
    """
    with random_state_kept():
        pair = Pair(copy_of(model), copy_of(gm), plan)
        notes: list[str] = []
        own = _compare_own(pair, samples, notes)
        dtype = torch.float64
        del pair  # what a model keeps of the first run is of that run's precision
        pair = Pair(copy_of(model, dtype), copy_of(gm, dtype), plan)
        converted, coarsest, refusal = convert(pair, samples, dtype)
        if refusal == _NAN and own_dtype(model) != dtype and _gives_nan(copy_of(model), samples):
            refusal = ""  # as it does in any type
        who = "original"
        if not refusal and own_dtype(model) != dtype and _is_refused(pair, converted):
            who, refusal = "operated model", "was captured in another precision, and says so"
        if refusal:
            dtype = coarsest = own_dtype(model)
            if dtype != torch.float64:
                notes.append(f"the {who} {refusal} in float64: compared in {dtype_name(dtype)}")
            del pair
            pair = Pair(copy_of(model), copy_of(gm), plan)
        elif coarsest != dtype:
            notes.append(f"the original computes partly in {dtype_name(coarsest)} by itself")
        pair.limits = TOLERANCES[coarsest]
        if dtype == own_dtype(model):
            converted = samples
        comparisons = _run_cases(pair, converted, dtype, notes)
    return Equivalence(tuple(comparisons), own, tuple(notes))


# Cases --------------------------------------------------------------------------------------


def _run_cases(
    pair: Pair, samples: Samples, dtype: torch.dtype, notes: list[str]
) -> list[Comparison]:
    """Gradients on a small batch in both modes; outputs on other batches and another size."""
    comparisons: list[Comparison] = []

    def run(samples: Samples, words: str, *, training: bool | None, gradients: bool = False) -> str:
        case = Case(training, samples, words, dtype, gradients)
        found = pair.compare(case, notes)
        if isinstance(found, str):
            return found
        comparisons.extend(found)
        return ""

    small = _small(samples)
    if pair.set_apart:
        refused = run(small, f"batch {small.batch}", training=None, gradients=True)
        if refused:
            notes.append(f"the original does not run in the modes set by hand: {refused}")
    for training in (False, True):
        modes = pair.compare_modes(training, dtype)
        if modes is not None:
            comparisons.append(modes)
        refused = run(small, f"batch {small.batch}", training=training, gradients=True)
        if refused and small is not samples:
            words = f"batch {samples.batch}"
            refused = run(samples, words, training=training, gradients=True)
        elif small is not samples:
            run(samples, f"batch {samples.batch}", training=training)
        if refused:
            mode = "training" if training else "evaluation"
            notes.append(f"the original does not run in {mode} mode: {refused}")
            continue
        for batch in _OTHER_BATCHES if samples.batch else ():
            if batch not in (small.batch, samples.batch):
                run(samples.take(batch), f"batch {batch}", training=training)
    for size, other in small.resized():
        if run(other, f"size {size}", training=False):
            continue
        offenders = comparisons[-1].offenders
        if offenders and _REFUSAL in offenders[0]:
            comparisons.pop()
            notes.append(f"size {size}, which the original takes, is refused: {offenders[0]}")
        break
    return comparisons


def _small(samples: Samples) -> Samples:
    return samples.take(_GRADIENT_BATCH) if samples.batch > _GRADIENT_BATCH else samples


def _compare_own(pair: Pair, samples: Samples, notes: list[str]) -> Comparison:
    """Outputs in the model's own dtype, in evaluation mode; in training, if those say nothing."""
    dtype = own_dtype(pair.base)
    pair.limits = TOLERANCES.get(dtype, TOLERANCES[torch.float32])
    refusals, empty = [], None
    for training in (False, True):
        case = Case(training, samples, f"batch {samples.batch}", dtype)
        found = pair.compare(case, notes)
        if isinstance(found, str):
            refusals.append(found)
        elif found[0].judged:
            return found[0]
        else:
            empty = empty or found[0]
    if empty is not None:
        return empty
    raise AimSurgeryError(
        f"the original model does not run on the example inputs ({samples.describe()}): "
        f"{refusals[0]}. Pass example_inputs that it accepts"
    )


class _LowestDtype(TorchDispatchMode):
    """Notes the coarsest floating type that comes up."""

    lowest = torch.float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            dtype = getattr(value, "dtype", None)
            if dtype in TOLERANCES and torch.finfo(dtype).eps > torch.finfo(self.lowest).eps:
                self.lowest = dtype
        return result


def convert(
    pair: Pair, samples: Samples, dtype: torch.dtype, modes: Sequence[bool] = (False, True)
) -> tuple[Samples, torch.dtype, str]:
    """Inputs in another precision, such that the most modes run.

    Some models insist on the types of targets, so that only the first argument may be converted.

    Args:
        pair: Both models, in that precision already.
        samples: The inputs as they are.
        dtype: That precision.
        modes: Training modes to try.

    Returns:
        The inputs; the coarsest precision that comes up in the first mode that runs; and why the
        original has none there, "" where it runs.
    """
    best, most = (samples, dtype, _FAILS), 0
    for first_only in (False, True):
        converted = samples.to(dtype, first_only=first_only)
        found = [_lowest_dtype(pair, converted, training) for training in modes]
        ran = [each for each in found if each is not None]
        if len(ran) > most:
            best, most = (converted, *ran[0]), len(ran)
        if len(ran) == len(found):
            break
    return best


def _lowest_dtype(pair: Pair, samples: Samples, training: bool) -> tuple[torch.dtype, str] | None:
    """The precision that the original has when all of it is float64; None: it doesn't run."""
    watch = _LowestDtype()
    pair.base.train(training)
    try:
        with watch:
            nan = _gives_nan(pair.base, samples)
    except Exception:
        return None
    finally:
        pair.align_buffers()
    return watch.lowest, _NAN if nan else ""


def _is_refused(pair: Pair, samples: Samples) -> bool:
    """Whether the operated model holds for the precision alone that its model has branched on."""
    graphs = (m.graph for m in pair.operated.modules() if isinstance(m, fx.GraphModule))
    asserts = (n for graph in graphs for n in graph.nodes if n.target is torch._assert)
    if not any(_PRECISION in str(node.args[1]) for node in asserts):
        return False
    pair.operated.eval()
    try:
        with torch.no_grad():
            call(pair.operated, _small(samples))
    except AssertionError as err:
        return _REFUSAL in str(err) and _PRECISION in str(err)
    except Exception:
        return False  # which the cases tell
    return False


def _gives_nan(model: nn.Module, samples: Samples) -> bool:
    with torch.no_grad():
        leaves = named_leaves(call(model, _small(samples))).values()
    return any(isinstance(leaf, torch.Tensor) and bool(leaf.isnan().any()) for leaf in leaves)
