"""An operated state dict, tensor by tensor: the model with its weights need never be in memory.

    name of the operated model     its value
    aim.memory.weight, ...         made on the way: all that is new
    conv.weight, widened           widen_for(W_x of the file)
    everything else                as it is in the file

The plan is made, and the surgery done, on a model without weights (`skeleton`); its state dict says
what there has to be. Where a model can't be built or captured without values, or its own hooks have
to convert an older layout, the same comes from a real one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aim_surgery.capture import Capture, Inputs
from aim_surgery.checkpoint.models import build
from aim_surgery.checkpoint.models.loading import load_into, same_values
from aim_surgery.checkpoint.models.skeleton import adopt_dtypes, build_skeleton
from aim_surgery.checkpoint.reading.kinds import tensors_of
from aim_surgery.checkpoint.reading.names import AVERAGING_COUNT, Names, is_averaged, match_names
from aim_surgery.checkpoint.reading.source import Entry, Source
from aim_surgery.checkpoint.reading.torch_file import entry_of
from aim_surgery.config import AimConfig
from aim_surgery.errors import AimSurgeryError, CheckpointError, ModelSpecError, RequestError
from aim_surgery.operation import Wanted, applied, planned
from aim_surgery.planning import Plan, Read, one_floating_dtype
from aim_surgery.sites import may_leak_unseen
from aim_surgery.surgery.modules import widened_reads
from aim_surgery.surgery.state_dict import versioned
from aim_surgery.surgery.widen import fill_memory, split_for, widen_for

Maker = Callable[[str, Callable[[str], Tensor] | None], Tensor]


@dataclass
class Original:
    """A model to be operated on, and where its weights are.

    Attributes:
        model: The model or exported program; on the meta device where its weights stay in the file.
        source: Its checkpoint.
        names: The file's names for the model's.
    """

    model: Any
    source: Source
    names: Names

    @property
    def streamed(self) -> bool:
        """Whether the weights stay in the file."""
        return isinstance(self.model, nn.Module) and any(
            value.is_meta for value in self.model.state_dict().values() if _is_tensor(value)
        )


@dataclass
class Operated:
    """What an operation makes of a checkpoint.

    Attributes:
        plan: What was done.
        entries: The tensors of the operated model, in the order of its state dict.
        aliases: Further names of some of them.
        model: The operated model; without weights where they stay in the file.
        make: What `tensor` asks.
        original: What it was made of, where that is known.
        odd: Tensors that hold NaN or infinities, of those made so far.
    """

    plan: Plan
    entries: Mapping[str, Entry]
    aliases: Mapping[str, str]
    model: nn.Module
    make: Maker = field(repr=False)
    original: Original | None = None
    odd: list[str] = field(default_factory=list)

    def tensor(self, name: str, read: Callable[[str], Tensor] | None = None) -> Tensor:
        """Make a tensor, on the CPU.

        Args:
            name: Its name in the operated model.
            read: Gives the original's tensors by the model's names, if not from the file's weights:
                further weights of the same model (averaged ones).
        """
        return self.seen(name, self.make(name, read))

    def seen(self, name: str, value: Tensor) -> Tensor:
        """A tensor that is written as it is; NaN and infinities in it are noted."""
        if _is_odd(value):
            self.odd.append(name)
        return value


def open_original(
    source: Source,
    spec: str | None,
    model_args: Mapping[str, Any] | None = None,
    *,
    values: bool = False,
) -> Original:
    """Find the model of a checkpoint.

    Args:
        source: The checkpoint.
        spec: The model spec; not needed where the file holds the model itself.
        model_args: Keyword arguments for the factory.
        values: Whether the model is to have its weights.

    Returns:
        The model; without weights where that is enough.

    Raises:
        CheckpointError: The weights are not all of the model's, or a spec is needed.
        ModelSpecError: The spec can't be built.
    """
    program = getattr(source, "program", None) if spec is None else None
    module = getattr(source, "module", None) if spec is None else None
    if program is not None or module is not None:
        keys = {name: name for name in source.entries}
        return Original(program if program is not None else module, source, Names(keys, ""))
    if spec is None:
        raise CheckpointError(
            f"{source.path}: holds weights, not the model that they belong to: name it with --model"
        )
    args = dict(model_args or {})
    if not values:
        found = _without_values(source, spec, args)
        if found is not None:
            return found
    model = build(spec, **args)
    names = match_names(model.state_dict(keep_vars=True), source.entries)
    adopt_dtypes(model, source.entries, names)
    load_into(model, renamed(tensors_of(source), names), source.path)
    return Original(model, source, names)


def _without_values(source: Source, spec: str, args: dict[str, Any]) -> Original | None:
    """The model on the meta device; None where values are needed to tell whether all fits."""
    try:
        model = build_skeleton(spec, args)
    except ModelSpecError:
        return None  # its factory looks at values; or it names nothing, which `build` tells
    own = model.state_dict(keep_vars=True)
    names = match_names(own, source.entries)
    if names.problems or source.extras or not all(map(_is_tensor, own.values())):
        return None
    _refuse_two_values(source, own, names)
    adopt_dtypes(model, source.entries, names)
    return Original(model, source, names)


def _refuse_two_values(source: Source, own: Mapping[str, Any], names: Names) -> None:
    """Names of one tensor in the model have one value in the file."""
    first: dict[int, str] = {}
    for name, value in own.items():
        key, twin = names.keys[name], first.setdefault(id(value), names.keys[name])
        if key != twin and not same_values(source.tensor(key), source.tensor(twin)):
            raise CheckpointError(
                f"{source.path}: {twin} and {key} are one tensor in the model, and have different "
                f"values in the file; untie them in the model or make them equal"
            )


def renamed(weights: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """A state dict by the model's names; what has no name there keeps its own, less the prefix."""
    of = {key: name for name, key in reversed([*names.keys.items()])}
    counted = is_averaged(names.prefix)
    kept = {k: v for k, v in weights.items() if not (counted and k == AVERAGING_COUNT)}
    strip = len(names.prefix) if all(key.startswith(names.prefix) for key in kept) else 0
    found = {of.get(key, key[strip:]): value for key, value in kept.items()}
    for name, key in names.keys.items():  # a tied name without a key of its own
        if key in kept:
            found.setdefault(name, kept[key])
    versions = getattr(weights, "_metadata", None)
    if versions is not None:
        bare = names.prefix.removesuffix(".")
        versions = {_module_name(name, bare): told for name, told in versions.items()}
    return versioned(found, versions)


