"""What files cost: the whole command next to a bare load and save, and peak memory.

    python -m benchmarks.checkpoint [--part time|memory] [--pairs 7] [--quick] [--output FOLDER]

Every figure is of whole processes, as a user starts them.
"""

from __future__ import annotations

import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from aim_surgery.checkpoint.models import build
from aim_surgery.checkpoint.models.skeleton import build_skeleton
from aim_surgery.checkpoint.reading.source import Entry
from aim_surgery.checkpoint.reading.torch_file import entry_of
from aim_surgery.checkpoint.writing.safetensors_file import write_safetensors
from aim_surgery.checkpoint.writing.shards import write_shards
from aim_surgery.checkpoint.writing.torch_file import Placeholders, write_torch
from benchmarks import measure
from benchmarks.measure import Pairs, Report, Row

RATIO_LIMIT = 1.6
OWN_LIMIT = 0.5  # seconds
PEAK_LIMIT = 1.3
SHARDED_LIMIT = 4.0  # GB

PARTS = ("time", "memory")

ROOT = Path(__file__).parent.parent
LARGE = f"{ROOT / 'benchmarks' / 'large_models.py'}"
CLI = [sys.executable, "-m", "aim_surgery.cli"]
# What a script without this package does with the same file; `import_torchvision` is
# `import torchvision`, also where its compiled operators don't load.
BASELINE = """
import sys, torch
from aim_surgery.checkpoint.models.torchvision_ops import import_torchvision
import_torchvision()
torch.save(torch.load(sys.argv[1]), sys.argv[2])
"""

METHOD = (
    "All figures are of whole processes, started by `subprocess`; files are in the page cache.",
    "Row 1: `aim-surgery transform resnet50.pt --model torchvision:resnet50 -o OUT` and `python -c "
    '"import torch, torchvision; torch.save(torch.load(FILE), OUT)"` take turns, one warm-up each; '
    "measured is the median of the ratios of neighbours.",
    "Own time: the process less `python -c pass`, medians of as many turns.",
    "Peak memory: `ru_maxrss` of the process, resident pages of mapped files included; GB are 10⁹ "
    "bytes. The checkpoints hold drawn values, so no page is shared or left out.",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    command = measure.parser("checkpoint", "Time and memory of operations on files.")
    command.add_argument("--part", choices=PARTS, help="half of it, into a file of its own")
    options = measure.parse(command, argv)
    measure.require("torchvision")
    found = measure.environment()
    os.environ["PYTHONPATH"] = f"{ROOT}"  # this package, wherever the process is started
    with tempfile.TemporaryDirectory(prefix="aim-surgery-") as name:
        folder = Path(name)
        rows: list[Row] = []
        if options.part != "memory":
            rows += [_ratio_row(folder, options.pairs), *_own_rows(folder, options.pairs)]
        if options.part != "time":
            for kind in ("safetensors", "pt"):
                rows.append(_peak_row(folder, kind, layers=4 if options.quick else 60))
            rows.append(_sharded_row(folder, layers=2 if options.quick else 24))
    settings = {"pairs": options.pairs, "threads": options.threads, "quick": options.quick}
    if options.part is not None:
        settings = {"part": options.part, **settings}
    report = Report(
        name="checkpoint",
        suffix="" if options.part is None else f"_{options.part}",
        title="Cost of files" + (" (quick run)" if options.quick else ""),
        method=METHOD,
        settings=settings,
        environment=found,
        rows=tuple(rows),
    )
    report.print()
    print("written:", *report.write(options.output))


# Time ---------------------------------------------------------------------------------------


def _ratio_row(folder: Path, pairs: int) -> Row:
    measure.progress("transform against load and save")
    torch.manual_seed(measure.SEED)
    checkpoint = folder / "resnet50.pt"
    torch.save(build("torchvision:resnet50").state_dict(), checkpoint)
    output = folder / "aim.safetensors"
    words = ["transform", checkpoint, "--model", "torchvision:resnet50", "-o", output]
    baseline = [sys.executable, "-c", BASELINE, checkpoint, folder / "again.pt"]
    turns = measure.take_turns(_running(*CLI, *words), _running(*baseline), pairs=pairs)
    what = "whole `transform` of a ResNet50 ÷ import, load and save"
    return measure.ratio_row(what, turns, RATIO_LIMIT, ("transform", "load and save"))


def _own_rows(folder: Path, pairs: int) -> list[Row]:
    rows = []
    large = folder / "aim.safetensors"
    for what, words in {
        "`--help`": ["--help"],
        "`inspect` of a safetensors file": ["inspect", large],
        "`inspect` of a PyTorch file": ["inspect", folder / "resnet50.pt"],
    }.items():
        measure.progress(what)
        turns = measure.take_turns(
            _running(*CLI, *words), _running(sys.executable, "-c", "pass"), pairs=pairs
        )
        rows.append(_own_row(f"own seconds of {what}, torch not imported", turns, words))
    return rows


def _own_row(what: str, turns: Pairs, words: Sequence[object]) -> Row:
    code = "import sys; from aim_surgery import cli\ntry:\n cli.app(sys.argv[1:])\nfinally:\n"
    code += " assert 'torch' not in sys.modules"
    _running(sys.executable, "-c", code, *words)()
    own = [first - second for first, second in zip(turns.first, turns.second, strict=True)]
    note = turns.describe("aim-surgery", "python")
    return Row(what, statistics.median(own), OWN_LIMIT, (min(own), max(own)), note, {"own": own})


def _running(*command: object) -> Callable[[], None]:
    words = [str(word) for word in command]

    def run() -> None:
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)

    return run


