"""Convolutional networks for small images, as the CIFAR variants of the designs: stride-1 stems, few poolings.

Each is a plain module without its classifier: images (B, 3, s, s) -> features (B, num_features). Adaptive pooling lets
every one run at 32, 64 and 224 px. Sources: LeNet-5 (LeCun et al., 1998), AlexNet (Krizhevsky et al., 2012), VGG-16
(Simonyan & Zisserman, 2015, plan D with BatchNorm), GoogLeNet (Szegedy et al., 2015, with BatchNorm, 5x5 as two 3x3),
ResNeXt-29 2x64d (Xie et al., 2017), SE-ResNet-18 with pre-activation (Hu et al., 2018), RegNetX-200MF (Radosavovic et
al., 2020); ResNet-18 and DenseNet-121 are timm's with another stem.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convs.cifar_resnet import CifarResNet


class LeNet(nn.Module):
    """conv5-ReLU-pool twice, two fully connected layers. The first one reads the map of a 32 px (5x5) or 64 px (13x13)
    image; the map of any other size is pooled to the nearest of those that the network was built for."""

    num_features = 84

    def __init__(self, image_size: int = 32):
        super().__init__()
        side = max(1, min(image_size // 4 - 3, 13))
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.pool = nn.AdaptiveAvgPool2d(side)
        self.fc1, self.fc2 = nn.Linear(16 * side * side, 120), nn.Linear(120, self.num_features)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(images).relu(), 2)
        x = F.max_pool2d(self.conv2(x).relu(), 2)
        x = self.fc1(self.pool(x).flatten(1)).relu()
        return self.fc2(x).relu()


class AlexNet(nn.Module):
    """Five convolutions, three poolings, one fully connected layer with dropout before it, and a second one."""

    num_features = 4096

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 192, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU(),
            nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Dropout(), nn.Linear(1024, 4096), nn.ReLU(),
            nn.Dropout(), nn.Linear(4096, self.num_features), nn.ReLU(),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)


class VGG16(nn.Module):
    """Thirteen convolutions with BatchNorm, then 512-512 fully connected with dropout; convolutions start from a normal
    of variance 2 / (k^2 out)."""

    num_features = 512

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for stage, repeats in zip((64, 128, 256, 512, 512), (2, 2, 3, 3, 3), strict=True):
            for _ in range(repeats):
                layers += [nn.Conv2d(width, stage, 3, 1, 1), nn.BatchNorm2d(stage), nn.ReLU()]
                width = stage
            layers.append(nn.MaxPool2d(2))
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        layers += [nn.Dropout(), nn.Linear(512, 512), nn.ReLU(), nn.Dropout(), nn.Linear(512, 512), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=math.sqrt(2 / (9 * module.out_channels)))
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)


def _conv_bn(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.BatchNorm2d(outputs), nn.ReLU()]


class _Inception(nn.Module):
    """Four branches, concatenated: 1x1; 1x1-3x3; 1x1-3x3-3x3; pool-1x1."""

    def __init__(self, inputs: int, n1: int, r3: int, n3: int, r5: int, n5: int, pool: int):
        super().__init__()
        self.branches = nn.ModuleList(
            [
                nn.Sequential(*_conv_bn(inputs, n1, 1)),
                nn.Sequential(*_conv_bn(inputs, r3, 1), *_conv_bn(r3, n3, 3)),
                nn.Sequential(*_conv_bn(inputs, r5, 1), *_conv_bn(r5, n5, 3), *_conv_bn(n5, n5, 3)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), *_conv_bn(inputs, pool, 1)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class Inception(nn.Module):
    """GoogLeNet with a 3x3 stem to 192 channels and no pooling before the first block."""

    num_features = 1024
    # (1x1; reduced and 3x3; reduced and 5x5; pool) of Table 1; a pooling stands before 4a and 5a.
    BLOCKS: Mapping[str, tuple[int, int, int, int, int, int]] = {
        "3a": (64, 96, 128, 16, 32, 32), "3b": (128, 128, 192, 32, 96, 64),
        "4a": (192, 96, 208, 16, 48, 64), "4b": (160, 112, 224, 24, 64, 64), "4c": (128, 128, 256, 24, 64, 64),
        "4d": (112, 144, 288, 32, 64, 64), "4e": (256, 160, 320, 32, 128, 128),
        "5a": (256, 160, 320, 32, 128, 128), "5b": (384, 192, 384, 48, 128, 128),
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        layers, width = _conv_bn(3, 192, 3), 192
        for name, sizes in self.BLOCKS.items():
            if name in ("4a", "5a"):
                layers.append(nn.MaxPool2d(3, 2, 1))
            layers.append(_Inception(width, *sizes))
            width = sizes[0] + sizes[2] + sizes[4] + sizes[5]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)


class _Grouped(nn.Module):
    """Bottleneck with a grouped 3x3: 1x1-BN-ReLU, 3x3-BN-ReLU, 1x1-BN, plus the shortcut, ReLU."""

    def __init__(self, inputs: int, width: int, outputs: int, groups: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            project = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.shortcut(x)).relu()


class _PreActivatedSE(nn.Module):
    """BN-ReLU-3x3 twice, weighted by channel (squeeze 1/16), plus the input, projected after the first ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(outputs, outputs // 16, 1), nn.ReLU(),
            nn.Conv2d(outputs // 16, outputs, 1), nn.Sigmoid(),
        )  # fmt: skip
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.bn1(x).relu()
        y = self.conv2(self.bn2(self.conv1(active)).relu())
        return y * self.squeeze(y) + (x if self.shortcut is None else self.shortcut(active))


class Residual(nn.Module):
    """A stem, stages of blocks, the mean over the map."""

    def __init__(self, stem: Sequence[nn.Module], blocks: Sequence[nn.Module], num_features: int):
        super().__init__()
        self.num_features = num_features
        self.features = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)


