"""ResNets for 32 px images (He et al., 2016, section 4.2) as the class-incremental literature trains them from scratch.

Stem of 16 channels, three stages of n basic blocks with 16, 32, 64 channels, depth 6n + 2. Where a stage halves the
map, the shortcut is

    type A   every second pixel, the missing channels zero                       (no weights)
    type B   1x1 convolution of stride 2 + BatchNorm                             ("cosine" form, for cosine heads)

The cosine form also leaves out the last ReLU: its features point in all directions. (B, 3, 32, 32) -> (B, 64).
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """conv3x3 - BN - ReLU - conv3x3 - BN, + shortcut, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int, project: bool, last_relu: bool = True):
        super().__init__()
        self.conv_a = _conv3x3(inputs, outputs, stride)
        self.bn_a = nn.BatchNorm2d(outputs)
        self.conv_b = _conv3x3(outputs, outputs)
        self.bn_b = nn.BatchNorm2d(outputs)
        self.stride, self.missing, self.last_relu = stride, outputs - inputs, last_relu
        self.downsample = nn.Sequential()
        if project and stride > 1:
            self.downsample.add_module("conv", nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.downsample.add_module("bn", nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn_b(self.conv_b(self.bn_a(self.conv_a(x)).relu())) + self._shortcut(x)
        return y.relu() if self.last_relu else y

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1 or len(self.downsample):
            return self.downsample(x)
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.missing))


class LastStage(nn.Module):
    """The blocks of 64 channels and the mean over the map: what MEMO gives every task."""

    def __init__(self, final_stage: nn.Module):
        super().__init__()
        self.final_stage = final_stage

    def forward(self, maps: Tensor) -> Tensor:
        return self.final_stage(maps).mean(dim=(2, 3))


class CifarResNet(nn.Module):
    """cosine: shortcuts of type B and no last ReLU. Convolutions start from a normal of variance 2 / (k k out). The
    mean over the map lets it read images of any size."""

    num_features = WIDTHS[-1]

    def __init__(self, depth: int = 32, cosine: bool = False):
        super().__init__()
        self.stage_1: nn.Module
        self.stage_2: nn.Module
        self.stage_3: nn.Module | None
        self.conv_1_3x3, self.bn_1 = _conv3x3(3, WIDTHS[0]), nn.BatchNorm2d(WIDTHS[0])
        blocks, inputs = (depth - 2) // 6, WIDTHS[0]
        for number, width in enumerate(WIDTHS, 1):
            stage = nn.Sequential()
            for block in range(blocks):
                stride = 2 if block == 0 and number > 1 else 1
                last = number == len(WIDTHS) and block == blocks - 1
                stage.append(BasicBlock(inputs, width, stride, project=cosine, last_relu=not (cosine and last)))
                inputs = width
            self.add_module(f"stage_{number}", stage)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] ** 2 * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))

    def forward(self, images: Tensor) -> Tensor:
        x = self.stage_2(self.stage_1(self.bn_1(self.conv_1_3x3(images)).relu()))  # (B, 32, 16, 16)
        return x if self.stage_3 is None else self.stage_3(x).mean(dim=(2, 3))

    def split(self) -> tuple[nn.Module, nn.Module]:
        """(stem and two stages, last stage and pooling): this network cut in two."""
        assert self.stage_3 is not None, "split() was called before"
        last, self.stage_3 = LastStage(self.stage_3), None
        return self, last


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
