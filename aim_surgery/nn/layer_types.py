"""torch's own layers that surgery and its passes know, by kind."""

from torch import nn

CONV_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONV_TRANSPOSE_TYPES = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYER_TYPES = (*CONV_TYPES, *CONV_TRANSPOSE_TYPES, nn.Linear)
BATCH_NORM_TYPES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_its_product(layer: nn.Module) -> bool:
    """Whether calling a convolution or linear layer does no more than its product: nothing hooked.

    Args:
        layer: Any module.
    """
    return type(layer) in LAYER_TYPES and "forward" not in vars(layer) and not is_hooked(layer)


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks see a module's calls, or their gradients."""
    return any(getattr(module, name) for name in HOOKS)
