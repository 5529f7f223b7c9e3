"""The original's base: Keras' ResNet50, in plain PyTorch.

It differs from torchvision's in that each convolution has a bias, the stride of a block is in its
first 1x1 convolution, batch norm has Keras' constants, and the first convolution may have stride 1.
Modules are named as Keras names its layers: `res2a.branch2a` is Keras' `res2a_branch2a`.
"""

from __future__ import annotations

from torch import Tensor, nn

SIZE = 224
CLASSES = 100
STAGES = (  # name, blocks, width, stride
    ("2", "abc", 64, 1),
    ("3", "abcd", 128, 2),
    ("4", "abcdef", 256, 2),
    ("5", "abc", 512, 2),
)


class Block(nn.Module):
    """relu(shortcut(x) + branch2(x)), a bottleneck.

    Shapes:
        (N, in_channels, H, W) -> (N, 4 · width, H / stride, W / stride)

    Args:
        in_channels: Channels that come in.
        width: Of the 1x1 and 3x3 convolutions in the middle.
        stride: Of the first 1x1 convolution and of the shortcut.
        projects: Whether the shortcut is a convolution (Keras' "conv block") or the input itself
            ("identity block").
    """

    def __init__(self, in_channels: int, width: int, stride: int, *, projects: bool) -> None:
        super().__init__()
        self.branch2a = nn.Conv2d(in_channels, width, 1, stride)
        self.bn2a = _norm(width)
        self.branch2b = nn.Conv2d(width, width, 3, padding=1)
        self.bn2b = _norm(width)
        self.branch2c = nn.Conv2d(width, 4 * width, 1)
        self.bn2c = _norm(4 * width)
        self.branch1 = nn.Conv2d(in_channels, 4 * width, 1, stride) if projects else nn.Identity()
        self.bn1 = _norm(4 * width) if projects else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        y = self.relu(self.bn2a(self.branch2a(x)))
        y = self.relu(self.bn2b(self.branch2b(y)))
        return self.relu(self.bn2c(self.branch2c(y)) + self.bn1(self.branch1(x)))


class KerasResNet50(nn.Module):
    """ResNet50 as `keras.applications` had it.

    Shapes:
        (N, 3, H, W) -> (N, classes)

    Args:
        classes: Outputs.
        stride: Of the first convolution: 1 in the notebook's network with memory, 2 in Keras and in
            the notebook's control.
    """

    def __init__(self, classes: int = CLASSES, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride, padding=3)
        self.bn_conv1 = _norm(64)
        self.relu = nn.ReLU()
        self.pad = nn.ZeroPad2d(1)
        self.pool = nn.MaxPool2d(3, 2)
        channels = 64
        self.blocks: list[str] = []
        for stage, letters, width, stage_stride in STAGES:
            for letter in letters:
                first = letter == "a"
                block = Block(channels, width, stage_stride if first else 1, projects=first)
                self.add_module(f"res{stage}{letter}", block)
                self.blocks.append(f"res{stage}{letter}")
                channels = 4 * width
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def features(self, x: Tensor) -> Tensor:
        """The last feature map: (N, 2048, H / 16, W / 16) with stride 1, half of it with 2."""
        x = self.pool(self.pad(self.relu(self.bn_conv1(self.conv1(x)))))
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        return self.fc(self.avg_pool(self.features(x)).flatten(1))


def keras_count(module: nn.Module) -> int:
    """Count parameters as Keras does: batch norm's running mean and variance are among them.

    Args:
        module: Any module.

    Returns:
        Trainable parameters and running statistics.
    """
    norms = (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    statistics = sum(2 * norm.num_features for norm in norms)
    return sum(parameter.numel() for parameter in module.parameters()) + statistics


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)  # Keras' momentum of 0.99
