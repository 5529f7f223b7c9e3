"""Reads of recurrent layers: the memory's part of the gates, through their biases.

The gates of an LSTM and of a plain RNN are one linear call, which both of its weights are part of:

    [W_ih W_hh W_m] [x_t ; h ; m] + b  =  W_ih x_t + W_hh h + (b + W_m m)

A GRU's new gate takes a product of its own with the state, so its calls are two:

    [W_ih W_m] [x_t ; m] + b_ih        [W_hh W_m'] [h ; m] + b_hh
    r, z = sigmoid(both), n = tanh(W_in x_t + .. + r ⊙ (W_hn h + W_mn' m + b_hn))

What each layer and direction of a stack would compute if the memory came in at every step; for
the layers above the first one, nothing outside of torch's kernel could join that. The memory is the
same for all samples and steps, so its part is one vector a call, and torch's own kernel does the
rest. A projection W_hr (o ⊙ tanh c) has no bias, and reads nothing. The layer's tensors and
attributes are left alone: a call works on a shallow copy of it, so that threads and replicas may
call at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNCellBase

from aim_surgery.nn.inside import View
from aim_surgery.nn.stand_in import StandIn, called_with

_INPUT, _HIDDEN, _PROJECTED = "weight_ih", "weight_hh", "weight_hr"
_FORWARDS = tuple(
    kind.forward for kind in (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)
)


def is_recurrent(layer: nn.Module) -> bool:
    """Whether a layer is one of torch's recurrent ones (or their cells), with torch's forward."""
    if isinstance(layer, torch.jit.ScriptModule):  # whose class has no forward to look at
        return False
    return type(layer).forward in _FORWARDS and "forward" not in vars(layer)


def linear_calls(layer: nn.Module) -> dict[str, tuple[str, ...]]:
    """The linear calls that make gates, by layer and direction of a stack.

    Args:
        layer: A recurrent layer or cell.

    Returns:
        The names of each call's weights, by that of its first.
    """
    names = _weight_names(layer)
    inputs = [name for name in names if name.startswith(_INPUT)]
    pairs = [(name, name.replace(_INPUT, _HIDDEN)) for name in inputs]
    if type(layer).forward in (nn.GRU.forward, nn.GRUCell.forward):
        return {name: (name,) for pair in pairs for name in pair}
    return {pair[0]: pair for pair in pairs}


def projections(layer: nn.Module) -> tuple[str, ...]:
    """Names of the weights that are multiplied with what the gates give."""
    return tuple(name for name in _weight_names(layer) if name.startswith(_PROJECTED))


def own_parameters(layer: nn.Module, name: str) -> tuple[str, ...]:
    """Names of the parameters that one of its weights is, or is made of (weight norm, pruning)."""
    if layer._parameters.get(name) is not None:
        return (name,)
    longer = tuple(f"{n}_" for n in _weight_names(layer) if n.startswith(f"{name}_"))
    return tuple(
        parameter
        for parameter, _ in layer.named_parameters()
        if parameter.startswith(f"parametrizations.{name}.")
        or (parameter.startswith(f"{name}_") and not parameter.startswith(longer))
    )


def _weight_names(layer: nn.Module) -> tuple[str, ...]:
    if isinstance(layer, nn.RNNBase):
        return tuple(n for n in layer._flat_weights_names if n.startswith("weight_"))
    return (_INPUT, _HIDDEN)


class GateMemory(StandIn):
    """The forward of a recurrent layer whose gates read a memory.

    Args:
        reads: By name of a weight that has a bias of its own, what its call sees of a memory, and
            the layer that multiplies that by W_m, (k,) -> (gates,).
    """

    def __init__(self, reads: dict[str, tuple[View, nn.Linear]]) -> None:
        super().__init__()
        self.reads = reads

    def call(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call the layer with the memory's part in its biases."""
        return called_with(layer, self._tensors(layer), *args, **kwargs)

    def _tensors(self, layer: nn.Module) -> dict[str, Any]:
        """What the layer's forward takes its weights and biases from."""
        if isinstance(layer, RNNCellBase):
            names = (_INPUT, _HIDDEN, "bias_ih", "bias_hh")
            own = {name: getattr(layer, name) for name in names}
            own["bias_ih"], own["bias_hh"] = self._biases(layer, own[_INPUT], "")
            return own
        weights: list[Tensor] = []
        for name in _weight_names(layer):
            weights.append(getattr(layer, name))
            if name.startswith(_HIDDEN):  # biases stand behind it, and before a projection
                weights += self._biases(layer, weights[-1], name.removeprefix(_HIDDEN))
        return {"_flat_weights": weights, "bias": True, "_update_flat_weights": _leave}

    def _biases(self, layer: nn.Module, like: Tensor, suffix: str) -> tuple[Tensor, Tensor]:
        """Both biases of a layer of the stack, with W_m m in those whose weights read."""
        incoming = getattr(layer, f"bias_ih{suffix}", None)
        hidden = getattr(layer, f"bias_hh{suffix}", None)
        if incoming is None or hidden is None:
            incoming = hidden = like.new_zeros(like.shape[0])
        return self._with_memory(incoming, f"{_INPUT}{suffix}"), self._with_memory(
            hidden, f"{_HIDDEN}{suffix}"
        )

    def _with_memory(self, bias: Tensor, name: str) -> Tensor:
        read = self.reads.get(name)
        return bias if read is None else bias + _product(*read).to(bias)


def _product(view: View, beside: nn.Linear) -> Tensor:
    """W_m m, where W_m lives and in its dtype."""
    return beside(view.for_input(beside.weight))


def _leave() -> None:
    """The shallow copy's tensors are as they should be."""
