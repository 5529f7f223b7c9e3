"""Print the original next to the operation's rebuild of it.

python -m benchmarks.lunkad2021
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from benchmarks.lunkad2021.comparison import compare


def main() -> None:
    """Print the table; exit code 1 where a figure differs."""
    lines = compare()
    table = Table("what", "original", "ours", title="Lunkad 2021, AiM-ResNet50 at 100 classes")
    for line in lines:
        table.add_row(line.what, line.original, line.ours, style="" if line.same else "bold red")
    Console().print(table)
    off = [line.what for line in lines if not line.same]
    if off:
        raise SystemExit(f"{len(off)} of {len(lines)} figures differ: {'; '.join(off)}")
    print(f"all {len(lines)} figures agree")


if __name__ == "__main__":
    main()
