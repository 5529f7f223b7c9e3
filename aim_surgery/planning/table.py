"""A plan as text: a table of reads, what doesn't read, and the totals."""

from __future__ import annotations

from itertools import groupby

from aim_surgery.planning.plan import Plan, Read

_TIMES = "\N{MULTIPLICATION SIGN}"
_NUMBERS = ("K", "k", "parameters", "MACs")
_COLUMNS = ("site", "kind", "size", "K", "k", "read", "layer", "parameters", "MACs")


def plan_text(plan: Plan) -> str:
    """Write a plan for a reader.

    Args:
        plan: Any plan.

    Returns:
        Lines of text: the table, left-out weights with reasons, totals.
    """
    rows = [_COLUMNS, *(_row(read) for read in plan.reads)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = ["  ".join(_cell(i, row[i], widths[i]) for i in range(len(row))) for row in rows]
    lines.insert(1, "  ".join("─" * width for width in widths))
    lines += ["", *_skips(plan), *_totals(plan)]
    return "\n".join(line.rstrip() for line in lines)


def _row(read: Read) -> tuple[str, ...]:
    site = read.site
    how = f"{read.how}, averaged" if read.averaged else read.how
    size = _TIMES.join(str(size) for size in site.spatial) or "-"
    kind = site.kind if site.groups == 1 else f"{site.kind} /{site.groups}"
    layer = "widened" if site.widens else "beside"
    numbers = (f"{read.parameters:,}", _short(read.macs))
    return (site.name, kind, size, f"{read.available}", f"{read.planes}", how, layer, *numbers)


def _cell(column: int, text: str, width: int) -> str:
    return text.rjust(width) if _COLUMNS[column] in _NUMBERS else text.ljust(width)


def _skips(plan: Plan) -> list[str]:
    lines = []
    for reason, group in groupby(plan.skips, key=lambda skip: skip.reason):
        names = [skip.name for skip in group]
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        lines.append(f"not read: {shown}: {reason}")
    return lines


def _totals(plan: Plan) -> list[str]:
    layout = _TIMES.join(str(size) for size in plan.memory.layout)
    ratio = plan.new_parameters / max(plan.base_parameters, 1)
    lines = [
        f"memory      {plan.memory.floats:,} floats ({layout}), "
        f"{plan.memory.parameters:,} parameters",
        f"reads       {len(plan.reads)} sites, {plan.read_parameters:,} parameters, "
        f"{_short(plan.macs)} more multiply-accumulates a sample",
        f"parameters  {plan.base_parameters:,} -> {plan.total_parameters:,} "
        f"(+{plan.new_parameters:,}, {ratio:.2%})",
        f"input       {plan.inputs.source}; new weights: {plan.init}",
    ]
    return lines + [f"note        {note}" for note in plan.notes]


def _short(count: int) -> str:
    for limit, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return str(count)
