"""The write: the network changes the memory while it works, by what its features say.

    memory' = memory + out(pool(block([features, view])))        mode "add"
    memory' =          out(pool(block([features, view])))        mode "replace"

`view` is how the write itself reads the memory; `block` is a row of convolutions (of linear layers
on tokens) with norm and activation; a mean over positions commutes with the 1x1 convolution `out`,
so pooling comes first and `out` works on the home layout's few positions.

Per sample, each sample writes its own copy. Per batch, the features are averaged over all samples
first and the memory stays one copy; a running average of the updates stands in for them in
evaluation, as in batch norm, so that a result never depends on what else is in its batch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from aim_surgery.errors import AimSurgeryError
from aim_surgery.nn.axes import FeatureAxes
from aim_surgery.nn.block_layers import (
    ACTIVATIONS,
    SINGLE_VALUE_NORMS,
    block_layers,
    block_parameters,
)
from aim_surgery.nn.layer_types import CONV_TYPES, is_hooked, is_its_product
from aim_surgery.nn.samples import mean_over_samples, nothing_to_average
from aim_surgery.nn.spatial import ADAPTIVE_POOLS
from aim_surgery.nn.views import resized
from aim_surgery.nn.widened import joined, widened_conv, widened_linear

__all__ = ["WriteBlock", "block_parameters"]


class WriteBlock(nn.Module):
    """memory' = memory + out(pool(block([features, view]))).

    Shapes:
        features (N, C, *S), view (1 or N, k, *S), memory (1 or N, M) -> (N, M) per sample,
        (1, M) per batch; tokens: features (N, *T, C), view (1 or N, k)

    Args:
        channels: C, of the features.
        planes: k, what the block reads of the memory; 0 for nothing.
        floats: M, the size of the memory.
        layout: The memory's home layout (C_m, *home), or (M,); its product is at least M.
        dims: Spatial axes of the features; 0 for tokens and vectors.
        channel_axis: Where the channels are in the example's features. With `dims` 0 a negative one
            counts from the end of any features, and any other means the last axis.
        sample_axis: Where the samples are; None: there are none, all is one copy.
        widths: Output channels of each layer of the block.
        kernel_size: Of its convolutions; odd, so that sizes stay. Linear layers have none.
        norm: After each layer: "layer" (all channels and positions of a sample; of a token, its
            channels; left out at a width of one, where it could only give zeros), "batch", "none".
        activation: After each norm, one of `ACTIVATIONS`.
        mode: "add" to the memory or "replace" it.
        per: "sample" or "batch".
        momentum: Least share of a batch in the running average, in (0, 1]; the average is exact for
            the first 1 / momentum batches, exponential after.
        device: Where parameters and buffers live.
        dtype: Their type.

    Attributes:
        running: Average update (M,), only per batch; `batches` counts what went into it.
        enabled: While False, the result is zeros without gradients, and nothing is averaged.

    Raises:
        ValueError: An argument is none of those above.

    Source: Lunkad, "Memory for Artificial Intelligence", Towards AI, 2021: its update blocks are
        `widths=(16, 16, 32), kernel_size=3, norm="batch", activation="sigmoid", mode="replace"`.
    Deviation: the article pools with kernel = stride = h // 7; adaptive pooling is the same where
        that divides, and defined elsewhere.

    Example:
        >>> write = WriteBlock(8, 2, floats=50, layout=(2, 5, 5), dims=2, channel_axis=1,
        ...                    sample_axis=0, widths=(4,))
        >>> write(torch.ones(3, 8, 10, 10), torch.ones(1, 2, 5, 5), torch.ones(1, 50)).shape
        torch.Size([3, 50])
    """

    running: Tensor
    batches: Tensor

    def __init__(
        self,
        channels: int,
        planes: int,
        *,
        floats: int,
        layout: Sequence[int],
        dims: int,
        channel_axis: int,
        sample_axis: int | None,
        widths: Sequence[int],
        kernel_size: int = 1,
        norm: str = "layer",
        activation: str = "relu",
        mode: str = "add",
        per: str = "sample",
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _one_of("dims", dims, range(4))
        _one_of("norm", norm, ("layer", "batch", "none"))
        _one_of("activation", activation, ACTIVATIONS)
        _one_of("mode", mode, ("add", "replace"))
        _one_of("per", per, ("sample", "batch"))
        if kernel_size % 2 == 0 or not widths or not 0 < momentum <= 1:
            raise ValueError(
                "a write block needs an odd kernel_size, at least one width and a momentum in"
                f" (0, 1], not {kernel_size}, {tuple(widths)} and {momentum}"
            )
        if math.prod(layout) < floats:
            raise ValueError(f"layout {tuple(layout)} has no room for {floats} floats")
        self.planes, self.floats, self.dims = planes, floats, dims
        self.home = tuple(layout[1:])
        self.axes = FeatureAxes(channels, dims, channel_axis, sample_axis)
        self.mode, self.per, self.momentum = mode, per, momentum
        self.enabled = True
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.block = block_layers(
            channels + planes,
            dims=dims,
            widths=widths,
            kernel_size=kernel_size,
            norm=norm,
            activation=activation,
            **factory,
        )
        self.out = nn.Linear(widths[-1], layout[0], **factory)
        if per == "batch":
            self.register_buffer("running", torch.zeros(floats, **factory))
            self.register_buffer("batches", torch.zeros((), dtype=torch.int64, device=device))

    def forward(self, features: Tensor, view: Tensor | None, memory: Tensor) -> Tensor:
        """Write.

        Args:
            features: What the write looks at; may be changed in place afterwards.
            view: The memory as planes, of the features' size or another, (k, *S), (1, k, *S) or
                (N, k, *S); features (k,), (1, k) or (N, k) for tokens; None where `planes` is 0.
            memory: The version to write to.

        Returns:
            The next version, of `memory`'s type; nothing that came in is changed.

        Raises:
            AimSurgeryError: The features have other axes or channels than planned, or the block's
                batch norm would see one value per channel.
        """
        if self.per == "batch":
            return self._write_once(features, view, memory)
        features = self.axes.samples_first(features)
        if not self.enabled:
            return memory.new_zeros(features.shape[0], self.floats)
        update = self._update(features, view).to(memory)
        return memory + update if self.mode == "add" else update

    def reset(self) -> None:
        """Forget the running average; weights stay."""
        if self.per == "batch":
            self.running.zero_()
            self.batches.zero_()

    def _write_once(self, features: Tensor, view: Tensor | None, memory: Tensor) -> Tensor:
        if not self.enabled:
            return memory.new_zeros(1, self.floats)
        features = self.axes.samples_first(features) if self.training else features
        if self.training and not nothing_to_average(features):
            update = self._update(mean_over_samples(features), view)
            self._note(update.detach().squeeze(0))
        else:
            update = self.running.clone().unsqueeze(0)  # the buffer itself stays inside
        update = update.to(memory)
        return memory + update if self.mode == "add" else update

    @torch.no_grad()
    def _note(self, update: Tensor) -> None:
        self.batches.add_(1)
        share = self.batches.to(self.running.dtype).reciprocal().clamp(min=self.momentum)
        change = update.to(self.running) - self.running
        # a batch that overflowed leaves nothing here
        self.running.add_(share * torch.where(change.isfinite(), change, 0))

    def _update(self, features: Tensor, view: Tensor | None) -> Tensor:
        """What the features say, (N, M)."""
        self._refuse_single_value(features)
        x = self._through_block(features, view)
        if self.dims:
            size = self.home if len(self.home) == self.dims else (1,) * self.dims
            pooled = ADAPTIVE_POOLS[self.dims](x, size).flatten(2).mT
        else:
            pooled = x.unflatten(0, features.shape[:2]).mean(1, keepdim=True)
        planes = self.out(pooled).mT  # (N, C_m, positions of home, or one)
        return planes.expand(-1, -1, math.prod(self.home)).flatten(1)[:, : self.floats]

    def _through_block(self, features: Tensor, view: Tensor | None) -> Tensor:
        """What the block says of features and view side by side: (N, C, *S), or tokens (N·T, C).

        Autograd keeps features of its own: these may be changed in place.
        """
        if not _autocasts(features.device.type):
            features = features.to(self._dtype)
        if view is None or self.planes == 0:
            x = features.clone() if _recorded() else features
            return self.block(x if self.dims else x.flatten(0, 1))
        view = self._fitted(view.to(features), features)
        if not self._is_as_built():
            return self.block(self._side_by_side(features, view))
        first, *rest = cast("list[Any]", [*self.block])
        if _recorded():
            features = features.clone()
        if self.dims:
            options = first.stride, first.padding, first.dilation, first.groups
            x = widened_conv(features, first.weight, first.bias, view, *options)
        else:
            x = widened_linear(features, first.weight, first.bias, view).flatten(0, 1)
        for layer in rest:
            x = layer(x)
        return x

    def _is_as_built(self) -> bool:
        """Whether the first layer may be called as a function."""
        if type(self.block) is not nn.Sequential or is_hooked(self.block):
            return False
        first = self.block[0]
        wanted = CONV_TYPES[self.dims - 1] if self.dims else nn.Linear
        zeros = getattr(first, "padding_mode", "zeros") == "zeros"
        return type(first) is wanted and zeros and is_its_product(first)

    def _fitted(self, view: Tensor, features: Tensor) -> Tensor:
        """The view where the features are: (k, *S) or (N, k, *S); of tokens (k,) or (N, 1, k)."""
        if not self.dims:
            once = view.numel() == self.planes
            return view.reshape(-1) if once else view.reshape(-1, 1, self.planes)
        if view.ndim > self.dims + 1 and view.shape[0] == 1:
            view = view.squeeze(0)
        return resized(view, features.shape[2:])

    def _side_by_side(self, features: Tensor, view: Tensor) -> Tensor:
        """For a block that hooks look at, or that somebody changed."""
        if self.dims:
            return joined(features, view)
        view = view.expand(*features.shape[:2], self.planes)
        return torch.cat([features, view], 2).flatten(0, 1)

    @property
    def _dtype(self) -> torch.dtype:
        weight = self.out.weight  # of a quantized layer, a method
        return weight.dtype if isinstance(weight, Tensor) else torch.float32

    def _refuse_single_value(self, x: Tensor) -> None:
        """Torch's own error knows neither where nor what to do."""
        values = x.shape[0] * (math.prod(x.shape[2:]) if self.dims else x.shape[1])
        norms = [layer for layer in self.block if type(layer) in SINGLE_VALUE_NORMS]
        if any(norm.training for norm in norms) and values == 1:
            once = self.per == "batch"
            raise AimSurgeryError(
                "this write's batch norm sees one value per channel in training:"
                f" {'batch-averaged features' if once else 'a batch of one'} of one position;"
                f' choose norm="layer" for writes{"" if once else ", or a larger batch"}'
            )


def _recorded() -> bool:
    """Whether somebody remembers tensors: autograd, or a trace, which is checked without it."""
    return torch.is_grad_enabled() or torch._C._get_tracing_state() is not None


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _one_of(name: str, value: Any, choices: Collection[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}")
