"""The libraries: which models each has, and how one is built."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

import aim_surgery
from aim_surgery.capture import Inputs
from aim_surgery.checkpoint.models.torchvision_ops import import_torchvision
from aim_surgery.errors import ModelSpecError
from benchmarks.measure import SEED, require


@dataclass(frozen=True)
class Library:
    """One library of models.

    Attributes:
        names: Lists all its models.
        build: Makes one, with random weights, and its example inputs; None where aim_surgery is to
            find them.
        verified: Least share of models that must be transformed and verified.
        reached: Least share of the audited weights that must read; None where nothing is promised.
    """

    names: Callable[[], tuple[str, ...]]
    build: Callable[[str], tuple[nn.Module, Inputs | None]]
    verified: float
    reached: float | None
    timed: bool = True


def build(library: str, name: str, device: str = "cpu") -> tuple[nn.Module, Inputs | None]:
    """Build a model in evaluation mode, from a fixed seed.

    Args:
        library: Its library.
        name: Its name there.
        device: "cpu" or "meta".

    Returns:
        The model, and example inputs or None.
    """
    torch.manual_seed(SEED)
    with torch.device(device):
        model, inputs = LIBRARIES[library].build(name)
    return model.eval(), inputs


def build_on_meta(library: str, name: str) -> nn.Module | None:
    """A model without values, which tells its size; None where it can't be built so."""
    try:
        return build(library, name, "meta")[0]
    except Exception:
        return None


def move_to_meta(model: nn.Module, inputs: Inputs | None) -> tuple[nn.Module, Inputs | None]:
    """Let a model's weights go, where it could not be built without."""
    return model.to("meta"), tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), inputs)


def _torchvision_names() -> tuple[str, ...]:
    require("torchvision")
    return tuple(import_torchvision().models.list_models())


def _timm_names() -> tuple[str, ...]:
    require("torchvision", "timm")
    import_torchvision()
    import timm

    return tuple(timm.list_models())


def _transformers_names() -> tuple[str, ...]:
    require("transformers")
    from benchmarks.zoo.transformers_models import MODELS

    return tuple(MODELS)


def import_torchvision_if_any() -> None:
    """Import it in the way that works; transformers and others import it by themselves."""
    with contextlib.suppress(ModelSpecError, ImportError):
        import_torchvision()


def _build_transformers(name: str) -> tuple[nn.Module, Inputs | None]:
    from benchmarks.zoo.transformers_models import build_model

    import_torchvision_if_any()
    return build_model(name)


def _others_names() -> tuple[str, ...]:
    require("torchvision", "timm", "transformers")
    from benchmarks.zoo.others_models import ENTRIES

    return tuple(ENTRIES)


def _build_other(name: str) -> tuple[nn.Module, Inputs | None]:
    from benchmarks.zoo.others_models import ENTRIES

    import_torchvision_if_any()
    return ENTRIES[name].build()


def _from_spec(library: str) -> Callable[[str], tuple[nn.Module, Inputs | None]]:
    return lambda name: (aim_surgery.build(f"{library}:{name}"), None)


LIBRARIES = {
    "torchvision": Library(_torchvision_names, _from_spec("torchvision"), 1.0, 1.0),
    "timm": Library(_timm_names, _from_spec("timm"), 0.99, 0.999),
    "transformers": Library(_transformers_names, _build_transformers, 0.95, None, timed=False),
    "others": Library(_others_names, _build_other, 0.95, None, timed=False),
}