def _module_name(name: str, prefix: str) -> str:
    return name[len(prefix) :].removeprefix(".") if prefix and name.startswith(prefix) else name


def operate_checkpoint(
    source: Source,
    spec: str | None,
    model_args: Mapping[str, Any] | None = None,
    *,
    example: Inputs | None = None,
    config: AimConfig | None = None,
    plan: Plan | None = None,
    emit: Wanted = "auto",
) -> Operated:
    """Operate on a checkpoint: decide and prepare everything, make tensors when they are asked for.

    Args:
        source: The checkpoint.
        spec: See `open_original`.
        model_args: See `open_original`.
        example: Example inputs, as for `transform`.
        config: What to do, as for `transform`.
        plan: What to do, in the place of `config`.
        emit: As for `transform`.

    Returns:
        The operated state dict, tensor by tensor.

    Raises:
        AimSurgeryError: As `open_original`, `plan` and `apply`.
    """
    original = open_original(source, spec, model_args)
    try:
        try:
            return _operated(original, example, config, plan, emit)
        except _ValuesTellError:
            plan = _plan_with_values(source, spec, model_args, example, config, emit)
            return _operated(original, example, config, plan, emit)
    except AimSurgeryError as err:
        if not original.streamed or isinstance(err, RequestError):
            raise  # values change nothing
    original = open_original(source, spec, model_args, values=True)
    return _operated(original, example, config, plan, emit)


def plan_checkpoint(
    source: Source,
    spec: str | None,
    model_args: Mapping[str, Any] | None = None,
    *,
    example: Inputs | None = None,
    config: AimConfig | None = None,
    emit: Wanted = "auto",
) -> Plan:
    """Plan an operation on a checkpoint: see `operate_checkpoint`."""
    original = open_original(source, spec, model_args)
    try:
        return _planned(original, example, config, emit)[1]
    except AimSurgeryError as err:
        if not original.streamed or isinstance(err, RequestError):
            raise  # values change nothing
    return _plan_with_values(source, spec, model_args, example, config, emit)


def _plan_with_values(
    source: Source,
    spec: str | None,
    model_args: Mapping[str, Any] | None,
    example: Inputs | None,
    config: AimConfig | None,
    emit: Wanted,
) -> Plan:
    """A plan for which the weights are read, and let go again."""
    original = open_original(source, spec, model_args, values=True)
    return _planned(original, example, config, emit)[1]


class _ValuesTellError(AimSurgeryError):
    """A plan that was made without the model's values may be another than with them."""


def _planned(
    original: Original, example: Inputs | None, config: AimConfig | None, emit: Wanted
) -> tuple[Capture, Plan]:
    example = in_dtype_of(original.model, example)
    capture, plan = planned(original.model, example, config, emit)
    chosen = config is None or config.write_at is None
    if original.streamed and chosen and may_leak_unseen(capture, [w.point for w in plan.writes]):
        raise _ValuesTellError("a write may leak")
    return capture, plan


