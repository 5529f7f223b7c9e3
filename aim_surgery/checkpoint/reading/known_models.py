"""Which of torchvision's and timm's models a file may belong to, by names and shapes of tensors.

    digest of all names -> spec, digest of the shapes but the classifier's, the classifier's names,
                           the usual number of classes

The table beside this file is made by `python -m benchmarks.known_models`. It only gives a hint:
what fits is found by comparing with the model, as every command does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from aim_surgery.checkpoint.reading.source import Entry

TABLE = Path(__file__).with_name("known_models.json")
_HEX = 12


def models_that_fit(entries: Mapping[str, Entry], prefix: str = "") -> list[str]:
    """Models that have a file's names and shapes.

    Args:
        entries: What the file holds.
        prefix: What stands before all names.

    Returns:
        Model specs, with the number of classes where it is not the usual one.
    """
    shapes = {name.removeprefix(prefix): entry.shape for name, entry in entries.items()}
    try:
        rows = json.loads(TABLE.read_text(encoding="utf-8"))["models"]
    except (OSError, ValueError, KeyError):
        return []
    found = []
    for spec, digest, head, usual in rows.get(names_digest(shapes), ()):
        if shapes_digest(shapes, head) == digest:
            classes = {shapes[name][0] for name in head}
            told = (
                f" --model-args '{{\"num_classes\": {min(classes)}}}'" if classes - {usual} else ""
            )
            found.append(spec + told)
    return found


def names_digest(names: Iterable[str]) -> str:
    """A short name for a set of names."""
    return _digest("\n".join(sorted(names)))


def shapes_digest(shapes: Mapping[str, tuple[int, ...]], head: Iterable[str]) -> str:
    """A short name for shapes, leaving out what depends on the number of classes."""
    left = {name: list(shape) for name, shape in shapes.items() if name not in set(head)}
    return _digest(json.dumps(sorted(left.items())))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_HEX]
