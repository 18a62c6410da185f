"""The simple published variant as people paste it into their repositories: same names and mathematics, our words."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def projection(in_channels: int, key_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, key_channels, 1), nn.BatchNorm2d(key_channels), nn.ReLU())


class PPMModule(nn.ModuleList):
    def __init__(self, pool_sizes=(1, 3, 6, 8)):
        super().__init__([nn.Sequential(nn.AdaptiveAvgPool2d(size)) for size in pool_sizes])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([level(x).flatten(2) for level in self], dim=2)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    batch, channels, height, width = query.shape
    logits = channels**-0.5 * (query.flatten(2).transpose(1, 2) @ key)
    context = F.softmax(logits, dim=-1) @ value.transpose(1, 2)
    return context.transpose(1, 2).reshape(batch, -1, height, width)


class AFNPBlock(nn.Module):
    def __init__(self, in_channels, key_channels, value_channels, pool_sizes=(1, 3, 6, 8)):
        super().__init__()
        self.Conv_query = projection(in_channels, key_channels)
        self.Conv_key = projection(in_channels // 2, key_channels)
        self.Conv_value = nn.Conv2d(in_channels // 2, value_channels, 1)
        self.ConvOut = nn.Conv2d(value_channels, in_channels, 1)
        self.ppm = PPMModule(pool_sizes)
        nn.init.zeros_(self.ConvOut.weight)
        nn.init.zeros_(self.ConvOut.bias)

    def forward(self, low_feats: Tensor, high_feats: Tensor) -> Tensor:
        value = self.ppm(self.Conv_value(low_feats))
        key = self.ppm(self.Conv_key(low_feats))
        return self.ConvOut(attend(self.Conv_query(high_feats), key, value))


class APNBBlock(nn.Module):
    def __init__(self, in_channels, out_channels, key_channels, value_channels, pool_sizes=(1, 3, 6, 8)):
        super().__init__()
        self.Conv_Key = projection(in_channels, key_channels)
        self.Conv_Query = self.Conv_Key
        self.Conv_Value = nn.Conv2d(in_channels, value_channels, 1)
        self.Conv_Out = nn.Conv2d(value_channels, out_channels, 1)
        self.ppm = PPMModule(pool_sizes)
        nn.init.zeros_(self.Conv_Out.weight)
        nn.init.zeros_(self.Conv_Out.bias)

    def forward(self, x: Tensor) -> Tensor:
        value = self.ppm(self.Conv_Value(x))
        query = self.Conv_Query(x)
        key = self.ppm(self.Conv_Key(x))
        return self.Conv_Out(attend(query, key, value))


class SharpenedAPNBBlock(APNBBlock):
    """One operation changed: the logits are doubled. Structure does not show it."""

    def forward(self, x: Tensor) -> Tensor:
        value = self.ppm(self.Conv_Value(x))
        key = self.ppm(self.Conv_Key(x))
        return self.Conv_Out(attend(2 * self.Conv_Query(x), key, value))
