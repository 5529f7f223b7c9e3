"""What is in a file: its kind, its tensors, how they are named, and what was done to them.

Headers and outlines are read, never values, and torch is not imported: an answer takes a moment,
however large the file is. Only the question whether a model fits needs the model.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aim_surgery.checkpoint.reading.kinds import kind_of, open_source
from aim_surgery.checkpoint.reading.known_models import models_that_fit
from aim_surgery.checkpoint.reading.names import common_prefix
from aim_surgery.checkpoint.reading.nesting import (
    dotted,
    find_all,
    is_optimizer_state,
    is_state_dict,
    is_tensor,
    metadata_in,
    value_at,
    weights_in,
)
from aim_surgery.checkpoint.reading.outline import (
    Foreign,
    outline_of,
    outline_of_dcp,
    outline_of_exported,
)
from aim_surgery.checkpoint.reading.source import Entry, notes_in
from aim_surgery.errors import AimSurgeryError, CheckpointError, listed
from aim_surgery.file_format import FORM_KEY, FORMAT_KEY, MODEL_KEY, PLAN_KEY, VERSION_KEY

_SHOWN = 6
_DCP = "distributed checkpoint (DCP)"
_TOLD = {"version": VERSION_KEY, "form": FORM_KEY}  # of the operation, in the file's metadata


@dataclass(frozen=True)
class Inspection:
    """What a file holds.

    Attributes:
        path: The file or folder.
        kind: What sort of file.
        file_bytes: Its size on disk, of all its files.
        where: The place of the weights; None where it can't be told.
        entries: The weights.
        prefix: Wrappers that stand before all names.
        weights: All sets of weights in the file: place, and number of tensors.
        besides: What else the file holds, in words, by place.
        foreign: Classes of pickled objects, for which reading needs trust.
        metadata: Text that the file carries.
        problem: Why there are no weights to show.
        fits: Whether the model that was asked about fits: "yes", or what doesn't.
    """

    path: Path
    kind: str
    file_bytes: int
    where: str | None
    entries: Mapping[str, Entry]
    prefix: str
    weights: Mapping[str, int]
    besides: Mapping[str, str]
    foreign: tuple[str, ...]
    metadata: Mapping[str, str]
    problem: str | None = None
    fits: str | None = None

    @property
    def candidates(self) -> list[str]:
        """Known models of these names and shapes."""
        return [] if self.operation else models_that_fit(self.entries, self.prefix)

    @property
    def dtypes(self) -> dict[str, int]:
        """Number of tensors of each dtype."""
        return dict(Counter(entry.dtype for entry in self.entries.values()).most_common())

    @property
    def values(self) -> int:
        """Values of all tensors."""
        return sum(math.prod(entry.shape) for entry in self.entries.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def operation(self) -> dict[str, Any] | None:
        """What was done to the model, in short; None for an original one."""
        if FORMAT_KEY not in self.metadata:
            return None
        try:
            plan = json.loads(self.metadata[PLAN_KEY])
            found = {
                "model": plan["model"],
                "memory_floats": plan["memory"]["floats"],
                "reads": len(plan["reads"]),
                "writes": [write["point"]["name"] for write in plan["writes"]],
                "carry": plan["memory"]["carry"],
                "base_parameters": plan["base_parameters"],
                "emit": plan["emit"],
            }
        except (KeyError, TypeError, ValueError) as err:
            return {"damaged": repr(err)}
        told = {name: self.metadata.get(key, "unknown") for name, key in _TOLD.items()}
        return found | told

    @property
    def spec(self) -> str | None:
        """The model spec that the file names."""
        try:
            told = json.loads(self.metadata.get(MODEL_KEY, "{}"))
            return (
                f"{told['spec']} {json.dumps(told['args'])}" if told.get("args") else told["spec"]
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def to_json(self, *, keys: bool = False) -> str:
        """All of it as JSON.

        Args:
            keys: Whether every tensor is listed.
        """
        told: dict[str, Any] = {
            "path": str(self.path),
            "kind": self.kind,
            "file_bytes": self.file_bytes,
            "where": self.where,
            "tensors": len(self.entries),
            "values": self.values,
            "bytes": self.nbytes,
            "dtypes": self.dtypes,
            "prefix": self.prefix,
            "weights": dict(self.weights),
            "besides": dict(self.besides),
            "foreign": list(self.foreign),
            "operated": self.operation,
            "model": self.spec,
            "candidates": self.candidates,
            "problem": self.problem,
            "fits": self.fits,
        }
        if keys:
            told["keys"] = {n: [list(e.shape), e.dtype] for n, e in self.entries.items()}
        return json.dumps(told, indent=2)

    def to_text(self, *, keys: bool = False) -> str:
        """All of it as text.

        Args:
            keys: Whether every tensor is listed.
        """
        lines = [f"file        {self.path}: {self.kind}, {_size(self.file_bytes)}"]
        if self.problem is not None:
            lines.append(f"weights     {self.problem}")
        else:
            dtypes = ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
            where = f"under {self.where!r}: " if self.where else ""
            lines.append(
                f"weights     {where}{len(self.entries)} tensors, {self.values:,} values, "
                f"{_size(self.nbytes)} ({dtypes})"
            )
            lines.append(f"names       {self._names()}")
        others = {place: n for place, n in self.weights.items() if place != (self.where or "")}
        lines += [
            f"also        weights under {place!r}: {n} tensors" for place, n in others.items()
        ]
        if self.besides:
            told = [f"{place}: {what}" for place, what in self.besides.items()]
            lines.append(f"besides     {listed(told, _SHOWN)}")
        if self.foreign:
            what = "it is not read" if self.kind == _DCP else "reading needs --trust"
            lines.append(f"objects     {listed(self.foreign, _SHOWN)}: {what}")
        lines += self._operated()
        if self.spec is not None:
            lines.append(f"model       {self.spec}")
        if self.fits is None and self.candidates:
            lines.append(f"model       may be {listed(self.candidates, _SHOWN)}")
        if self.fits is not None:
            lines.append(f"fits        {self.fits}")
        if keys:
            width = max((len(name) for name in self.entries), default=0)
            lines += [f"  {n:{width}}  {e.dtype} {list(e.shape)}" for n, e in self.entries.items()]
        return "\n".join(lines)

    def _names(self) -> str:
        order = sorted(self.entries, key=lambda name: -len(self.entries[name].shape))
        first = listed([name.removeprefix(self.prefix) for name in order], 3)
        return f"prefix {self.prefix!r}: {first}" if self.prefix else first

    def _operated(self) -> list[str]:
        done = self.operation
        if done is None:
            return ["operated    no"]
        if "damaged" in done:
            return [f"operated    yes, but its plan is damaged: {done['damaged']}"]
        writes = ", ".join(done["writes"]) or "none"
        return [
            f"operated    yes, by aim-surgery {done['version']}: {done['model']} of "
            f"{done['base_parameters']:,} parameters",
            f"plan        memory of {done['memory_floats']:,} floats, {done['reads']} reads, "
            f"writes after: {writes}; form: {done['form']}",
        ]


def inspect(
    path: str | Path,
    *,
    key: str | None = None,
    ema: bool = False,
    spec: str | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> Inspection:
    """Look at a file.

    Args:
        path: The file or folder; see `open_source`.
        key: Where the weights are; see `weights_in`.
        ema: Whether averaged weights are wanted.
        spec: A model to compare with; this one thing imports torch.
        model_args: Keyword arguments for its factory.

    Returns:
        What is there.

    Raises:
        CheckpointError: It is no checkpoint, or damaged where one has to look.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind in ("zip", "pickle"):
        content, foreign = outline_of(path, kind)
        words = "PyTorch file" if kind == "zip" else "PyTorch file of the format before 1.6"
        found = _nested(path, words, content, foreign, key, ema)
    elif kind == "dcp":
        content, foreign = outline_of_dcp(path / ".metadata")
        found = _nested(path, _DCP, content, foreign, key, ema)
        found = replace(found, metadata=notes_in(path))
    elif kind == "exported":
        entries, metadata = outline_of_exported(path)
        found = _flat(path, "exported program", entries, metadata)
    else:
        source = open_source(path, key=key, ema=ema)
        found = _flat(source.path, source.kind, source.entries, source.metadata)
    return found if spec is None else _compared(found, spec, model_args)


