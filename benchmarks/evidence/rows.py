"""The row of one run, and files of rows: one JSON object a line, appended at once."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from benchmarks import row_files
from benchmarks.evidence.recipes import Config
from benchmarks.zoo.rows import source_digest

FOLDER = "rows"
_LIBRARIES = ("torch", "numpy", "peft", "scikit-learn", "scipy")


@dataclass
class Row:
    """What came of one run.

    Attributes:
        digest: Of the configuration.
        config: The configuration, as JSON.
        finished: When, in seconds since 1970.
        versions: Libraries, the digest of aim_surgery's source, and the instructions that a CPU
            computes with: another CPU rounds otherwise, and training grows that.
        device: "cpu" or the GPU's name.
        parameters: Of the model.
        trained_parameters: Those of them that were trained.
        curve: [epochs done, training loss, validation accuracy], some points.
        validation: Accuracy at the end of training.
        test: Accuracy on the test set; None in tuning.
        test_zeroed: The same network's with its memory zeroed at evaluation.
        test_swapped: The same network's where every image reads what was written of another.
        steps: Training steps.
        train_seconds: Of all steps.
        total_seconds: Of everything.
        memory: Its layout, and its floats before and after training, of one run a network.
    """

    digest: str
    config: dict[str, Any]
    finished: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    parameters: int = 0
    trained_parameters: int = 0
    curve: list[list[float]] = field(default_factory=list)
    validation: float = 0.0
    test: float | None = None
    test_zeroed: float | None = None
    test_swapped: float | None = None
    steps: int = 0
    train_seconds: float = 0.0
    total_seconds: float = 0.0
    memory: dict[str, Any] | None = None

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.config["seed"]

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Row:
        """From JSON; what other versions' rows have besides is dropped."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in plain.items() if name in known})


def blank(config: Config, device: torch.device) -> Row:
    """A row with nothing measured yet."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {library: importlib.metadata.version(library) for library in _LIBRARIES}
    versions["aim-surgery source"] = source_digest()
    if device.type == "cpu":
        versions["instructions"] = torch.backends.cpu.get_cpu_capability()
    return Row(config.digest, asdict(config), versions=versions, device=name)


def append(path: Path, row: Row) -> None:
    """Add a row; it is on disk when this returns."""
    row_files.append(path, asdict(row))


def read_rows(folder: Path) -> dict[str, Row]:
    """The newest row of each configuration, by digest, from all studies' files."""
    paths = sorted((folder / FOLDER).glob("*.jsonl"))
    rows = (row for path in paths for row in row_files.rows_in(path, Row.of))
    return row_files.newest(rows, lambda row: row.digest)


def missing(configs: Iterable[Config], rows: dict[str, Row]) -> list[Config]:
    """Configurations that have no row."""
    return [config for config in configs if config.digest not in rows]