def _stem(width: int, kernel: int = 3) -> list[nn.Module]:
    return [nn.Conv2d(3, width, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()]


def resnext29(image_size: int) -> Residual:
    """ResNeXt-29, 2x64d. Above 32 px the first stage halves the map."""
    blocks, inputs = [], 64
    for stage, width in enumerate((128, 256, 512)):
        for block in range(3):
            stride = 1 if block else _first_stride(image_size) if stage == 0 else 2
            blocks.append(_Grouped(inputs, width, 2 * width, groups=2, stride=stride))
            inputs = 2 * width
    return Residual(_stem(64, kernel=1), blocks, inputs)


def senet18(image_size: int) -> Residual:
    """SE-ResNet-18 with pre-activation. Above 32 px the first stage halves the map."""
    blocks, inputs = [], 64
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            stride = 1 if block else _first_stride(image_size) if stage == 0 else 2
            blocks.append(_PreActivatedSE(inputs, width, stride))
            inputs = width
    return Residual(_stem(64), blocks, inputs)


def regnetx_200mf() -> Residual:
    """RegNetX-200MF (widths 24, 56, 152, 368, groups of 8 channels) with a stem of 64 channels; strides 1, 1, 2, 2."""
    blocks, inputs = [], 64
    for width, depth, stride in zip((24, 56, 152, 368), (1, 1, 4, 7), (1, 1, 2, 2), strict=True):
        for block in range(depth):
            blocks.append(_Grouped(inputs, width, width, groups=width // 8, stride=1 if block else stride))
            inputs = width
    return Residual(_stem(64), blocks, inputs)


def resnet18() -> nn.Module:
    """timm's ResNet-18 with a 3x3 stem of stride 1 and no pooling after it; every BatchNorm starts at 1, the last of a
    block too."""
    model: Any = timm.create_model("resnet18", num_classes=0, zero_init_last=False)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


def densenet121() -> nn.Module:
    """timm's DenseNet-121 with a bare 3x3 stem of stride 1; convolutions start as torch's do."""
    model: Any = timm.create_model("densenet121", num_classes=0)
    model.features.conv0 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.features.norm0, model.features.pool0 = nn.Identity(), nn.Identity()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    return model


def _first_stride(image_size: int) -> int:
    return 1 if image_size <= 32 else 2


# What `backbone` calls them: image size -> network.
SMALL: Mapping[str, Callable[[int], nn.Module]] = {
    "small_lenet": LeNet,
    "small_alexnet": lambda image_size: AlexNet(),
    "small_vgg16": lambda image_size: VGG16(),
    "small_inception": lambda image_size: Inception(),
    "small_resnet18": lambda image_size: resnet18(),
    "small_resnext29": resnext29,
    "small_densenet121": lambda image_size: densenet121(),
    "small_senet18": senet18,
    "small_regnetx_200mf": lambda image_size: regnetx_200mf(),
    "small_resnet32": lambda image_size: CifarResNet(),
    "small_cosine_resnet32": lambda image_size: CifarResNet(cosine=True),
}