def _flat(
    path: Path, kind: str, entries: Mapping[str, Entry], metadata: Mapping[str, str]
) -> Inspection:
    return Inspection(
        path,
        kind,
        _bytes_on_disk(path),
        "",
        entries,
        common_prefix(entries),
        {"": len(entries)},
        {},
        (),
        metadata,
    )


def _nested(
    path: Path, kind: str, content: Any, foreign: list[str], key: str | None, ema: bool
) -> Inspection:
    everywhere = list(find_all(content, is_state_dict))
    optimizers = list(find_all(content, is_optimizer_state))
    weights = {
        "" if not where else dotted(where): len(value_at(content, where))
        for where in everywhere
        if not any(where[: len(o)] == o for o in optimizers)
    }
    problem, where, entries, versions = None, None, {}, None
    try:
        place = weights_in(content, path, key=key, ema=ema)
        found = value_at(content, place)
        entries = {name: value for name, value in found.items() if is_tensor(value)}
        where = dotted(place) if place else ""
        versions = getattr(found, "_metadata", None)
    except CheckpointError as err:
        if key is not None or ema:
            raise
        problem = str(err).removeprefix(f"{path}: ")
    return Inspection(
        path,
        kind,
        _bytes_on_disk(path),
        where,
        entries,
        common_prefix(entries),
        weights,
        _besides(content, weights),
        tuple(foreign),
        metadata_in(versions),
        problem,
    )


