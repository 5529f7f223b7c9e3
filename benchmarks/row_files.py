"""Files of rows: one JSON object a line, on disk as soon as it is there.

A sweep can be stopped at any moment and taken up again; of several rows of one thing the newest
counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar


class Finished(Protocol):
    """A row that tells when it was finished, in seconds since 1970."""

    finished: float


_Row = TypeVar("_Row", bound=Finished)


def append(path: Path, plain: dict[str, Any]) -> None:
    """Add a row; it is on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # a line that a crash cut short takes no other with it
                file.write(b"\n")
        file.write(json.dumps(plain, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def rows_in(path: Path, make: Callable[[dict[str, Any]], _Row]) -> list[_Row]:
    """The rows of a file; a line that a crash cut short is left out, so that its row is made again.

    Args:
        path: The file; one that is missing has no rows.
        make: From an object to a row.
    """
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(make(json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            continue
    return rows


def newest(rows: Iterable[_Row], name: Callable[[_Row], str]) -> dict[str, _Row]:
    """The newest row of each name."""
    found: dict[str, _Row] = {}
    for row in rows:
        key = name(row)
        if key not in found or row.finished >= found[key].finished:
            found[key] = row
    return found
