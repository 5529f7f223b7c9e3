"""Methods: from a network that has learned half of the classes to what learns the other half.

Everything that is not trained stays as it is, running statistics included; only full fine-tuning
lets the base's batch norm work in training mode. LoRA gets ranks, layer by layer, that make it as
large as the memory to within 1 %.

"memory" alone keeps the old head, whose outputs stand for the new classes then: what it learns must
pass through what the base took for five other things.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import aim_surgery
from aim_surgery.checkpoint.models.torchvision_ops import import_torchvision
from aim_surgery.config import Carry
from benchmarks.evidence.arms import DEFAULT
from benchmarks.evidence.networks import Network

HEAD = "head"
Make = Callable[[nn.Module, Network, int], nn.Module]
_AROUND = 2  # ranks of a layer above or below the common one


@dataclass(frozen=True)
class Method:
    """A way to adapt.

    Attributes:
        title: In tables.
        what: What is trained, in one sentence.
        make: From the trained base, the network and a seed to a module whose parameters that ask
            for gradients are the ones to train.
        training: Whether the module is trained in training mode.
    """

    title: str
    what: str
    make: Make
    training: bool = False


def trained_parameters(model: nn.Module) -> int:
    """Elements of all parameters that ask for gradients."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _new_head(model: nn.Module, network: Network, seed: int) -> nn.Linear:
    old = model.get_submodule(HEAD)
    assert isinstance(old, nn.Linear)
    torch.manual_seed(seed)
    new = nn.Linear(old.in_features, network.classes)
    model.set_submodule(HEAD, new)
    return new


def _frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def _probe(model: nn.Module, network: Network, seed: int) -> nn.Module:
    _frozen(model)
    _new_head(model, network, seed)
    return model


def _bias(model: nn.Module, network: Network, seed: int) -> nn.Module:
    _probe(model, network, seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(True)
    return model


def _full(model: nn.Module, network: Network, seed: int) -> nn.Module:
    _new_head(model, network, seed)
    return model


def _memory(carry: Carry = "weights") -> Make:
    config = dataclasses.replace(DEFAULT, carry=carry)

    def make(model: nn.Module, network: Network, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        gm = aim_surgery.transform(model, network.example(), config=config)
        return aim_surgery.freeze_base(gm, statistics=True)

    return make


def _no_writes(model: nn.Module, network: Network, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    plan = aim_surgery.plan(model, network.example(), config=DEFAULT).without_writes("*")
    return aim_surgery.freeze_base(
        aim_surgery.apply(model, plan, network.example()), statistics=True
    )


def _and_head(memory: Make) -> Make:
    """A new head besides a memory."""

    def make(model: nn.Module, network: Network, seed: int) -> nn.Module:
        _new_head(model, network, seed)
        gm = memory(model, network, seed)
        gm.get_parameter(f"{HEAD}.weight").requires_grad_(True)
        gm.get_parameter(f"{HEAD}.bias").requires_grad_(True)
        return gm

    return make


def _lora(model: nn.Module, network: Network, seed: int) -> nn.Module:
    import_torchvision()  # peft imports it by way of transformers
    import peft

    _new_head(model, network, seed)
    ranks = lora_ranks(model, aim_surgery.plan(model, network.example(), config=DEFAULT))
    pattern = {f"^{re.escape(name)}$": rank for name, rank in ranks.items()}
    config = peft.LoraConfig(
        r=1,
        lora_alpha=1,
        rank_pattern=pattern,
        alpha_pattern=pattern,
        target_modules=list(ranks),
        modules_to_save=[HEAD],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on models without a `config`, peft has advice
        return peft.get_peft_model(model, config)  # pyright: ignore[reportArgumentType]


def lora_ranks(model: nn.Module, plan: aim_surgery.Plan) -> dict[str, int]:
    """Ranks by layer that cost what the operation adds.

    Args:
        model: The base with its new head; the head gets no rank, it is trained itself.
        plan: Its `new_parameters` are the number to meet.

    Returns:
        Ranks of one or more; layers without one are left out.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and name != HEAD
    }
    costs = [_cost_of_a_rank(layer) for layer in layers.values()]
    least = max(plan.new_parameters // sum(costs) - _AROUND, 0)
    more = closest_sum(costs, plan.new_parameters - least * sum(costs), 2 * _AROUND + 1)
    ranks = {name: least + extra for name, extra in zip(layers, more, strict=True)}
    return {name: rank for name, rank in ranks.items() if rank}


def closest_sum(costs: Sequence[int], target: int, most: int) -> tuple[int, ...]:
    """How often to take each cost, `most` times at most, to come closest to a sum.

    Example:
        >>> closest_sum((5, 3), 11, 3)
        (1, 2)
    """
    reached: dict[int, tuple[int, ...]] = {0: ()}
    for cost in costs:
        further: dict[int, tuple[int, ...]] = {}
        for total, taken in reached.items():
            for count in range(most + 1):
                if total + count * cost <= target + max(costs):
                    further.setdefault(total + count * cost, (*taken, count))
        reached = further
    return reached[min(reached, key=lambda total: (abs(total - target), total))]


def _cost_of_a_rank(layer: nn.Conv2d | nn.Linear) -> int:
    """A: in -> rank, with the layer's kernel; B: rank -> out, pointwise."""
    return layer.weight[0].numel() + layer.weight.shape[0]


METHODS = {
    "probe": Method("linear probe", "a new head", _probe),
    "bias": Method("bias only", "a new head and all biases, batch norm's among them", _bias),
    "lora": Method("LoRA", "a new head, and low-rank updates as large as the memory", _lora),
    "memory": Method("memory only", "the memory, behind it the old head", _memory()),
    "memory-head": Method("memory and head", "a new head and the memory", _and_head(_memory())),
    "no-writes-head": Method(
        "memory without writes, and head",
        "a new head, and memory and reads of the same plan",
        _and_head(_no_writes),
    ),
    "state-head": Method(
        "carried memory, and head",
        'a new head and the memory, carry="state"; a state is carried on in training mode only, so '
        "it works in that, where the frozen base's norms stay as they are",
        _and_head(_memory("state")),
        training=True,
    ),
    "full": Method("full fine-tuning", "a new head and everything else", _full, training=True),
}
