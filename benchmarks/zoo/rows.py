"""The row of one model, and the files of rows: one JSON object a line, appended at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import aim_surgery
from benchmarks import row_files

TRACED, PARTLY, WHOLE, NOT = "traced", "partly opaque", "kept whole", "not"
FULL, LIGHT, BRIEF = "full", "light", "brief"
DEFERRED, DONE = "deferred", "done"


@dataclass
class Row:
    """What came of one model.

    Attributes:
        library: "torchvision", "timm" or "transformers".
        model: Its name there.
        source: Digest of the package's source that did it.
        finished: When, in seconds since 1970.
        stage: How far it came: "building", "transforming", "describing", "timing", "verifying",
            "done".
        device: "cpu", or "meta" where the memory is too small for the weights.
        parameters: Of the original.
        captured: "traced", "partly opaque", "kept whole" (its own forward stays Python) or "not".
        opaque: Why submodules stay Python calls ("" where no reason is known), the first path of
            each reason, and how many there are.
        inputs: The example inputs in words.
        found: Where they come from.
        nodes: Of the emitted graph.
        reads: Sites that read.
        skips: What does not, with a reason in the plan.
        checks: "full" (`verify`), "light", "brief" (see `checks.py`) or "".
        checked_on: The inputs of the checks, in words.
        verified: Whether all checks passed.
        audited: Weights that the audit saw multiplied with activations, and their elements.
        reached: Those of them that read the memory.
        accounted: Those that read or are left out for a reason in the plan.
        left_out: Weights by reason.
        difference: Largest of the outputs, in the model's own dtype.
        difference64: Largest of outputs, gradients and buffers in float64.
        backward: Mode in which training reached all that is new; "" where it didn't.
        transform_seconds: Of `transform`, of one core.
        step_seconds: Of the original's forward and backward, batch 1, of one core.
        total_seconds: Of everything, on the wall.
        peak_gib: The largest resident set, the libraries included.
        errors: What failed, a line each.
        notes: What the checks could not judge.
    """

    library: str
    model: str
    source: str = ""
    finished: float = 0.0
    stage: str = "building"
    device: str = "cpu"
    parameters: int = 0
    captured: str = NOT
    opaque: list[tuple[str, str, int]] = field(default_factory=list)
    inputs: str = ""
    found: str = ""
    nodes: int = 0
    reads: int = 0
    skips: int = 0
    checks: str = ""
    checked_on: str = ""
    verified: bool = False
    audited: list[int] = field(default_factory=lambda: [0, 0])
    reached: list[int] = field(default_factory=lambda: [0, 0])
    accounted: list[int] = field(default_factory=lambda: [0, 0])
    left_out: dict[str, int] = field(default_factory=dict)
    difference: float | None = None
    difference64: float | None = None
    backward: str = ""
    transform_seconds: float | None = None
    step_seconds: float | None = None
    total_seconds: float = 0.0
    peak_gib: float = 0.0
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        """Time of the operation ÷ time of a forward and backward."""
        if self.transform_seconds is None or not self.step_seconds:
            return None
        return self.transform_seconds / self.step_seconds

    @property
    def ok(self) -> bool:
        """Whether it was transformed and verified."""
        return self.verified and not self.errors

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Row:
        """From JSON; what older rows have besides is dropped."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in plain.items() if name in known})


def source_digest() -> str:
    """Digest of the package's source, committed or not."""
    digest = hashlib.sha256()
    folder = Path(aim_surgery.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def rows_file(folder: Path, library: str, shard: tuple[int, int] | None) -> Path:
    """The file that a run appends to."""
    suffix = f"-{shard[0]}-of-{shard[1]}" if shard else ""
    return folder / f"{library}{suffix}.jsonl"


def append(path: Path, row: Row) -> None:
    """Add a row; it is on disk when this returns."""
    row_files.append(path, row.plain())


def read_rows(folder: Path, library: str) -> dict[str, Row]:
    """The newest row of each model, from all files of a library."""
    files = (*folder.glob(f"{library}.jsonl"), *folder.glob(f"{library}-*-of-*.jsonl"))
    return _newest(row for path in files for row in row_files.rows_in(path, Row.of))


def compact(path: Path) -> None:
    """Leave only the newest row of each model, in the order of names."""
    rows = _newest(row_files.rows_in(path, Row.of))
    lines = [json.dumps(rows[name].plain(), ensure_ascii=False) for name in sorted(rows)]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _newest(rows: Iterable[Row]) -> dict[str, Row]:
    return row_files.newest(rows, lambda row: row.model)
