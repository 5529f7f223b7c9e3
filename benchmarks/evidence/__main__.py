"""The command: choose learning rates, run what counts, append rows, write figures and page."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks import measure
from benchmarks.evidence import dogs, page, tables, timing
from benchmarks.evidence.data import DATASETS
from benchmarks.evidence.networks import NETWORKS
from benchmarks.evidence.recipes import STUDIES, Config, Study
from benchmarks.evidence.rows import FOLDER, Row, append, missing, read_rows
from benchmarks.evidence.run import run
from benchmarks.evidence.statistics import FEWEST

OUTPUT, QUICK_OUTPUT = Path("benchmarks/evidence"), Path("build/evidence")
STEP_TIME, PAGE = "step-time", "page"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a study and write the page."""
    measure.require("sklearn", "scipy", "matplotlib", "peft")
    options = parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    folder = options.output or (QUICK_OUTPUT if options.quick else OUTPUT)
    data = options.data or DATASETS[0]
    if options.study in dogs.RECIPES:
        _run_dogs(options, folder)
        data = DATASETS[0]
    elif data not in DATASETS:
        raise SystemExit(f"--data must be {' or '.join(DATASETS)} for this study, got {data}")
    elif options.study == STEP_TIME:
        timing.run(data, options.networks, options.device, folder / FOLDER, quick=options.quick)
    elif options.study != PAGE:
        study = chosen(STUDIES[options.study], options)
        run_study(study, data, folder, options)
        _print(study, data, read_rows(folder))
    sized = {name: (s.quick() if options.quick else s).on(data) for name, s in STUDIES.items()}
    fewest = 0 if options.quick else FEWEST
    print("written:", page.write(folder, data, read_rows(folder), sized, fewest=fewest))


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    studies = (*STUDIES, *dogs.RECIPES, STEP_TIME, PAGE)
    found.add_argument("--study", choices=studies, required=True)
    found.add_argument("--seeds", type=measure._positive, help="only the first so many seeds")
    found.add_argument("--data", help=f"{' or '.join(DATASETS)}; the folder of Stanford Dogs")
    found.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    found.add_argument("--arms", nargs="+", help="only these arms")
    found.add_argument("--quick", action="store_true", help="a smoke run, not a measurement")
    found.add_argument("--resume", action="store_true", help="leave out what has a row")
    found.add_argument("--device", default="cpu", help="as torch names it, such as cuda")
    found.add_argument("--jobs", type=measure._positive, default=1, help="runs at a time")
    found.add_argument("--threads", type=measure._positive, default=1, help="of torch, a run")
    found.add_argument("--output", type=Path, help=f"{OUTPUT}; {QUICK_OUTPUT} with --quick")
    return found


def chosen(study: Study, options: argparse.Namespace) -> Study:
    """A study as the options want it: the recipe, and so what a row stands for, stays.

    Raises:
        SystemExit: It has no such arm.
    """
    study = (study.quick() if options.quick else study).on(options.data or DATASETS[0])
    unknown = [arm for arm in options.arms or () if arm not in study.arms]
    if unknown:
        raise SystemExit(f"{study.name} has no arm {unknown[0]}: {', '.join(study.arms)}")
    return replace(
        study,
        seeds=study.seeds[: options.seeds],
        networks=tuple(n for n in study.networks if n in options.networks),
        arms=tuple(arm for arm in study.arms if arm in (options.arms or study.arms)),
    )


def run_study(study: Study, data: str, folder: Path, options: argparse.Namespace) -> None:
    """Run what is missing (all of it without `--resume`): tuning first, then what counts."""
    path = folder / FOLDER / f"{study.name}.jsonl"
    _run_configs("learning rates", study.tuning(data), path, folder, options)
    rates = tables.rates_to_run(study, tables.finalists(study, data, read_rows(folder)))
    _run_configs("final runs", study.final(data, rates), path, folder, options)


def _run_configs(
    what: str, configs: Sequence[Config], path: Path, folder: Path, options: argparse.Namespace
) -> None:
    if options.resume:
        configs = missing(configs, read_rows(folder))
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(what, total=len(configs))
        for row in _rows(configs, options):
            append(path, row)
            named = f"{what}: {row.config['network']} {row.config['arm']}, seed {row.seed}"
            progress.update(task, advance=1, description=named)


def _rows(configs: Sequence[Config], options: argparse.Namespace) -> Iterator[Row]:
    """Rows as they come in; with several jobs, each in a process with its own threads."""
    if options.jobs == 1:
        yield from (run(config, options.device) for config in configs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        options.jobs, context, torch.set_num_threads, (options.threads,)
    ) as pool:
        futures = [pool.submit(run, config, options.device) for config in configs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _run_dogs(options: argparse.Namespace, folder: Path) -> None:
    from benchmarks.evidence import dogs_training

    if options.data is None:
        raise SystemExit(f"--data must be the folder of Stanford Dogs: {dogs.REMEDY}")
    recipe = dogs.RECIPES[options.study]
    arms = options.arms or list(dogs_training.ARMS)
    unknown = [arm for arm in arms if arm not in dogs_training.ARMS]
    if unknown:
        raise SystemExit(
            f"{options.study} has no arm {unknown[0]}: {', '.join(dogs_training.ARMS)}"
        )
    dogs_training.run_all(
        dogs_training.quick(recipe) if options.quick else recipe,
        Path(options.data),
        folder / FOLDER,
        arms=arms,
        seeds=range(options.seeds or 1),
        device=options.device,
        resume=options.resume,
    )


def _print(study: Study, data: str, rows: dict[str, Row]) -> None:
    console = Console()
    for network in study.networks:
        found = tables.cells(study, data, network, rows)
        table = Table(*tables.HEADER, title=f"{study.title}: {network}")
        for row in tables.table_rows(study, found):
            table.add_row(*row)
        console.print(table, markup=False)
        for sentence in tables.sorted_by_side(study, found):
            console.print(f"* {sentence}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