# Memory -------------------------------------------------------------------------------------


def _peak_row(folder: Path, kind: str, *, layers: int) -> Row:
    measure.progress(f"peak memory of a large .{kind} file")
    checkpoint, output = folder / f"large.{kind}", folder / f"aim.{kind}"
    entries = _entries(f"{LARGE}:chain", {"layers": layers})
    if kind == "pt":
        placeholders = Placeholders()
        content = {
            name: placeholders.add(entry.shape, entry.dtype, lambda e=entry: _drawn(e))
            for name, entry in entries.items()
        }
        write_torch(checkpoint, content, placeholders)
    else:
        write_safetensors(checkpoint, entries, lambda name: _drawn(entries[name]), {})
    size = checkpoint.stat().st_size
    args = ("--model-args", f'{{"layers": {layers}}}')
    words = ["transform", checkpoint, "--model", f"{LARGE}:chain", *args, "-o", output]
    peak = measure.in_fresh_process(peak_of, [str(word) for word in (*CLI, *words)])
    written = output.stat().st_size
    checkpoint.unlink()
    output.unlink()
    note = f"{peak / 1e9:.2f} GB ÷ {size / 1e9:.2f} GB, {written / 1e9:.2f} GB written"
    details = {"peak_bytes": peak, "file_bytes": size, "written_bytes": written}
    what = f"peak memory ÷ size of a {size / 1e9:.1f} GB .{kind} file, to .{kind}"
    return Row(what, peak / size, PEAK_LIMIT, note=note, details=details)


def _sharded_row(folder: Path, *, layers: int) -> Row:
    measure.progress("peak memory of a sharded checkpoint")
    source, target = folder / "in", folder / "out"
    source.mkdir()
    target.mkdir()
    entries = _entries(f"{LARGE}:llama", {"layers": layers})
    index = source / "model.safetensors.index.json"
    write_shards(index, entries, lambda name: _drawn(entries[name]), {})
    size = sum(file.stat().st_size for file in source.iterdir())
    args = ("--model-args", f'{{"layers": {layers}}}')
    output = target / index.name
    words = ["transform", index, "--model", f"{LARGE}:llama", *args, "-o", output]
    peak = measure.in_fresh_process(peak_of, [str(word) for word in (*CLI, *words)])
    written = sum(file.stat().st_size for file in target.iterdir())
    shards = len(list(source.glob("*.safetensors"))), len(list(target.glob("*.safetensors")))
    note = (
        f"{size / 1e9:.2f} GB in {shards[0]} shards in, {written / 1e9:.2f} GB in {shards[1]} out"
    )
    details = {"peak_bytes": peak, "file_bytes": size, "written_bytes": written}
    what = "peak GB of a sharded Llama-like checkpoint, bfloat16, to shards"
    return Row(what, peak / 1e9, SHARDED_LIMIT, note=note, details=details)


def _entries(spec: str, args: dict[str, int]) -> dict[str, Entry]:
    return {
        name: entry_of(value) for name, value in build_skeleton(spec, args).state_dict().items()
    }


def _drawn(entry: Entry) -> torch.Tensor:
    generator = torch.Generator().manual_seed(math.prod(entry.shape))
    values = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
    return values.uniform_(-0.01, 0.01, generator=generator)


def peak_of(words: list[str]) -> int:
    """Run a command; to be called in a fresh process, whose only child it is.

    Args:
        words: The command.

    Returns:
        The most memory that it had resident, in bytes.
    """
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


if __name__ == "__main__":
    main()
