"""The errors of this package.

Every failure that a user can cause or mend is an `AimSurgeryError`. Its message says where (site,
file or parameter), what was expected, what was there, and what to do.
"""

from collections.abc import Iterable


class AimSurgeryError(Exception):
    """Base class of every error that this package raises on purpose."""


class CaptureError(AimSurgeryError):
    """The model could not be captured as a graph: example inputs, control flow, unknown values."""


class PlanError(AimSurgeryError):
    """No valid plan: nothing to read with, a budget that is too small, a filter without a match."""


class RequestError(PlanError):
    """What was asked for can't be had, whatever the weights are: a filter, a budget."""


class MissingInputsError(AimSurgeryError):
    """Example inputs must be given: plan and model don't tell any that the model takes."""


class UnsupportedLayerError(AimSurgeryError):
    """A layer that the plan wants to widen has a form that surgery does not know."""


class CheckpointError(AimSurgeryError):
    """A file or state dict does not hold what was asked of it, or could not be written."""


class ModelSpecError(AimSurgeryError):
    """A model spec such as ``torchvision:resnet50`` names nothing that can be built."""


def listed(names: Iterable[object], limit: int = 10) -> str:
    """Names in a message: the first ones, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(str, names[:limit])) + more


def in_one_line(err: BaseException) -> str:
    """The kind of any error, and the first line of its message."""
    line = str(err).strip().split("\n", 1)[0].strip()
    return f"{type(err).__name__}: {line}" if line else type(err).__name__
