"""What is known to leave sets of channels as they are: modules, functions and methods of tensors."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from syncnorm.family.layer import FamilyLayer

NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, FamilyLayer)

# What does the same to every channel.
ALIKE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Identity),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Softmax, nn.LogSoftmax),
)
POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
ALIKE_FUNCTIONS: set[Any] = {
    *(F.relu, F.relu_, torch.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu),
    *(F.mish, F.softplus, F.hardswish, F.hardsigmoid, F.hardtanh, F.sigmoid, torch.sigmoid),
    *(F.tanh, torch.tanh, F.dropout, F.dropout2d, F.softmax, torch.softmax, F.log_softmax),
    torch.log_softmax,
}
POOLING: set[Any] = {
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
}
ALIKE_METHODS = {"relu", "relu_", "tanh", "sigmoid", "contiguous", "clone", "detach"}
JOINING: set[Any] = {
    *(operator.add, operator.iadd, torch.add, operator.sub, torch.sub, operator.mul),
    *(operator.imul, torch.mul, operator.truediv, "add", "add_", "mul", "mul_", "sub"),
}
MEANS: set[Any] = {torch.mean, torch.amax, "mean", "amax"}
FLATTENING: set[Any] = {torch.flatten, "flatten"}
VIEWS: set[Any] = {"view", "reshape", torch.reshape}
