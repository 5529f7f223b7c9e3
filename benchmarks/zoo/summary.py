"""From rows to totals, groups of failures and a Markdown page."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.zoo.libraries import Library
from benchmarks.zoo.rows import BRIEF, FULL, LIGHT, NOT, PARTLY, TRACED, WHOLE, Row

RATIO_LIMIT = 1.5
SMALL_GRAPH, LARGE_GRAPH = 1000, 4000
LINEAR_LIMIT = 1.5
SLOWEST = 20
_EXAMPLES = 6
_WIDEST = 240

METHOD = (
    "Random weights from a fixed seed, evaluation mode, `transform` with default options, one "
    "torch thread (two, where a row's notes say so); example inputs as aim_surgery finds them (of "
    "transformers and others, given).",
    "Full checks are `verify`: both modes, several batches, float64, gradients, the audit of "
    "weights. Images and clips are cut to the smallest size of 96, 128, 160 (64, 96) pixels that "
    "both models take, if that is two thirds of the example's or less; the graph stays the one "
    "captured at the full size. Detectors are checked with targets, without which they do not "
    "train, and are built to resize their images to 64 pixels, where they resize at all.",
    "Light checks with `--light`, or where the full ones would take more memory (36 bytes a "
    "parameter and six times the activations of one image) or time (45 training steps) than the "
    "limits leave: outputs in evaluation mode in the model's own dtype, outputs and buffers in "
    "training mode in float64 (of detectors, training in their own dtype alone), one backward of "
    "the operated model, the audit on the meta device. Brief checks where these, too, would take "
    "more: the same with nothing in float64. Where one training step at the example's size takes "
    "more memory than there is, it is not timed, and the operated model's backward keeps on disk "
    "what it needs. On meta only: no values are compared, and "
    "the model counts as not verified.",
    "Audited weights are the parameters that the original's kernels multiply with activations; "
    "reached are those that read the memory, accounted for also those left out for a reason. "
    "Models that could not be transformed have no audit and are in neither number.",
    "Time of the transform ÷ time of the original's forward and backward of one sample at the "
    "example's size, in evaluation mode, of detectors in training (the fastest of three; of a slow "
    "model the first); imports of the libraries are done before. Seconds of the process's one "
    "core, so that what runs beside counts little.",
)


@dataclass(frozen=True)
class Total:
    """One figure of the summary.

    Attributes:
        name: What it is.
        value: The figure as text.
        limit: What it must be, as text; "-" where nothing is promised.
        ok: Whether it is; None where nothing is promised.
    """

    name: str
    value: str
    limit: str = "-"
    ok: bool | None = None

    def cells(self) -> tuple[str, ...]:
        """The figure as cells of a table."""
        return self.name, self.value, self.limit, {True: "ok", False: "missed", None: "-"}[self.ok]


def totals(rows: Sequence[Row], library: Library, names: Sequence[str]) -> list[Total]:
    """Count, and hold against the limits.

    Args:
        rows: One for each model that was tried.
        library: Gives the limits.
        names: All its models.

    Returns:
        The figures; shares are of the models that were tried.
    """
    count = len(rows)
    verified = sum(row.ok for row in rows)
    checked = Counter(row.checks for row in rows if row.ok)
    whole = f"{len(names):,} models"
    found = [
        Total("models tried", f"{count:,} of {whole}", whole, count >= len(names)),
        _count("transformed", sum(row.captured != NOT for row in rows), count),
        _count("  traced whole", sum(row.captured == TRACED for row in rows), count),
        _count("  partly opaque", sum(row.captured == PARTLY for row in rows), count),
        _count("  kept whole", sum(row.captured == WHOLE for row in rows), count),
        _count("transformed and verified", verified, count, library.verified),
        _count("  of these, full checks", checked[FULL], count),
        _count("  of these, light checks", checked[LIGHT], count),
        _count("  of these, brief checks", checked[BRIEF], count),
        _count("on meta only", sum(row.device == "meta" for row in rows), count),
        _count("training reaches all that is new", sum(bool(r.backward) for r in rows), count),
    ]
    for index, what in enumerate(("audited weights", "their elements")):
        audited, reached, accounted = (
            sum(getattr(row, kind)[index] for row in rows)
            for kind in ("audited", "reached", "accounted")
        )
        limit = None if index else library.reached
        found.append(_count(f"{what} reached", reached, audited, limit))
        found.append(_count(f"{what} accounted for", accounted, audited))
    ratios = [row.ratio for row in rows if row.ratio is not None]
    if ratios and library.timed:
        median, most = statistics.median(ratios), max(ratios)
        text = f"{median:.2f} (largest {most:.1f})"
        name = "time of transform ÷ forward and backward, median"
        found.append(Total(name, text, f"≤ {RATIO_LIMIT}", median <= RATIO_LIMIT))
    linear = _time_per_node(rows)
    if linear is not None:
        found.append(linear)
    for name, key in (("difference", "own dtype"), ("difference64", "float64")):
        values = [value for row in rows if (value := getattr(row, name)) is not None]
        if values:
            found.append(Total(f"largest difference, {key}", f"{max(values):.1e}"))
    hours = sum(row.total_seconds for row in rows) / 3600
    found.append(Total("time of all models, one after the other", f"{hours:.2f} h"))
    return found


def _time_per_node(rows: Sequence[Row]) -> Total | None:
    """Whether the operation is linear in nodes: large graphs take no longer a node than small."""
    each = sorted(
        (row.nodes, 1e3 * row.transform_seconds / row.nodes)
        for row in rows
        if row.nodes and row.transform_seconds
    )
    small = [time for nodes, time in each if nodes <= SMALL_GRAPH]
    large = [time for nodes, time in each if nodes >= LARGE_GRAPH]
    if not small or not large:
        return None
    medians = statistics.median(small), statistics.median(large)
    nodes, largest = each[-1]
    text = (
        f"{medians[0]:.2f} ms to {SMALL_GRAPH:,} nodes, {medians[1]:.2f} ms from {LARGE_GRAPH:,} "
        f"on, {largest:.2f} ms at {nodes:,}"
    )
    ok = max(medians[1], largest) <= LINEAR_LIMIT * medians[0]
    return Total("time of transform a node, medians", text, f"≤ {LINEAR_LIMIT} of the first", ok)


def _count(name: str, count: int, of: int, limit: float | None = None) -> Total:
    share = count / of if of else 0.0
    value = f"{count:,} of {of:,} ({share:.2%})"
    if limit is None:
        return Total(name, value)
    return Total(name, value, f"≥ {limit:.1%}", share >= limit)


# Failures -----------------------------------------------------------------------------------


def failures(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows that are not ok, grouped by what their first error comes down to."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if not row.ok:
            error = (
                row.errors[0]
                if row.errors
                else "on meta only: transformed and audited, no values compared"
            )
            groups.setdefault(group_key(error), []).append(row)
    return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))


def group_key(error: str) -> str:
    """What an error comes down to: without names of models, numbers, and shapes.

    Args:
        error: A row's error, `STAGE: TYPE: MESSAGE`.

    Returns:
        The stage, and the line of code and the error that stand in the message, if there are any.
    """
    stage, _, message = error.partition(": ")
    fails = message.partition("the operated model fails: ")[2]
    differs = _DIFFERS.match(message)
    if fails:
        message = f"the operated model fails: {fails}"
    elif differs:
        return f"{stage}: {differs[1]} differ, {differs[2]}"
    tried = message.partition(". Tried ")[2]
    prefix = "no example input fits: " if tried else ""
    lines = _LINE.findall(message)
    if lines:
        file, number, code, what = lines[0]
        file = re.sub(r".*/site-packages/", "", file)
        message = f"{what} at {file}:{number} `{code}`"
    else:
        message = tried or message
        message = re.sub(r"\w+ failed( in '[^']*')? with the example inputs \(.*?\): ", "", message)
        message = re.sub(r"\[[\d, ]*\]|\([\d, ]*\)", "[…]", message)
        message = re.sub(r"(?<![\w.])\w+(\.\w+)*\.(?=[a-zA-Z_])", "….", message)
        message = re.sub(r"(?<!class )(?<!\w)'[^']*'", "'…'", message)
        message = re.sub(r"(?<![A-Za-z\d])\d[\d.,]*(e[+-]?\d+)?", "N", message)
    text = f"{stage}: {prefix}{message}"
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"


_DIFFERS = re.compile(r"(\w+) differ by \S+ \(limit \S+\), (.*?), .*")
_LINE = re.compile(r" at (\S+):(\d+) `([^`]*)`: (.*?)(?=; \(|; '|$)")


# Files --------------------------------------------------------------------------------------


def write(
    folder: Path,
    name: str,
    library: Library,
    names: Sequence[str],
    rows: dict[str, Row],
    environment: dict[str, Any],
) -> tuple[Path, Path]:
    """Write `NAME.json` and `NAME.md`.

    Args:
        folder: Where to.
        name: Of the library.
        library: Gives the limits.
        names: All its models.
        rows: The newest of each model; those that the library no longer has are left out.
        environment: Machine and versions.

    Returns:
        Both paths.
    """
    chosen = [rows[model] for model in names if model in rows]
    figures, groups = totals(chosen, library, names), failures(chosen)
    sources = Counter(row.source for row in chosen)
    reasons = Counter[str]()
    for row in chosen:
        reasons.update(row.left_out)
    opaque: Counter[str] = Counter()
    for row in chosen:
        for reason, _, count in row.opaque:
            opaque[reason or "no reason noted"] += count
    slowest = sorted(chosen, key=lambda row: -row.total_seconds)[:SLOWEST]
    content = {
        "library": name,
        "totals": [total.cells() for total in figures],
        "sources": sources,
        "failures": {key: [row.model for row in group] for key, group in groups.items()},
        "errors": {row.model: row.errors for row in chosen if row.errors},
        "left_out": reasons,
        "opaque": opaque,
        "environment": environment,
    }
    parts = [
        f"# The zoo: {name}",
        f"Written by `python -m benchmarks.zoo --library {name}`; the rows of all models are in "
        f"`{name}*.jsonl`, the lists without their cuts in `{name}.json`.",
        table(("what", "measured", "limit", "verdict"), [total.cells() for total in figures]),
        "\n".join(f"* {sentence}" for sentence in METHOD),
        "## Failures",
        table(("models", "reason", "such as"), list(_failure_cells(groups))),
        "## Weights left out",
        table(("weights", "reason"), _by_count(reasons)),
        "## Opaque submodules",
        table(("submodules", "reason"), _by_count(opaque)),
        f"## The {SLOWEST} slowest",
        table(_HEADER, [_cells(row) for row in slowest]),
        "## Environment",
        table(("", ""), [(key, str(value)) for key, value in environment.items()]),
        "Source of the package, by digest: "
        + ", ".join(f"{digest} ({count} rows)" for digest, count in sources.most_common()),
    ]
    as_json, as_markdown = folder / f"{name}.json", folder / f"{name}.md"
    as_json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    as_markdown.write_text("\n\n".join(parts) + "\n", "utf-8")
    return as_json, as_markdown


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; "none" where there are no rows."""
    if not rows:
        return "none"
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _failure_cells(groups: dict[str, list[Row]]) -> Iterable[tuple[str, ...]]:
    for key, rows in groups.items():
        names = [row.model for row in rows[:_EXAMPLES]]
        more = f" and {len(rows) - _EXAMPLES} more" if len(rows) > _EXAMPLES else ""
        yield str(len(rows)), key, ", ".join(names) + more


def _by_count(counts: Counter[str]) -> list[tuple[str, str]]:
    return [(f"{count:,}", reason) for reason, count in counts.most_common(_SHOWN)]


_SHOWN = 30
_HEADER = ("model", "s", "transform, s", "step, s", "ratio", "nodes", "parameters", "GiB", "checks")


def _cells(row: Row) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    figures: tuple[Callable[[], str], ...] = (
        lambda: f"{row.total_seconds:.0f}",
        lambda: number(row.transform_seconds, ".2f"),
        lambda: number(row.step_seconds, ".2f"),
        lambda: number(row.ratio, ".2f"),
        lambda: f"{row.nodes:,}",
        lambda: f"{row.parameters:,}",
        lambda: f"{row.peak_gib:.1f}",
        lambda: row.checks if row.ok else f"{row.checks or row.stage}: not ok",
    )
    return row.model, *(figure() for figure in figures)
