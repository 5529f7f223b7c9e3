"""Features of any layout, in one: samples first, then channels for maps; channels last for tokens.

What the axes of the example meant is known when the graph is built; a call may have others where
the layer before it accepts that: a map without samples, vectors instead of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from aim_surgery.errors import AimSurgeryError


@dataclass(frozen=True)
class FeatureAxes:
    """Where features keep what.

    Attributes:
        channels: C.
        dims: Spatial axes of a map; 0 for tokens and vectors.
        channel_axis: Where the channels are in the example. With `dims` 0 a negative one counts
            from the end of any features, and any other means the last axis.
        sample_axis: Where the samples are in the example; None where it is a single one without
            that axis. Then they are first where there are some.
    """

    channels: int
    dims: int
    channel_axis: int
    sample_axis: int | None

    def samples_first(self, x: Tensor) -> Tensor:
        """Rearrange features; a view wherever strides allow one.

        Shapes:
            a map (N, C, *S), (N, *S, C), ... -> (N, C, *S); without samples: (1, C, *S)
            tokens (N, *T, C), (T, N, C), (N, C), ... -> (N, T, C); without samples: (1, T, C)

        Args:
            x: Features.

        Returns:
            The same numbers.

        Raises:
            AimSurgeryError: The number of axes or of channels is another.
        """
        found = self._map(x) if self.dims else self._tokens(x)
        if found is None:
            raise AimSurgeryError(
                f"a write expects features with {self.channels} channels on axis"
                f" {self.channel_axis} and {self.dims or 'no'} spatial axes, as in the example"
                f" that it was planned with, and got {tuple(x.shape)}"
            )
        return found

    def _map(self, x: Tensor) -> Tensor | None:
        if self.sample_axis is None:
            sample, channel = 0, self.channel_axis % (self.dims + 1) + 1
        else:
            sample = self.sample_axis % (self.dims + 2)
            channel = self.channel_axis % (self.dims + 2)
        if x.ndim == self.dims + 1:
            x = x.unsqueeze(sample)
        if x.ndim != self.dims + 2 or x.shape[channel] != self.channels:
            return None
        return x.movedim((sample, channel), (0, 1))

    def _tokens(self, x: Tensor) -> Tensor | None:
        channel = self.channel_axis if self.channel_axis < 0 else -1
        if x.ndim < -channel or x.shape[channel] != self.channels:
            return None
        x = x.movedim(channel, -1)
        sample = self.sample_axis or 0
        # where the channels are by now, there are no samples
        x = x.unsqueeze(0) if sample >= x.ndim - 1 else x.movedim(sample, 0)
        return x.unsqueeze(1).flatten(1, -2)
