"""The optimizer's state through surgery and back.

carry            a whole state dict: entries, numbers, new parameters
groups           which group each new parameter joins
moments          one parameter's entry: tensors in, tensors out
parameter_order  which parameter an entry is of
"""

from aim_surgery.checkpoint.optimizer.carry import (
    carry_optimizer,
    carry_scheduler,
    restore_optimizer,
)

__all__ = ["carry_optimizer", "carry_scheduler", "restore_optimizer"]
