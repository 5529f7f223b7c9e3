"""What all benchmarks share: how to time, how to weigh, and how to write down what was found.

Two things are compared by taking turns in one process, A B A B ..., so that a machine that slows
down slows both; what counts is the median of the ratios A_i ÷ B_i of neighbours. Both sides are
timed alike: garbage is collected before, and results are let go of after, the timed stretch.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

SEED = 0
QUICK_PAIRS = 2
EXTRA = "pip install 'aim-surgery[benchmarks]'"

_LIBRARIES = ("aim-surgery", "torch", "torchvision", "timm", "peft", "torch-pruning", "numpy")
_PROC = Path("/proc/self")


# Command line -------------------------------------------------------------------------------


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    found = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    found.add_argument("--pairs", type=_positive, default=7, help="turns that each side takes")
    found.add_argument("--threads", type=_positive, default=2, help="torch.set_num_threads")
    found.add_argument("--quick", action="store_true", help="a smoke run, not a measurement")
    found.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    return found


def parse(found: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options, cut `--pairs` down where it is to be quick, and set the threads."""
    options = found.parse_args(argv)
    if options.quick:
        options.pairs = min(options.pairs, QUICK_PAIRS)
    torch.set_num_threads(options.threads)
    return options


def require(*modules: str) -> None:
    """End the program with a remedy where an optional library is missing."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise SystemExit(f"this benchmark needs {', '.join(missing)}: {EXTRA}")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return number


# Time ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Seconds of two sides that took turns.

    Attributes:
        first: Seconds of A, one for each pair.
        second: Seconds of B.
    """

    first: tuple[float, ...]
    second: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """A_i ÷ B_i."""
        return tuple(a / b for a, b in zip(self.first, self.second, strict=True))

    @property
    def median(self) -> float:
        """The median of the ratios."""
        return statistics.median(self.ratios)

    def describe(self, first: str, second: str) -> str:
        """One sentence with both sides' median times."""
        return (
            f"{first} {statistics.median(self.first):.3f} s, "
            f"{second} {statistics.median(self.second):.3f} s (medians of {len(self.first)})"
        )


def seconds(function: Callable[[], object]) -> float:
    """Time one call; what it returns dies after the clock has stopped."""
    gc.collect()
    start = time.perf_counter()
    result = function()
    end = time.perf_counter()
    del result
    return end - start


def take_turns(
    first: Callable[[], object], second: Callable[[], object], *, pairs: int, warmups: int = 1
) -> Pairs:
    """Time two functions in turns, A B A B ....

    Args:
        first: Side A.
        second: Side B.
        pairs: Turns that count.
        warmups: Turns before, that don't.

    Returns:
        The seconds of both sides, pair by pair.
    """
    turns = [(seconds(first), seconds(second)) for _ in range(warmups + pairs)][warmups:]
    return Pairs(tuple(a for a, _ in turns), tuple(b for _, b in turns))


@dataclass(frozen=True)
class Rounds:
    """Seconds of several sides that took turns, A B C ... A B C ... A.

    Attributes:
        seconds: By side, one for each round; the side that opened a round also closed the last one.
        opening: The side that opened each round.
    """

    seconds: Mapping[str, tuple[float, ...]]
    opening: str

    def pairs(self, first: str, second: str) -> Pairs:
        """Two sides, round by round; of the opening side, the mean of its turns around a round."""
        return Pairs(self._around(first), self._around(second))

    def _around(self, side: str) -> tuple[float, ...]:
        found = self.seconds[side]
        if side != self.opening:
            return found
        return tuple((a + b) / 2 for a, b in itertools.pairwise(found))


def take_rounds(
    sides: Mapping[str, Callable[[], object]], *, rounds: int, warmups: int = 1
) -> Rounds:
    """Time several functions in turns; the first opens each round and closes the last.

    Args:
        sides: What to time, by name.
        rounds: Rounds that count.
        warmups: Rounds before, that don't.

    Returns:
        The seconds of all sides.
    """
    opening = next(iter(sides))
    found: dict[str, list[float]] = {name: [] for name in sides}
    for count in range(warmups + rounds):
        for name, function in sides.items():
            taken = seconds(function)
            if count >= warmups:
                found[name].append(taken)
    found[opening].append(seconds(sides[opening]))
    return Rounds({name: tuple(times) for name, times in found.items()}, opening)


# Memory -------------------------------------------------------------------------------------


