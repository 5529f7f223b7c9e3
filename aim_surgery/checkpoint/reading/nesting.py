"""Where in a training checkpoint the weights are.

A *state dict* is a dict from names to tensors. A checkpoint is one, or nests some among epochs,
schedulers and optimizers. Which one is meant is told by its key (`state_dict`, `model`, ...), or by
being the only one, or the only one that was operated on, or by the caller; never guessed between
two.

No torch is needed here: a tensor is what has a shape and a dtype, also in an outline of a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aim_surgery.checkpoint.reading.source import REMEDY
from aim_surgery.errors import CheckpointError, listed
from aim_surgery.file_format import FORMAT_KEY

Where = tuple[str, ...]

KEYS = (
    "state_dict", "model_state_dict", "model", "module", "model_state", "net", "network", "params",
    "weights", "state",
)  # fmt: skip
AVERAGED = (
    "state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "model_ema_state_dict", "ema",
    "params_ema", "averaged_model", "swa_model",
)  # fmt: skip
_DEPTH = 4
EXTRA_STATE = "_extra_state"


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor, or the outline of one."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def is_state_dict(value: Any) -> bool:
    """Whether a value is a dict from names to tensors (and extra state of modules)."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(name, str) for name in value)
        and all(is_tensor(v) or name.endswith(EXTRA_STATE) for name, v in value.items())
        and any(is_tensor(v) for v in value.values())
    )


def is_optimizer_state(value: Any) -> bool:
    """Whether a value is what `torch.optim.Optimizer.state_dict` gives."""
    return isinstance(value, Mapping) and {"state", "param_groups"} <= set(value)


def is_flat_optimizer_state(value: Any) -> bool:
    """Whether a value is that of `get_optimizer_state_dict` with `flatten_optimizer_state_dict`."""
    return isinstance(value, Mapping) and all(
        any(isinstance(name, str) and name.startswith(part) for name in value)
        for part in ("state.", "param_groups.")
    )


def is_operated(value: Any) -> bool:
    """Whether a state dict tells that it is of an operated model."""
    return bool(metadata_in(getattr(value, "_metadata", None)))


def metadata_in(versions: Any) -> dict[str, str]:
    """What a state dict tells of its operated model, text by name.

    Args:
        versions: Its `_metadata`: files of this package tell under a name of their own, a script's
            own `torch.save(model.state_dict(), path)` at the module that was added.

    Returns:
        The plan among it; nothing where it is of another model.
    """
    if not isinstance(versions, Mapping):
        return {}
    told = (versions.get(FORMAT_KEY), *versions.values())
    mine = next((one for one in told if isinstance(one, Mapping) and FORMAT_KEY in one), {})
    return {name: text for name, text in mine.items() if isinstance(text, str)}


def is_scheduler_state(value: Any) -> bool:
    """Whether a value is what `state_dict` of one of PyTorch's schedulers gives."""
    return isinstance(value, Mapping) and "_last_lr" in value


def is_other_scheduler(value: Any) -> bool:
    """Whether a value is what one of timm's schedulers gives, which knows its groups as well."""
    return isinstance(value, Mapping) and {"param_group_field", "base_values"} <= set(value)


def is_tensor_list(value: Any) -> bool:
    """Whether a value is a list of tensors: torch_ema keeps copies of weights so."""
    return isinstance(value, list | tuple) and bool(value) and all(map(is_tensor, value))


def find_all(content: Any, matches: Any, at: Where = (), depth: int = _DEPTH) -> Iterator[Where]:
    """Places in nested dicts and lists whose value matches; not inside of such values.

    Args:
        content: What a file holds.
        matches: A predicate.
        at: Where `content` is.
        depth: Dicts to go down through.

    Yields:
        Keys (of lists: positions) from the root.
    """
    if matches(content):
        yield at
    elif depth:
        for key, value in _items(content):
            yield from find_all(value, matches, (*at, key), depth - 1)


def value_at(content: Any, where: Where) -> Any:
    """The value at a place.

    Raises:
        KeyError: There is no such place.
    """
    for key in where:
        found = dict(_items(content))
        content = found[key]
    return content


