"""The model that weights belong to: built from its spec, with or without values, and filled.

spec             "torchvision:resnet50" -> module
torchvision_ops  import torchvision, also where its compiled operators can't load
skeleton         the same module without values
loading          a state dict into a module, every key accounted for
"""

from aim_surgery.checkpoint.models.spec import build, parse_model_args

__all__ = ["build", "parse_model_args"]