def in_fresh_process(function: Callable[..., Any], *args: object) -> Any:
    """Call a module-level function in a new interpreter, whose heap nobody has used before."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def peak_growth(function: Callable[[], Any], device: str = "cpu") -> tuple[Any, int, str]:
    """Call a function and see how far the process grew meanwhile.

    Args:
        function: What to call.
        device: Whose memory is looked at.

    Returns:
        What it returned, the growth from before to its peak in bytes, and how the peak was found:
        of the resident set, the kernel's high-water mark, or sampled each millisecond where that
        can't be reset; of an accelerator, torch's allocator.
    """
    gc.collect()
    if device != "cpu":
        memory = torch.accelerator.memory
        memory.reset_peak_memory_stats(device)
        allocated = memory.memory_allocated(device)
        result = function()
        return result, memory.max_memory_allocated(device) - allocated, "torch's allocator"
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # freed heap that the call could use again would hide a part of its need
    before = _resident("VmRSS")
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        result, peak = _sampled(function)
        return result, peak - before, "sampled each 1 ms"
    result = function()
    return result, _resident("VmHWM") - before, "VmHWM"


def _resident(name: str) -> int:
    lines = (_PROC / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _sampled(function: Callable[[], Any]) -> tuple[Any, int]:
    samples, done = [_resident("VmRSS")], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            samples.append(_resident("VmRSS"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        result = function()
    finally:
        done.set()
        watcher.join()
    return result, max(*samples, _resident("VmRSS"))


# Report -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One measurement, against its limit if there is one.

    Attributes:
        name: What was measured.
        measured: The figure that is held against the limit.
        limit: The most that it may be; None where nothing was promised.
        spread: Smallest and largest single figure, where there are several.
        note: How it came about, in one line.
        details: Everything else that the JSON file keeps.
    """

    name: str
    measured: float
    limit: float | None
    spread: tuple[float, float] | None = None
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Either "ok" or "missed"; "-" without a limit."""
        if self.limit is None:
            return "-"
        return "ok" if self.measured <= self.limit else "missed"

    def cells(self) -> tuple[str, ...]:
        """The row as text: name, measured, limit, verdict, note."""
        if self.limit is not None and 0 < self.limit < 0.01:
            return self.name, f"{self.measured:.1e}", f"≤ {self.limit:g}", self.verdict, self.note
        spread = f" ({self.spread[0]:.3f} to {self.spread[1]:.3f})" if self.spread else ""
        measured = f"{self.measured:.3f}{spread}"
        limit = "-" if self.limit is None else f"≤ {self.limit:.2f}"
        return self.name, measured, limit, self.verdict, self.note


def ratio_row(name: str, pairs: Pairs, limit: float | None, sides: tuple[str, str]) -> Row:
    """The row of two sides that took turns: median, and smallest to largest, of the ratios."""
    details = {f"{sides[0]}_seconds": pairs.first, f"{sides[1]}_seconds": pairs.second}
    return Row(
        name,
        pairs.median,
        limit,
        (min(pairs.ratios), max(pairs.ratios)),
        pairs.describe(*sides),
        {**details, "ratios": pairs.ratios},
    )


@dataclass(frozen=True)
class Section:
    """A further table of a report."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Report:
    """What one benchmark found.

    Attributes:
        name: Name of the benchmark and of its files.
        title: Heading of the summary.
        method: How it was measured, a sentence each.
        settings: The options that it ran with.
        environment: From `environment`.
        rows: Measurements against limits.
        sections: Further tables.
        suffix: What the names of its files have besides, where there are several.
    """

    name: str
    title: str
    method: tuple[str, ...]
    settings: dict[str, Any]
    environment: dict[str, Any]
    rows: tuple[Row, ...]
    sections: tuple[Section, ...] = ()
    suffix: str = ""

    def print(self) -> None:
        """Print the tables."""
        console = Console()
        header = ("what", "measured", "limit", "verdict", "how")
        console.print(_rich(self.title, header, [row.cells() for row in self.rows]))
        for section in self.sections:
            console.print(_rich(section.title, section.header, section.rows))
        facts = "; ".join(f"{name}: {value}" for name, value in self.environment.items())
        console.print(facts, style="dim", highlight=False, markup=False)

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write `NAME.json` and, next to it, `NAME.md`."""
        folder.mkdir(parents=True, exist_ok=True)
        stem = self.name + self.suffix
        as_json, as_markdown = folder / f"{stem}.json", folder / f"{stem}.md"
        content = asdict(self)
        for row, plain in zip(self.rows, content["rows"], strict=True):
            plain["verdict"] = row.verdict
        as_json.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        as_markdown.write_text(self._markdown(), "utf-8")
        return as_json, as_markdown

    def _markdown(self) -> str:
        header = ("what", "measured", "limit", "verdict", "how")
        options = " ".join(_option(*item) for item in self.settings.items()).split()
        command = " ".join(["python", "-m", f"benchmarks.{self.name}", *options])
        parts = [
            f"# {self.title}",
            f"Written by `{command}`; all figures are in `{self.name}{self.suffix}.json`.",
            _markdown_table(header, [row.cells() for row in self.rows]),
            "\n".join(f"* {sentence}" for sentence in self.method),
        ]
        for section in self.sections:
            parts += [f"## {section.title}", _markdown_table(section.header, section.rows)]
        facts = [(name, str(value)) for name, value in self.environment.items()]
        parts += ["## Environment", _markdown_table(("", ""), facts)]
        return "\n\n".join(parts) + "\n"


def environment(device: str = "cpu", *, seeds: Sequence[int] = (SEED,)) -> dict[str, Any]:
    """Describe machine, libraries, threads and seeds.

    Args:
        device: Where models run.
        seeds: What was given to `torch.manual_seed`.

    Returns:
        Plain values by name, for JSON.
    """
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "ram": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "load average": ", ".join(f"{load:.2f}" for load in os.getloadavg()),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    for library in _LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = "not installed"
    if device != "cpu":
        found["accelerator"] = torch.cuda.get_device_name(device)
    found["torch threads"] = torch.get_num_threads()
    found["seeds"] = ", ".join(map(str, seeds))
    return found


def progress(message: str) -> None:
    """Tell, on stderr, what is being measured."""
    print(f"measuring {message} ...", file=sys.stderr, flush=True)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    here = Path(__file__).parent
    try:
        head, changes = (
            subprocess.run(
                ["git", *command], cwd=here, capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}, with uncommitted changes" if changes else head


def _option(name: str, value: object) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else ""
    return f"--{name} {value}"


def _rich(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(*header, title=title)
    for row in rows:
        style = {"ok": "green", "missed": "red"}
        table.add_row(*(f"[{style[cell]}]{cell}[/]" if cell in style else cell for cell in row))
    return table


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
