"""What an operation adds to a model: the tree under `aim`, with the plan that made it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from aim_surgery._version import __version__
from aim_surgery.errors import AimSurgeryError
from aim_surgery.file_format import FILE_FORMAT, FORM_KEY, FORMAT_KEY, PLAN_KEY, VERSION_KEY


@dataclass(frozen=True)
class BeforeFreezing:
    """What `freeze_base` changed of the base, for the way back.

    Attributes:
        trained: Whether each parameter asked for gradients, by name.
        contrary: Modules that `train` puts in the other mode (see `AimGraphModule`).
        evaluating: Modules with statistics that work in evaluation mode since.
    """

    trained: dict[str, bool]
    contrary: dict[bool, tuple[str, ...]]
    evaluating: tuple[str, ...] = ()


class AimModules(nn.Module):
    """Memories, memory weights that live beside their layers (`reads`), update blocks (`writes`).

    Attributes:
        plan: What was done to the model.
        form: How sites are written: "concat", "split" or "folded".
        before_freezing: What the base was before `freeze_base`; None where it is not frozen.
    """

    plan: Any = None
    form: str = "concat"
    before_freezing: BeforeFreezing | None = None
    _told: tuple[Any, str] = (None, "")

    def forward(self, *args: Any) -> Any:
        """Give back what comes in: an `nn.Sequential` that keeps its class calls all it holds."""
        return args[0] if len(args) == 1 else args

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Tell the plan where PyTorch keeps module versions: `torch.save` takes it along."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        versions = getattr(destination, "_metadata", None)
        if versions is None or self.plan is None or self.form == "folded":
            return
        if self._told[0] is not self.plan:  # some scripts ask for a state dict each step
            self._told = (self.plan, self.plan.to_json())
        told = {
            FORMAT_KEY: FILE_FORMAT,
            VERSION_KEY: __version__,
            PLAN_KEY: self._told[1],
            FORM_KEY: self.form,
        }
        versions.setdefault(prefix[:-1], {}).update(told)


def plan_of(module: Any) -> Any:
    """The plan of an operated model; None for anything else."""
    if not isinstance(module, nn.Module) or "aim" not in module._modules:
        return None
    added = module._modules["aim"]
    return added.plan if isinstance(added, AimModules) else None


def aim_of(gm: nn.Module) -> AimModules:
    """What was added to an operated model."""
    added = gm._modules["aim"]
    assert isinstance(added, AimModules)
    return added


def operated_in(gm: nn.Module) -> nn.Module:
    """The operated model in what may be a wrapper of one (`torch.compile`, a parallel one).

    Args:
        gm: Any module.

    Returns:
        The operated model itself.

    Raises:
        AimSurgeryError: There is none, or it is folded.
    """
    inner = unwrapped(gm)
    if plan_of(inner) is None:
        raise AimSurgeryError(
            f"expected an operated model, got {type(gm).__name__}: pass what transform, apply or "
            f"load returned"
        )
    if is_folded(inner):
        raise AimSurgeryError(
            "this model is folded: its memory has become constants, for inference alone. Use the "
            "model that was given to fold"
        )
    return inner


def unwrapped(gm: nn.Module) -> nn.Module:
    """What `torch.compile`, parallel wrappers and averages are put around; itself without any."""
    inner = gm
    while plan_of(inner) is None:
        wrapped = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if not isinstance(wrapped, nn.Module):
            return gm
        inner = wrapped
    return inner


def set_result(model: nn.Module, name: str, value: Any) -> None:
    """Give a model an attribute that says what was done to it.

    Args:
        model: What is returned to the user.
        name: Of the attribute.
        value: Anything.

    Raises:
        AimSurgeryError: The model has a submodule or tensor of that name, which its graph needs.
    """
    if any(name in owned for owned in (model._modules, model._parameters, model._buffers)):
        raise AimSurgeryError(
            f"this model has something called {name!r}, the attribute in which the result would be "
            f"told of: rename it"
        )
    vars(model)[name] = value


def is_folded(gm: Any) -> bool:
    """Whether a module is what `fold` returned."""
    return plan_of(gm) is not None and aim_of(gm).form == "folded"
