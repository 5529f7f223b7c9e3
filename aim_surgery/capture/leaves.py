"""What of a model stays one call, and by which names its tensors go."""

from __future__ import annotations

import functools

import torch
from torch import fx, nn


def is_stock(module: nn.Module) -> bool:
    """Whether calling the module runs PyTorch's own code and nothing else.

    True for `nn.Conv2d` and for a subclass that keeps its forward; false for containers, for packed
    attention (its Python shows its products, see `decompose`), for a subclass with its own forward
    or `_conv_forward`, and for an instance with a patched forward or a compiled call.
    """
    state = vars(module)
    own = "forward" in state or state.get("_compiled_call_impl") is not None
    return not own and _is_stock_class(type(module))


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module runs PyTorch's own code, and no forward hooks around it."""
    return is_stock(module) and not (module._forward_hooks or module._forward_pre_hooks)


@functools.cache
def _is_stock_class(kind: type[nn.Module]) -> bool:
    functions = [getattr(kind, name, None) for name in ("forward", "_conv_forward")]
    homes = [getattr(function, "__module__", "") or "" for function in functions if function]
    traced = ("torch.nn.modules.container", "torch.nn.modules.transformer")
    if functions[0] is nn.MultiheadAttention.forward:
        return False
    return all(
        home.startswith(("torch.nn.modules.", "torch.ao.nn.")) and home not in traced
        for home in homes
    )


def is_python_call(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node calls a module that runs other code than PyTorch's own."""
    return node.op == "call_module" and not is_stock(model.get_submodule(str(node.target)))


def holds_weights(module: nn.Module) -> bool:
    """Whether a module, or one in it, has a matrix or kernel that could read the memory."""
    tensors = (t for part in module.modules() for t in part._parameters.values() if t is not None)
    return any(tensor.ndim >= 2 for tensor in tensors)


def tensor_names(model: nn.Module) -> dict[int, str]:
    """Qualified names of all parameters, buffers and plain tensor attributes, by identity."""
    names: dict[int, str] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for home in (module._parameters, module._buffers, vars(module)):
            for name, value in home.items():
                if isinstance(value, torch.Tensor):
                    names.setdefault(id(value), prefix + name)
    return names
