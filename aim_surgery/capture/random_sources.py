"""Random numbers that a forward draws where no graph can see it: they would become constants.

    if random.random() < 0.1: ...        torch.Tensor(8).uniform_()        self.rng.random()

Torch's, Python's and NumPy's own states are looked at, and sources that hang on the model. Other
threads may use the same states meanwhile. They seldom draw from Python's or NumPy's; where torch's
has moved and there are other threads, the model is traced once more, with all that this thread
calls of torch watched.
"""

from __future__ import annotations

import contextlib
import pickle
import random
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aim_surgery.errors import CaptureError

if TYPE_CHECKING:
    from aim_surgery.capture.tracer import ValueTracer

SOURCES = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
# Those that the libraries' own functions draw from.
GLOBAL: dict[str, Any] = {
    "random": random.random.__self__,  # pyright: ignore[reportFunctionMemberAccess]
    "numpy": np.random.mtrand._rand,
    "torch": torch.default_generator,
}


def state_of(source: Any) -> bytes:
    """The state of a source; nothing where it has none (the system's entropy)."""
    if isinstance(source, random.SystemRandom):
        return b""
    if isinstance(source, random.Random):
        return pickle.dumps(source.getstate())
    if isinstance(source, np.random.Generator):
        return pickle.dumps(source.bit_generator.state)
    if isinstance(source, np.random.RandomState):
        return pickle.dumps(source.get_state(legacy=False))
    return source.get_state().cpu().numpy().tobytes()


def put_state(source: Any, state: bytes) -> None:
    """Give a source a former state."""
    if isinstance(source, random.SystemRandom):
        return
    if isinstance(source, random.Random):
        source.setstate(pickle.loads(state))
    elif isinstance(source, np.random.Generator):
        source.bit_generator.state = pickle.loads(state)
    elif isinstance(source, np.random.RandomState):
        source.set_state(pickle.loads(state))
    else:
        source.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


class MayHaveDrawn(Exception):  # noqa: N818 - control flow, not an error
    """Torch's state has moved while other threads were running: trace again, and watch."""


@contextlib.contextmanager
def no_numbers_drawn(tracer: ValueTracer) -> Iterator[None]:
    """Refuse forwards that draw numbers where no graph can see it.

    Args:
        tracer: The tracer; `watches_draws` says how to look at torch.

    Raises:
        CaptureError: The forward has drawn some.
        MayHaveDrawn: There is no telling whether it has.
    """
    before = {name: state_of(source) for name, source in GLOBAL.items()}
    for source in tracer.changes.belongings.sources:
        source.put_back()  # a trace before may have stopped where it had drawn
    watch = _Draws(tracer)
    with watch if tracer.watches_draws else contextlib.nullcontext():
        yield
    moved = [name for name, source in GLOBAL.items() if state_of(source) != before[name]]
    moved += [source.name for source in tracer.changes.belongings.sources if source.put_back()]
    if "torch" in moved and tracer.watches_draws and not watch.seen:
        moved.remove("torch")
    if moved == ["torch"] and not tracer.watches_draws and threading.active_count() > 1:
        raise MayHaveDrawn
    if moved:
        raise CaptureError(
            f"the forward draws from the random state of {', '.join(moved)} where a graph can't "
            f"record it, so its numbers would become constants: draw with torch.rand, torch.randn "
            f"or a method of a tensor"
        )


class _Draws(TorchDispatchMode):
    """Whether the forward has drawn from torch's state, in this thread."""

    def __init__(self, tracer: ValueTracer) -> None:
        super().__init__()
        self._tracer, self.seen = tracer, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and self._tracer.recording:
            self.seen = True
        with self._tracer.computing():  # it is no call of the forward's own
            return func(*args, **(kwargs or {}))
