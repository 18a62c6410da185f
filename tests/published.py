"""Published blocks as people paste them into their repositories: same names, structure and mathematics, our words."""

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


class ReweightedAPNBBlock(APNBBlock):
    """One parameter more, zero at first: until it is trained the output is the published one."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.gamma * x[:, :1]


class DroppingAPNBBlock(APNBBlock):
    """A dropout inside: in evaluation the output is the published one."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.drop(x))


def norm_relu(channels: int, norm_type: str) -> nn.Sequential:
    assert norm_type == "batchnorm"
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


class PSPModule(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.stages = nn.ModuleList([nn.AdaptiveAvgPool2d((size, size)) for size in sizes])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([stage(x).flatten(2) for stage in self.stages], dim=2)


class SelfAttentionBlock2D(nn.Module):
    """MendelXu/ANN's stage; one class for both blocks, ``high`` is None for the pyramid block."""

    def __init__(self, low, high, key_channels, value_channels, out_channels, scale, norm_type, psp_size):
        super().__init__()
        self.scale = scale
        self.key_channels = key_channels
        self.value_channels = value_channels
        self.pool = nn.MaxPool2d(kernel_size=(scale, scale))
        self.f_key = nn.Sequential(nn.Conv2d(low, key_channels, 1), norm_relu(key_channels, norm_type))
        self.f_query = self.f_key
        if high is not None:
            self.f_query = nn.Sequential(nn.Conv2d(high, key_channels, 1), norm_relu(key_channels, norm_type))
        self.f_value = nn.Conv2d(low, value_channels, 1)
        self.W = nn.Conv2d(value_channels, out_channels, 1)
        self.psp = PSPModule(psp_size)
        nn.init.zeros_(self.W.weight)
        nn.init.zeros_(self.W.bias)

    def forward(self, low_feats: Tensor, high_feats: Tensor | None = None) -> Tensor:
        high_feats = low_feats if high_feats is None else high_feats
        value = self.psp(self.f_value(low_feats))
        query = self.f_query(high_feats)
        key = self.psp(self.f_key(low_feats))
        return self.W(attend(query, key, value))


class AFNB(nn.Module):
    def __init__(
        self, low_in_channels, high_in_channels, out_channels, key_channels, value_channels, dropout, sizes=(1,),
        norm_type="batchnorm", psp_size=(1, 3, 6, 8),
    ):  # fmt: skip
        super().__init__()
        widths = low_in_channels, high_in_channels, key_channels, value_channels, out_channels
        self.stages = nn.ModuleList([SelfAttentionBlock2D(*widths, size, norm_type, psp_size) for size in sizes])
        self.conv_bn_dropout = nn.Sequential(
            nn.Conv2d(out_channels + high_in_channels, out_channels, 1),
            nn.BatchNorm2d(out_channels),
            nn.Dropout2d(dropout),
        )

    def forward(self, low_feats: Tensor, high_feats: Tensor) -> Tensor:
        context = sum(stage(low_feats, high_feats) for stage in self.stages)
        return self.conv_bn_dropout(torch.cat([context, high_feats], 1))


class APNB(nn.Module):
    def __init__(
        self, in_channels, out_channels, key_channels, value_channels, dropout, sizes=(1,), norm_type="batchnorm",
        psp_size=(1, 3, 6, 8),
    ):  # fmt: skip
        super().__init__()
        widths = in_channels, None, key_channels, value_channels, out_channels
        self.stages = nn.ModuleList([SelfAttentionBlock2D(*widths, size, norm_type, psp_size) for size in sizes])
        self.conv_bn_dropout = nn.Sequential(
            nn.Conv2d(in_channels + out_channels, out_channels, 1),
            norm_relu(out_channels, norm_type),
            nn.Dropout2d(dropout),
        )

    def forward(self, feats: Tensor) -> Tensor:
        context = sum(stage(feats) for stage in self.stages)
        return self.conv_bn_dropout(torch.cat([context, feats], 1))