def _items(content: Any) -> list[tuple[str, Any]]:
    if isinstance(content, Mapping):
        return [(str(key), value) for key, value in content.items()]
    if isinstance(content, list | tuple):
        return [(str(index), value) for index, value in enumerate(content)]
    return []


def beside(content: Any, where: Where) -> tuple[str, ...]:
    """Names of what stands beside the weights at a place."""
    names = map(str, content) if where and isinstance(content, Mapping) else ()
    return tuple(name for name in names if name != where[0])


def weights_in(
    content: Any, path: Path, *, key: str | None = None, ema: bool = False, matches: Any = None
) -> Where:
    """Find the weights in what a file holds.

    Args:
        content: What the file holds.
        path: The file, for messages.
        key: Where they are, with dots between the keys (`checkpoint.model`).
        ema: Whether averaged weights are wanted.
        matches: What counts as weights; state dicts if None.

    Returns:
        Their place.

    Raises:
        CheckpointError: There are none at the place, or nowhere, or several that could be meant.
    """
    matches = matches or is_state_dict
    found = [where for where in find_all(content, matches) if not _in_optimizer(content, where)]
    if key is not None:
        return _named(content, found, key, path, matches)
    known = [where for where in found if not where or where[-1] in KEYS]
    averaged = [where for where in found if where and where[-1] in AVERAGED]
    usual = known or [where for where in found if where not in averaged]
    candidates = averaged if ema else usual
    operated = [where for where in candidates if is_operated(value_at(content, where))]
    for choice in (candidates, operated):
        if len(choice) == 1:
            return choice[0]
    raise CheckpointError(f"{path}: {_why_not(content, found, candidates, ema=ema)}")


def _named(content: Any, found: list[Where], key: str, path: Path, matches: Any) -> Where:
    wanted = next((where for where in found if dotted(where) == key), None)
    if wanted is not None:
        return wanted
    try:  # keys may hold dots themselves
        value = value_at(content, tuple(key.split(".")))
    except KeyError:
        there = f"there are {listed(map(dotted, found))}" if found else "there are no weights"
        raise CheckpointError(f"{path}: has nothing at {key!r}; {there}") from None
    if matches(value):
        return tuple(key.split("."))
    raise CheckpointError(f"{path}: {key!r} is {outline(value)}, not a state dict")


def _in_optimizer(content: Any, where: Where) -> bool:
    return any(is_optimizer_state(value_at(content, where[:i])) for i in range(len(where)))


def _why_not(content: Any, found: list[Where], candidates: list[Where], *, ema: bool) -> str:
    if len(candidates) > 1:
        names = " and ".join(repr(dotted(where)) for where in candidates)
        return f"holds weights under {names}; choose with --key"
    if ema:
        there = f"; there are {listed(map(dotted, found))}: choose with --key" if found else ""
        return f"holds no averaged weights under a usual key ({', '.join(AVERAGED)}){there}"
    if not isinstance(content, Mapping):
        return f"holds a {class_name(content)}, not a state dict; {REMEDY}"
    if found:
        return f"holds averaged weights alone, under {dotted(found[0])!r}; choose them with --ema"
    if not content:
        return f"the dict holds nothing; {REMEDY}"
    nested = next((key for key in KEYS if isinstance(content.get(key), Mapping)), None)
    where, value = (f" under {nested!r}", content[nested]) if nested else ("", content)
    strangers = [
        f"{name!r}: {class_name(v)}"
        for name, v in value.items()
        if not (isinstance(name, str) and is_tensor(v))
    ]
    what = f"not only tensors ({listed(strangers, 5)})" if strangers else "nothing"
    return f"the dict{where} holds {what}; {REMEDY}"


def dotted(where: Where) -> str:
    """A place as text."""
    return ".".join(where) or "(the whole file)"


def outline(value: Any) -> str:
    """What a value is, in a few words."""
    if isinstance(value, Mapping):
        return f"a dict with {listed(map(repr, value), 5)}" if value else "an empty dict"
    return f"a {class_name(value)}"


def class_name(value: Any) -> str:
    """The name of a value's class, also where the value is an outline of an object."""
    return getattr(type(value), "called", type(value).__name__)