def _besides(content: Any, weights: Mapping[str, int]) -> dict[str, str]:
    """What stands beside the weights in a training checkpoint."""
    if not isinstance(content, Mapping) or is_state_dict(content):
        return {}
    roots = {place.partition(".")[0] for place in weights}
    return {str(name): _what(value) for name, value in content.items() if str(name) not in roots}


def _what(value: Any) -> str:
    if is_optimizer_state(value):
        return f"optimizer state of {len(value['state'])} parameters"
    if isinstance(value, Foreign):
        return value.name
    if isinstance(value, Mapping):
        return f"dict of {len(value)}"
    if isinstance(value, int | float | bool) or value is None:
        return repr(value)
    return type(value).__name__ if not is_tensor(value) else "tensor"


def _bytes_on_disk(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    if path.name.endswith(".index.json"):
        from aim_surgery.checkpoint.reading.shards import read_index

        files = set(read_index(path)["weight_map"].values())
        return sum((path.parent / file).stat().st_size for file in files)
    return path.stat().st_size


def _compared(found: Inspection, spec: str, model_args: Mapping[str, Any] | None) -> Inspection:
    """Whether a model's names and shapes are those of the file."""
    from aim_surgery.checkpoint.models import build
    from aim_surgery.checkpoint.models.skeleton import build_skeleton
    from aim_surgery.checkpoint.reading.names import match_names

    args = dict(model_args or {})
    try:
        model = build_skeleton(spec, args)
    except AimSurgeryError:
        model = build(spec, **args)
    problems = match_names(model.state_dict(keep_vars=True), found.entries).problems
    told = f"{spec}: {'; '.join(problems)}" if problems else f"{spec}: yes, every name and shape"
    return replace(found, fits=told)


def _size(nbytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:,.1f} {unit}"
    return f"{nbytes} bytes"
