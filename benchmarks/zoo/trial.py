"""One model from its name to its row; runs in the model's own process."""

from __future__ import annotations

import copy
import os
import resource
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import aim_surgery
from aim_surgery.capture import Inputs, capture
from aim_surgery.capture.leaves import is_stock
from aim_surgery.errors import AimSurgeryError
from aim_surgery.nn.aim_modules import plan_of
from aim_surgery.verification.samples import Samples, samples_for
from aim_surgery.verification.twins import call
from benchmarks.zoo import checks, detection
from benchmarks.zoo.libraries import build, build_on_meta, move_to_meta
from benchmarks.zoo.on_disk import saved_on_disk
from benchmarks.zoo.processes import GIB, resident
from benchmarks.zoo.rows import DEFERRED, DONE, LIGHT, PARTLY, TRACED, WHOLE, Row

# Measured: bytes a parameter that each kind of check needs, all copies and gradients together, and
# what `verify` holds of activations, in those of one float32 image.
FULL_BYTES, LIGHT_BYTES, BRIEF_BYTES = 36, 18, 9
FULL_ACTIVATIONS = 6
LIGHT_ACTIVATIONS = 3  # of each image: a training step in float64, and what is left of one before
BASE_GIB = 1.0  # libraries and activations
FULL_STEPS = 45  # what `verify` takes, in forward-and-backward passes of one float32 image
LIGHT_STEPS = 8  # what the light checks take of two images; of one, half of it
_QUICK = 2.0  # seconds of a step that is timed more than once
_SHARE_OF_TIME, _SHARE_ASKED = 0.8, 0.25  # of what the limit leaves: most of it; for light checks
_LONGEST = 1500

Send = Callable[[dict[str, Any]], None]


def run(
    send: Send,
    plain: dict[str, Any],
    seconds: float,
    memory: float,
    threads: int,
    alone: bool,
    on_disk: bool,
) -> None:
    """Build, transform, check; what is known is sent at each stage.

    Args:
        send: Takes the row as plain data.
        plain: The row to fill in: library and model; light checks, if it names them; the time of a
            step, if it is known.
        seconds: Limit of all of it, of all cores together; whoever started the process keeps it.
        memory: Likewise, in GiB.
        threads: For torch; more than one are noted in the row.
        alone: Whether no other model runs beside; if one does, a model that needs more memory is
            put off.
        on_disk: Whether a training step at the example's size needs more memory than there is: no
            step is timed, and a backward at that size keeps on disk what it needs.
    """
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    row = Row.of(plain)
    row.notes += [f"{threads} threads"] if threads > 1 else []
    trial = _Trial(send, row, seconds, memory, alone, on_disk)
    try:
        trial.run()
    except Exception as err:
        trial.fail(reason_of(err))


