"""The memory: M floats, each the output of a unit that is fed with the constant 1.

    value = weight · 1 + bias  [+ state]
    state <- (1 - momentum) · state + momentum · mean over samples of the written memory

Weight and bias are learned, 2 M parameters: what backpropagation leaves in them is carried from
batch to batch. The state carries besides what the network itself wrote. The article has a 1x1
convolution of a ones tensor with M output channels, or a linear layer on ones; the two are one
function, and `nn.Linear(1, M)` is its shortest form.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aim_surgery.nn.samples import mean_over_samples, nothing_to_average


class Memory(nn.Linear):
    """M floats: value = weight · 1 + bias; what the whole network reads.

    The module is called once where the memory begins and, if a state is carried, once more with
    what was last written.

    Shapes:
        () -> (1, M); written: (N, M) -> None

    Args:
        floats: M, the size of the memory.
        inputs: Constants that each unit is fed with.
        shared: Consecutive floats that have one unit's value; divides M.
        carry_state: Whether written memory is noted down.
        momentum: Share of a new note in the state, in (0, 1].
        device: Where parameters and state live.
        dtype: Their type.

    Attributes:
        state: Running mean of the written memory, (M,), zeros before the first note; only with
            `carry_state`.
        enabled: While False, the memory is zeros without gradients, and nothing is noted.

    Raises:
        ValueError: `shared` does not divide `floats`, or `momentum` is out of range.

    Source: Lunkad, "Memory for Artificial Intelligence", Towards AI, 2021: "the weight + bias as a
        unit of memory". Its notebook's layer is `Memory(50_176, inputs=1024, shared=49)`: 1,049,600
        parameters, 1,024 different values.
    Deviation: by default every float is its own. Weight and bias start as `nn.Linear` starts them,
        uniform in (-1, 1) at a fan-in of one; Keras' Glorot rule, with a fan-out of M, would start
        the floats near ±0.01.

    Example:
        >>> Memory(49)().shape
        torch.Size([1, 49])
    """

    _is_impure = True  # fx keeps the call that notes down, although nobody uses its result

    state: Tensor

    def __init__(
        self,
        floats: int,
        *,
        inputs: int = 1,
        shared: int = 1,
        carry_state: bool = False,
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if shared < 1 or floats % shared:
            raise ValueError(f"{floats} floats cannot share values {shared} at a time")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], not {momentum}")
        super().__init__(inputs, floats // shared, device=device, dtype=dtype)
        self.floats = floats
        self.shared = shared
        self.carry_state = carry_state
        self.momentum = momentum
        self.enabled = True
        if carry_state:
            self.register_buffer("state", torch.zeros(floats, device=device, dtype=dtype))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # nothing comes in
        self, written: Tensor | None = None
    ) -> Tensor | None:
        """Give the memory, or take note of what was written.

        Args:
            written: The memory after the last write, (N, M) or (1, M); noted in training mode only.

        Returns:
            The memory (1, M); None for a note.
        """
        if written is not None:
            return self._note(written)
        value = super().forward(self.weight.new_ones(1, self.in_features))
        if self.shared > 1:
            value = value.unsqueeze(-1).expand(-1, -1, self.shared).flatten(1)
        if not self.enabled:
            return torch.zeros_like(value)
        return value + self.state.to(value.dtype) if self.carry_state else value

    @torch.no_grad()
    def _note(self, written: Tensor) -> None:
        wanted = self.training and self.enabled and self.carry_state
        if wanted and not nothing_to_average(written):
            mean = mean_over_samples(written.detach()).squeeze(0).to(self.state)
            # a batch that overflowed is skipped by scalers of losses: it shall leave nothing here
            mean = torch.where(mean.isfinite(), mean, self.state)
            self.state.lerp_(mean, self.momentum)

    def reset(self) -> None:
        """Forget the state; weight and bias stay."""
        if self.carry_state:
            self.state.zero_()

    def extra_repr(self) -> str:
        """What `repr` shows."""
        shared = f", inputs={self.in_features}, shared={self.shared}" * (self.shared > 1)
        return f"{self.floats}{shared}, carry_state={self.carry_state}"
