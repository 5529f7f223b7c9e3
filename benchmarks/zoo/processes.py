"""A function in a process of its own that may take so much time and memory and no more.

Processes are forked from a server that has imported the libraries and computed nothing else
(`preload.py`), so each starts in milliseconds and all run the source that was there at the start.
The resident set is watched from outside: a limit on the address space would also count what torch
maps and never touches. Time is the processor's, so that a sweep beside other work, or one that was
stopped and goes on, measures the model and not its neighbours; one that hangs without computing is
ended by the number of times it was looked at.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

GIB = 2**30
_POLL_SECONDS = 0.1
_IDLE = 10  # times the limit that a process may take on the wall, pauses of us both not counted
_GRACE_SECONDS = 5
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        last: What the function sent last; None if nothing.
        reason: Why it ended early; "" where it ran to its end.
    """

    last: Any
    reason: str


def start_server(threads: int = 1) -> None:
    """Let the server import the libraries once, for so many threads of torch in its children."""
    os.environ |= {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    multiprocessing.get_context("forkserver").set_forkserver_preload(["benchmarks.zoo.preload"])


def run_limited(
    function: Callable[..., object], *args: object, seconds: float, memory: float
) -> Ended:
    """Call a function in a process of its own.

    Args:
        function: A module-level function; called with a function that sends, and `args`.
        args: For the function.
        seconds: The most processor time.
        memory: The most resident memory, in GiB.

    Returns:
        What it sent last, and whether it ended by itself.
    """
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, args), daemon=True)
    process.start()
    sender.close()
    looks, last, reason = 0, None, ""
    while True:
        looks += 1
        if receiver.poll(_POLL_SECONDS):
            try:
                last = receiver.recv()
            except EOFError:
                break
        if processor_seconds(process.pid) > seconds or looks * _POLL_SECONDS > _IDLE * seconds:
            reason = f"the time limit of {seconds:g} s"
        elif resident(process.pid) > memory * GIB:
            reason = f"the memory limit of {memory:g} GiB"
        if reason:
            process.kill()
            break
    process.join(_GRACE_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    receiver.close()
    return Ended(last, reason or _reason_of(process.exitcode))


def _child(sender: Connection, function: Callable[..., object], args: tuple[object, ...]) -> None:
    with contextlib.suppress(OSError, AttributeError):  # Linux: end when the server ends
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    nothing = os.open(os.devnull, os.O_WRONLY)  # what models print is no part of the report
    sys.stdout.flush()
    for stream in (1, 2):
        os.dup2(nothing, stream)
    function(sender.send, *args)


def resident(pid: int | None) -> int:
    """The resident set in bytes; 0 where the process is gone, or the system doesn't say."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def processor_seconds(pid: int | None) -> float:
    """What a process has computed so far, all threads together; 0 where the system doesn't say."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(after_name[11]) + int(after_name[12])) / _TICKS  # utime, stime
    except (OSError, IndexError):
        return 0


def _reason_of(exitcode: int | None) -> str:
    if exitcode == 0:
        return ""
    if exitcode is not None and exitcode < 0:
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"ended with exit code {exitcode}"