class _Trial:
    def __init__(
        self, send: Send, row: Row, seconds: float, memory: float, alone: bool, on_disk: bool
    ) -> None:
        self._send, self._row = send, row
        self._start, self._seconds = time.perf_counter(), seconds
        self._memory, self._alone, self._on_disk = memory, alone, on_disk
        self._light, row.checks = row.checks == LIGHT, ""

    def run(self) -> None:
        row = self._row
        self._enter("building")
        on_meta = self._on_meta()
        on_cpu = row.device == "cpu"
        least = LIGHT_BYTES if self._light else FULL_BYTES
        if on_cpu and self._needs(least) > self._memory and not self._alone:
            self._enter(DEFERRED)
            return
        if on_cpu and self._needs(BRIEF_BYTES) > self._memory:
            row.notes.append(f"too big: weights and checks need {self._needs(BRIEF_BYTES):.0f} GiB")
            row.device = "meta"
        known = on_meta is not None or row.device == "cpu"
        model, inputs = build(row.library, row.model, row.device if known else "cpu")
        if not known:
            model, inputs = move_to_meta(model, inputs)
        row.parameters = sum(parameter.numel() for parameter in model.parameters())
        smaller = detection.resize_less(model)
        row.notes += [smaller] if smaller else []
        self._enter("transforming")
        start = time.process_time()
        gm = aim_surgery.transform(model, inputs)
        row.transform_seconds = time.process_time() - start
        self._enter("describing")
        describe_operated(model, gm, inputs, row)
        if row.device == "meta":
            self._enter("verifying")
            checks.audit(model, gm, row)
        else:
            self._verify(model, gm, inputs, on_meta or model)
        if row.stage != DEFERRED:
            self._enter(DONE)

    def fail(self, reason: str) -> None:
        """Note an error, at the stage where it came up."""
        text = f"{self._row.stage}: {reason}"
        self._row.errors.append(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}...")
        self._row.verified = False
        self._tell()

    def _verify(
        self, model: nn.Module, gm: nn.Module, inputs: Inputs | None, on_meta: nn.Module
    ) -> None:
        row = self._row
        self._enter("timing")
        detects = detection.takes_targets(model)
        samples = detection.with_targets() if detects else samples_for(model, plan_of(gm), inputs)
        row.inputs = checks.describe(samples)
        step, activations, smaller = 0.0, 0.0, None
        if not self._on_disk:
            step, activations = self._cost_of_step(model, samples, detects)
            row.step_seconds = step or None
        self._enter("verifying")
        if detects:
            inputs, on_meta = samples.args, model  # branches on data do not run on meta
        else:
            smaller = checks.smaller_inputs(model, gm, samples)
            if smaller is not None:
                share = smaller[0].numel() / samples.args[0].numel()
                inputs, samples = smaller, samples_for(model, plan_of(gm), smaller)
                step, activations = step * share, activations * share
                if self._on_disk:
                    step, activations = self._cost_of_step(model, samples, detects)
        too_large = self._on_disk and smaller is None
        if self._on_disk:
            row.notes.append(f"a training step takes more than the {self._memory:.1f} GiB")
        if too_large:
            row.notes.append("what the backward needs was kept on disk")
            samples = _one_of(samples)
        row.checked_on = checks.describe(samples)
        memory = self._needs(FULL_BYTES) + FULL_ACTIVATIONS * activations
        if memory > self._memory and not self._alone and not self._light:
            self._enter(DEFERRED)
            return
        light = self._light or too_large
        if memory <= self._memory and FULL_STEPS * step <= self._time_left() and not light:
            checks.check_full(model, gm, inputs, row)
        else:
            needs = f"{memory:.0f} GiB and {FULL_STEPS * step:.0f} s"
            reason = "asked for" if self._light else f"as the full ones would take about {needs}"
            row.notes.append(f"light checks, {reason}")
            steps = LIGHT_STEPS * step
            left = self._time_left(_SHARE_ASKED if self._light else _SHARE_OF_TIME)
            if steps > left:
                samples, steps = samples.take(1), steps / 2
                row.checked_on = checks.describe(samples)
            each = LIGHT_ACTIVATIONS * activations
            memory = self._needs(LIGHT_BYTES) + each * max(samples.batch, 1)
            brief = steps > left or memory > self._memory
            kept = saved_on_disk(gm) if too_large else None
            self._enter("verifying")
            checks.check_light(
                model, gm, samples, on_meta, row, detects=detects, brief=brief, kept=kept
            )

    def _cost_of_step(
        self, model: nn.Module, samples: Samples, detects: bool
    ) -> tuple[float, float]:
        """Seconds of a forward and backward of one sample, and GiB that it takes; 0 if it fails."""
        before, step = resident(os.getpid()), 0.0
        try:
            copied = self._needs(FULL_BYTES) <= self._memory  # some models keep what they computed
            timed = copy.deepcopy(model) if copied else model
            step = seconds_of_step(timed.train(detects), samples)
            model.eval()
        except Exception as err:
            self._row.notes.append(f"no time of a step: {reason_of(err)}")
        return step, max(_peak() - before, 0) / GIB

    def _on_meta(self) -> nn.Module | None:
        """The model without weights, which tells its size; None where it can't be built so."""
        model = build_on_meta(self._row.library, self._row.model)
        if model is not None:
            self._row.parameters = sum(parameter.numel() for parameter in model.parameters())
        return model

    def _needs(self, bytes_each: float) -> float:
        return self._row.parameters * bytes_each / GIB + BASE_GIB

    def _time_left(self, share: float = _SHARE_OF_TIME) -> float:
        return share * (self._seconds - time.process_time())

    def _enter(self, stage: str) -> None:
        self._row.stage = stage
        self._tell()

    def _tell(self) -> None:
        self._row.total_seconds = time.perf_counter() - self._start
        self._row.peak_gib = _peak() / GIB
        self._send(self._row.plain())


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reason_of(err: Exception) -> str:
    """An error in one line; one that nobody raised on purpose, with the line of code."""
    lines = str(err).strip().splitlines() or [""]
    reason = f"{type(err).__name__}: {lines[0]}"
    if isinstance(err, AimSurgeryError):
        return reason
    frames = [f for f in traceback.extract_tb(err.__traceback__) if "/torch/" not in f.filename]
    last = frames[-1]
    file = last.filename.removeprefix(f"{Path.cwd()}/").rpartition("site-packages/")[2]
    return f"{type(err).__name__} at {file}:{last.lineno} `{last.line}`: {reason}"


