"""The original model while it is compared: its modes, its buffers, its runs rounded otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from aim_surgery.capture.nested import named_leaves
from aim_surgery.errors import in_one_line
from aim_surgery.verification.comparison import Case
from aim_surgery.verification.differences import detached
from aim_surgery.verification.rounding import RoundedOtherwise
from aim_surgery.verification.twins import call, modes_of, put_modes

_NUDGES = 8  # an entry that jumps half the time is seen to jump in all but 0.4 % of cases


class Original:
    """A copy of the original model.

    Attributes:
        model: The copy.
        derives: Whether it takes derivatives in its forward, which then runs with gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        """Remember the modes that it came in."""
        self.model, self.derives = model, False
        self._given = modes_of(model)

    @property
    def set_apart(self) -> bool:
        """Whether it came in modes that its own `train()` would not have set."""
        try:
            self.model.train(self._given[""])
        except Exception:
            return True
        return modes_of(self.model) != self._given

    def put_mode(self, module: nn.Module, training: bool | None) -> None:
        """Put a model, this one or the operated one, in a mode; None: in the modes as they came."""
        if training is None:
            put_modes(module, self._given)
        else:
            module.train(training)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Copies of its buffers."""
        return {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    @torch.no_grad()
    def put_buffers(self, values: Mapping[str, torch.Tensor]) -> None:
        """Give its buffers other values, where they still have that shape."""
        for name, buffer in self.model.named_buffers():  # forward may add some, or drop them
            if name in values and buffer.shape == values[name].shape:  # else a cache, replaced
                buffer.copy_(values[name])

    def nudged(
        self, case: Case, start: Mapping[str, torch.Tensor], notes: list[str]
    ) -> Iterator[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
        """Run it with other rounding, a few times.

        Args:
            case: Mode and inputs.
            start: Buffers to start each run from; it is left with those that it has now.
            notes: Told where it refuses all such runs.

        Yields:
            Outputs and buffers of each run.
        """
        now, refusals = self.buffers(), list[str]()
        for seed in range(_NUDGES):
            self.put_buffers(start)
            try:
                with torch.set_grad_enabled(self.derives), RoundedOtherwise(seed):
                    self.put_mode(self.model, case.training)
                    outputs = named_leaves(call(self.model, case.samples.nudged(seed)))
                found = detached(outputs), self.buffers()
            except Exception as err:  # of a model that looks at its inputs, say
                refusals.append(in_one_line(err))
                continue
            finally:
                self.put_buffers(now)
            yield found
        if len(refusals) == _NUDGES:
            notes.append(
                f"{case}: no difference is taken for rounding, as the original refuses inputs and "
                f"products that are rounded otherwise: {refusals[0]}"
            )
