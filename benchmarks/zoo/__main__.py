"""The command: choose models, run each in its own process, write rows, then the summary."""

from __future__ import annotations

import argparse
import fnmatch
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks import measure
from benchmarks.zoo import summary, trial
from benchmarks.zoo.libraries import LIBRARIES
from benchmarks.zoo.processes import GIB, run_limited, start_server
from benchmarks.zoo.rows import (
    DEFERRED,
    LIGHT,
    Row,
    append,
    compact,
    read_rows,
    rows_file,
    source_digest,
)

_SHARE_OF_RAM = 0.85


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print, write."""
    options = parser().parse_args(argv)
    library = LIBRARIES[options.library]
    names = library.names()
    source = source_digest()
    chosen = choose(names, options, source)
    path = rows_file(options.output, options.library, options.shard)
    start_server(options.threads)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(options.library, total=len(chosen))
        failed = 0
        for row in run_all(chosen, options, source):
            append(path, row)
            failed += not row.ok
            progress.update(task, advance=1, description=f"{row.model} ({failed} failed)")
    if path.is_file():
        compact(path)
    rows = read_rows(options.output, options.library)
    environment = measure.environment() | {
        "limits": f"{options.limit:g} s a model; {options.memory:.1f} GiB for {options.jobs} jobs",
        "torch threads": options.threads,
        "transformers": _version("transformers"),
    }
    written = summary.write(options.output, options.library, library, names, rows, environment)
    _print([rows[name] for name in names if name in rows], options.library, names)
    print("written:", *written)


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    found.add_argument("--library", choices=LIBRARIES, required=True)
    found.add_argument("--shard", type=_shard, help="i/n: the i-th of n hands of models")
    found.add_argument("--only", default="*", help="a glob on names")
    again = found.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", help="leave out what has a row of this very source"
    )
    again.add_argument(
        "--missing", action="store_true", help="only what has no row yet, of any source"
    )
    again.add_argument(
        "--failed", action="store_true", help="only what has a row that failed, of any source"
    )
    found.add_argument(
        "--meta",
        action="store_true",
        help="transform and audit on the meta device only: seconds a model, no values compared",
    )
    found.add_argument(
        "--light",
        action="store_true",
        help="light checks for all, a tenth of the time; brief ones where the limit leaves less",
    )
    found.add_argument(
        "--smallest-first",
        action="store_true",
        help="in the order of parameters, as rows of a --meta run in OUTPUT/meta tell",
    )
    found.add_argument("--jobs", type=int, default=2, help="models at a time")
    found.add_argument("--threads", type=int, default=1, help="of torch, for each model")
    found.add_argument("--limit", type=float, default=900, help="seconds of one core for a model")
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    found.add_argument(
        "--memory", type=float, default=_SHARE_OF_RAM * ram, help="GiB for all jobs together"
    )
    found.add_argument("--output", type=Path, default=Path("benchmarks/results/zoo"))
    return found


def choose(names: Sequence[str], options: argparse.Namespace, source: str) -> list[str]:
    """The models of this run.

    Args:
        names: All of the library.
        options: Shard, glob, and what to do with rows that are there.
        source: Digest of the package's source.

    Returns:
        Their names.
    """
    first, step = options.shard or (1, 1)
    chosen = [name for name in names[first - 1 :: step] if fnmatch.fnmatch(name, options.only)]
    rows = read_rows(options.output, options.library)
    if options.resume:
        chosen = [name for name in chosen if name not in rows or rows[name].source != source]
    if options.missing:
        chosen = [name for name in chosen if name not in rows]
    if options.failed:
        chosen = [name for name in chosen if name in rows and not rows[name].ok]
    if options.smallest_first:
        known = read_rows(options.output / "meta", options.library)
        chosen.sort(key=lambda name: known[name].parameters if name in known else 0)
    return chosen


def run_all(chosen: Iterable[str], options: argparse.Namespace, source: str) -> Iterator[Row]:
    """Run models as many at a time as there are jobs; those that need more memory, alone at last.

    Args:
        chosen: Names of models.
        options: Jobs and limits.
        source: Digest of the package's source.

    Yields:
        Rows, as they come in.
    """
    put_off = []
    device, asked = "meta" if options.meta else "cpu", LIGHT if options.light else ""
    blank = Row(options.library, "", source=source, device=device, checks=asked)
    each, threads = options.memory / options.jobs, options.threads
    with ThreadPoolExecutor(options.jobs) as pool:
        alone = options.jobs == 1
        futures = [
            pool.submit(run_one, replace(blank, model=name), options.limit, each, threads, alone)
            for name in chosen
        ]
        try:
            for future in as_completed(futures):
                row = future.result()
                if row.stage == DEFERRED:
                    put_off.append(row.model)
                else:
                    yield row
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    for name in put_off:
        row = replace(blank, model=name)
        yield run_one(row, options.limit, options.memory, threads, alone=True)


def run_one(row: Row, seconds: float, memory: float, threads: int, alone: bool) -> Row:
    """Run one model in its own process.

    Args:
        row: Names library and model.
        seconds: Limit of processor time.
        memory: Limit of memory, in GiB.
        threads: For torch.
        alone: Whether no other model runs beside.

    Returns:
        The row, filled in as far as it came; it is put off where others run beside and it needs
        more memory than its share. Alone, it gets a second process that keeps on disk what the
        backward needs, if it met the limit of memory in a training step.
    """
    start = time.monotonic()

    def run(row: Row, on_disk: bool) -> tuple[Row, str]:
        asked = (seconds, memory, threads, alone, on_disk)
        ended = run_limited(trial.run, row.plain(), *asked, seconds=seconds, memory=memory)
        return Row.of(ended.last or row.plain()), ended.reason

    blank = row
    row, reason = run(blank, False)
    if alone and "memory" in reason and row.stage in ("timing", "verifying"):
        row, reason = run(replace(blank, step_seconds=row.step_seconds), True)
    if reason and not alone and "memory" in reason:
        row.stage = DEFERRED
    elif reason:
        row.verified = False
        row.errors.append(f"{row.stage}: {reason}")
    row.finished, row.total_seconds = time.time(), time.monotonic() - start
    return row


def _shard(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text} is no shard such as 1/4")
    return int(first), int(count)


def _version(library: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "not installed"


def _print(rows: Sequence[Row], name: str, names: Sequence[str]) -> None:
    console = Console()
    table = Table("what", "measured", "limit", "verdict", title=f"The zoo: {name}")
    for total in summary.totals(rows, LIBRARIES[name], names):
        table.add_row(*total.cells())
    console.print(table)
    groups = Table("models", "reason", "such as", title="Failures")
    for key, group in summary.failures(rows).items():
        groups.add_row(str(len(group)), key, group[0].model)
    if groups.row_count:
        console.print(groups, markup=False)


if __name__ == "__main__":
    main()
