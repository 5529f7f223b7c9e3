"""A plan as text: a table of reads, what doesn't read, and the totals."""

from __future__ import annotations

from itertools import groupby

from aim_surgery.errors import listed
from aim_surgery.planning.parts import MEMORY, Memory, Read, Write
from aim_surgery.planning.plan import Plan

_TIMES = "\N{MULTIPLICATION SIGN}"
_NUMBERS = ("K", "k", "version", "parameters", "MACs")
_COLUMNS = ("site", "kind", "size", "K", "k", "read", "version", "layer", "parameters", "MACs")


def plan_text(plan: Plan) -> str:
    """Write a plan for a reader.

    Args:
        plan: Any plan.

    Returns:
        Lines of text: the table of reads and writes in execution order, what was left out with
        reasons, totals.
    """
    rows = [_COLUMNS, *_rows(plan)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = ["  ".join(_cell(i, row[i], widths[i]) for i in range(len(row))) for row in rows]
    lines.insert(1, "  ".join("─" * width for width in widths))
    lines += ["", *_skips(plan), *_totals(plan)]
    return "\n".join(line.rstrip() for line in lines)


def _rows(plan: Plan) -> list[tuple[str, ...]]:
    """Reads in execution order, and each write where what it makes is first read."""
    rows, pending = [], list(plan.writes)
    for read in plan.reads:
        made = [w for w in pending if w.memory == read.memory and w.version <= read.version]
        rows += [_write_row(plan, write) for write in made]
        pending = [write for write in pending if write not in made]
        rows.append(_read_row(read))
    return rows + [_write_row(plan, write) for write in pending]


def _read_row(read: Read) -> tuple[str, ...]:
    site = read.site
    how = f"{read.how}, averaged" if read.averaged else read.how
    kind = site.kind if site.groups == 1 else f"{site.kind} /{site.groups}"
    layer = "widened" if site.widens else "beside"
    sizes = (_size(site.spatial), f"{read.available}", f"{read.planes}")
    version = _version(read.memory, read.version)
    return (site.name, kind, *sizes, how, version, layer, f"{read.parameters:,}", _short(read.macs))


def _write_row(plan: Plan, write: Write) -> tuple[str, ...]:
    point = write.point
    sizes = (_size(point.spatial), f"{write.available}", f"{write.planes}")
    how = f"{write.mode}, a {write.per}"
    widths = "-".join(str(width) for width in write.widths)
    version = f"{write.source} -> {_version(write.memory, write.version)}"
    costs = (f"{write.parameters:,}", _short(plan.macs_of(write)))
    return (f"{point.name}:", f"write {point.stage}", *sizes, how, version, widths, *costs)


def _version(memory: str, version: int) -> str:
    return f"{version}" if memory == MEMORY else f"{memory} {version}"


def _size(spatial: tuple[int, ...]) -> str:
    return _TIMES.join(str(size) for size in spatial) or "-"


def _cell(column: int, text: str, width: int) -> str:
    return text.rjust(width) if _COLUMNS[column] in _NUMBERS else text.ljust(width)


def _skips(plan: Plan) -> list[str]:
    lines = []
    for what, skips in (("read", plan.skips), ("written", plan.unwritten)):
        for reason, group in groupby(skips, key=lambda skip: skip.reason):
            names = [skip.name for skip in group]
            lines.append(f"not {what}: {listed(names, 4)}: {reason}")
    return lines


def _totals(plan: Plan) -> list[str]:
    ratio = plan.new_parameters / max(plan.base_parameters, 1)
    lines = [_memory_line(memory) for memory in plan.memories]
    lines.append(f"reads       {len(plan.reads)} sites, {plan.read_parameters:,} parameters")
    if plan.writes:
        points = ", ".join(write.point.name for write in plan.writes)
        lines.append(f"writes      after {points}: {plan.write_parameters:,} parameters")
    lines += [
        f"parameters  {plan.base_parameters:,} -> {plan.total_parameters:,} "
        f"(+{plan.new_parameters:,}, {ratio:.2%}), {_short(plan.macs)} more multiply-accumulates "
        f"a sample",
        f"input       {plan.inputs.source}; new weights: {plan.init}",
    ]
    return lines + [f"note        {note}" for note in plan.notes]


def _memory_line(memory: Memory) -> str:
    layout = _TIMES.join(str(size) for size in memory.layout)
    name = "memory" if memory.name == MEMORY else f"memory {memory.name}"
    carried = ", state carried" if memory.carry == "state" else ""
    return (
        f"{name:<11} {memory.floats:,} floats ({layout}), {memory.parameters:,} parameters{carried}"
    )


def _short(count: int) -> str:
    for limit, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return str(count)
