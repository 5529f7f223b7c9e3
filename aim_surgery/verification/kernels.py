"""ATen kernels that sum products, by their exact names: parts of names would hit `lgamma` for `mm`.

Coverage asks for a kernel's operands; rounding, which kernels sum at all. Neither knows of sites.
"""

from __future__ import annotations

# Arguments that are multiplied with each other, by kernel; biases and masks are added, so they are
# left out. Of operands that are all made of parameters, the last is the weight.
PRODUCTS: dict[str, tuple[int, ...]] = {
    "convolution": (0, 1), "_convolution": (0, 1), "convolution_overrideable": (0, 1),
    "conv1d": (0, 1), "conv2d": (0, 1), "conv3d": (0, 1), "conv_tbc": (0, 1),
    "cudnn_convolution_transpose": (0, 1),
    "conv_transpose1d": (0, 1), "conv_transpose2d": (0, 1), "conv_transpose3d": (0, 1),
    "mkldnn_convolution": (0, 1), "cudnn_convolution": (0, 1),
    "miopen_convolution": (0, 1), "mkldnn_linear": (0, 1), "linear": (0, 1),
    "mm": (0, 1), "bmm": (0, 1), "matmul": (0, 1), "mv": (0, 1),
    "_grouped_mm": (0, 1),
    "addmm": (1, 2), "_addmm_activation": (1, 2), "addmv": (1, 2), "addbmm": (1, 2),
    "baddbmm": (1, 2), "addmm_": (1, 2), "baddbmm_": (1, 2), "_trilinear": (0, 2, 1),
    "scaled_dot_product_attention": (0, 1, 2),
    "_scaled_dot_product_flash_attention": (0, 1, 2),
    "_scaled_dot_product_flash_attention_for_cpu": (0, 1, 2),
    "_scaled_dot_product_efficient_attention": (0, 1, 2),
    "_scaled_dot_product_cudnn_attention": (0, 1, 2),
    "_scaled_dot_product_fused_attention_overrideable": (0, 1, 2),
    "_scaled_dot_product_attention_math": (0, 1, 2),
}  # fmt: skip
# Of these, the second operand is the weight, whatever it is made of.
CONVOLUTIONS = frozenset(name for name in PRODUCTS if "conv" in name)
# Kernels that hold several products: every weight that they are given counts.
PACKED = frozenset(
    ("_native_multi_head_attention", "_transformer_encoder_layer_fwd", "bilinear",
     "_cudnn_rnn", "miopen_rnn", "mkldnn_rnn_layer",
     "lstm", "gru", "rnn_tanh", "rnn_relu",
     "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
)  # fmt: skip
# All that sum products, and so round by the order in which they do; of tuples, the first is summed.
SUMS = frozenset(
    (*PRODUCTS, *PACKED, "dot", "vdot", "addmv_", "addbmm_", "_sparse_mm", "_sparse_addmm",
     "sspaddmm", "slow_conv3d", "_conv_depthwise2d", "conv_depthwise3d", "deform_conv2d",
     "_flash_attention_forward", "_efficient_attention_forward")
)  # fmt: skip