def describe_operated(model: nn.Module, gm: nn.Module, inputs: Inputs | None, row: Row) -> None:
    """Note how a model was captured and what reads.

    Args:
        model: The original; captured once more where it is partly opaque, for the reasons.
        gm: The operated model.
        inputs: Example inputs; None for those that were found.
        row: Filled in.
    """
    plan = plan_of(gm)
    row.found = plan.inputs.source
    row.reads, row.skips = len(plan.reads), len(plan.skips)
    if not isinstance(gm, fx.GraphModule):
        row.captured = WHOLE
        why = next((note for note in plan.notes if "own forward stays" in note), "")
        row.opaque = [(why, "", 1)]
        return
    row.nodes = len(gm.graph.nodes)
    paths = list(dict.fromkeys(opaque_calls(gm)))
    row.captured = PARTLY if paths else TRACED
    if paths:
        traces = capture(model, inputs).traces
        reasons = {call.path: call.reason for trace in traces for call in trace.opaque}
        counts = Counter(reasons.get(path, "") for path in paths)
        first = {reasons.get(path, ""): path for path in reversed(paths)}
        row.opaque = [(reason, first[reason], count) for reason, count in counts.items()]


def opaque_calls(gm: fx.GraphModule) -> Iterator[str]:
    """Paths of modules that the graph calls and that are neither torch's own nor ours."""
    for node in gm.graph.nodes:
        if node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            ours = type(module).__module__.startswith("aim_surgery.")
            if not ours and not is_stock(module):
                yield str(node.target)


def seconds_of_step(model: nn.Module, samples: Samples) -> float:
    """Time a forward and backward of one sample, in the mode that the model is in.

    Args:
        model: The original; left without gradients.
        samples: Of which the first is taken.

    Returns:
        Seconds of one core: of a slow model its first step, of others the least of three more.
    """
    one = _one_of(samples)
    first = _step(model, one)
    try:
        return first if first > _QUICK else min(_step(model, one) for _ in range(3))
    except RuntimeError:  # a model that keeps a part of its graph has no second backward
        return first


def _one_of(samples: Samples) -> Samples:
    """The first of several; what they are where they can't be told apart."""
    return samples.take(1) if samples.batch else samples


def _step(model: nn.Module, samples: Samples) -> float:
    with checks.gradients_let_go(model):
        start = time.process_time()
        loss = checks.loss_of(call(model, samples))
        if loss is not None:
            loss.backward()
        return time.process_time() - start