def _operated(
    original: Original,
    example: Inputs | None,
    config: AimConfig | None,
    plan: Plan | None,
    emit: Wanted,
) -> Operated:
    model = original.model
    example = in_dtype_of(model, example)
    device = torch.device("cpu") if original.streamed else None
    if plan is None:
        capture, plan = _planned(original, example, config, emit)
        gm = applied(capture, plan, copy=False, device=device)
    else:
        gm = applied(model, plan, example, copy=False, device=device)
    stored, aliases = stored_once(gm.state_dict(keep_vars=True), original.source.path)
    maker = _Maker(original, plan, stored)
    return Operated(plan, maker.entries, aliases, gm, maker.make, original)


class _Maker:
    """Makes the tensors of an operated state dict: from the model, or from those of the file.

    Attributes:
        entries: What it makes.
    """

    def __init__(self, original: Original, plan: Plan, stored: Mapping[str, Tensor]) -> None:
        self._source, self._keys = original.source, original.names.keys
        self._plan, self._reads = plan, widened_reads(plan)
        self._here = {name: value for name, value in stored.items() if not value.is_meta}
        self._drawn: dict[str, Tensor] = {}
        self.entries = {name: entry_of(value) for name, value in stored.items()}
        for name in [name for name in stored if name not in self._here]:
            key, entry = self._keys.get(name), self.entries[name]
            told = None if key is None else self._source.entries[key]
            if told is None or (name not in self._reads and told.shape != entry.shape):
                raise CheckpointError(
                    f"{self._source.path}: the operated model's {name} does not come from this "
                    f"file tensor by tensor"
                )
            self.entries[name] = Entry(entry.shape, told.dtype)

    def make(self, name: str, read: Callable[[str], Tensor] | None) -> Tensor:
        """Make one."""
        if name in self._here and (read is None or name not in self._keys):
            return self._here[name].detach().cpu()
        value = self._source.tensor(self._keys[name]) if read is None else read(name)
        reading = self._reads.get(name)
        if reading is None:
            return value
        # float8: nothing computes in it, and every value is one of float32's
        computed = value.float() if value.itemsize == 1 else value
        wide = widen_for(computed, reading, self._plan.init)
        if self._plan.init == "fresh":
            self._share_drawn(name, reading, wide)
        return wide.to(value.dtype)

    def _share_drawn(self, name: str, read: Read, wide: Tensor) -> None:
        """Averages of weights get the new entries of these: what is drawn is drawn once."""
        if name not in self._drawn:
            first = self._here.get(name, wide)
            self._drawn[name] = split_for(first.detach().cpu(), read)[1]
        site = read.site
        fill_memory(wide, self._drawn[name], kind=site.kind, groups=site.groups)


def stored_once(state: Mapping[str, Any], path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a state dict that are to be stored, and the names that stand for stored ones.

    Args:
        state: The state dict; on the meta device, with parameters and buffers themselves in it.
        path: Where they go, or come from, for messages.

    Returns:
        Tensors by their first names; first names by further ones.

    Raises:
        CheckpointError: Something is no tensor that a file can hold.
    """
    tensors: dict[str, Tensor] = {}
    first: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
            what = "sparse or quantized tensor" if isinstance(value, Tensor) else type(value)
            raise CheckpointError(f"{path}: {name} is a {what}, and can't be stored")
        known = first.setdefault(_place(value), name)
        if known == name:
            tensors[name] = value
        else:
            aliases[name] = known
    return tensors, aliases


def _place(value: Tensor) -> Any:
    """What two tensors have in common that are one: where their values are."""
    if value.is_meta or not value.numel():
        return id(value)
    storage = value.untyped_storage().data_ptr()
    return (
        value.device, storage, value.data_ptr(), value.shape, value.stride(), value.dtype,
    )  # fmt: skip


def in_dtype_of(model: Any, example: Inputs | None) -> Inputs | None:
    """A floating example input in the model's dtype, where that is one alone; on its device."""
    if not isinstance(example, Tensor) or not isinstance(model, nn.Module):
        return example
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if first is not None:
        example = example.to(first.device)
    dtype = one_floating_dtype(model) if example.is_floating_point() else None
    return example if dtype is None else example.to(dtype)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_odd(value: Tensor) -> bool:
    """Whether there is a NaN or an infinity among the values."""
    if not value.is_floating_point() or not value.numel():
        return False
    if value.itemsize == 1:
        value = value.float()
    return not bool(value.sum().isfinite()) and not bool(value.isfinite().all())
