"""ANNNet: shapes, keys, heads, the plain twin."""

import pytest
import torch
from torch import nn

import annnet_kernels as ak
from annnet_kernels.reference import PlainAFNB, PlainAPNB


class TinyBackbone(nn.Module):
    """Two maps at an eighth of the picture."""

    channels = (8, 12)

    def __init__(self):
        super().__init__()
        self.low = nn.Conv2d(3, 8, 3, stride=8, padding=1)
        self.high = nn.Conv2d(8, 12, 1)

    def forward(self, x):
        low = self.low(x)
        return low, self.high(low.relu())


def tiny(**options):
    return ak.ANNNet(5, TinyBackbone(), channels=16, key_channels=8, value_channels=8, dropout=0.0, **options)


def test_training_returns_both_heads_and_evaluation_one():
    net, x = tiny(), torch.randn(2, 3, 65, 49)
    logits, aux = net(x)
    assert logits.shape == aux.shape == (2, 5, 65, 49)
    assert net.eval()(x).shape == (2, 5, 65, 49)
    assert tiny(aux=False)(x).shape == (2, 5, 65, 49)
    assert not any(key.startswith("dsn") for key in tiny(aux=False).state_dict())


def test_fused_and_plain_models_agree_in_training_and_evaluation():
    fused, plain = tiny().double(), tiny(blocks="plain").double()
    assert isinstance(plain.fusion, PlainAFNB)
    assert not isinstance(plain.fusion, ak.AFNB)
    assert isinstance(plain.context[2], PlainAPNB)
    for stage in (*fused.fusion.stages, *fused.context[2].stages):
        nn.init.normal_(stage.W.weight)
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(2, 3, 65, 49, dtype=torch.float64)
    for net in (fused, plain):
        sum(out.square().mean() for out in net(x)).backward()
    for (name, p), q in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    for (name, b), c in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(b, c, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x))


def test_logits_are_resized_as_asked():
    x = torch.randn(1, 3, 65, 49)
    net = tiny(align_corners=True).eval()
    low, high = net.backbone(x)
    coarse = net.cls(net.context(net.fusion(low, high)))
    expected = nn.functional.interpolate(coarse, size=(65, 49), mode="bilinear", align_corners=True)
    torch.testing.assert_close(net(x), expected)


def test_the_dilated_resnet_has_torchvisions_keys_and_output_stride_8():
    torchvision = pytest.importorskip("torchvision")
    net = ak.ANNNet(3).eval()
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]).state_dict()
    mine = {k.removeprefix("backbone.") for k in net.state_dict() if k.startswith("backbone.")}
    assert mine == {k for k in theirs if not k.startswith("fc.")}
    with torch.inference_mode():
        low, high = net.backbone(torch.randn(1, 3, 65, 97))
    assert low.shape == (1, 1024, 9, 13)
    assert high.shape == (1, 2048, 9, 13)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes: expected a positive integer, got 0"),
        ({"num_classes": 2, "backbone": "vgg"}, ValueError, "backbone: expected one of resnet50, resnet101, got 'vgg'"),
        ({"num_classes": 2, "backbone": 50}, TypeError, "backbone: expected one of resnet50, resnet101, got 50"),
        ({"num_classes": 2, "backbone": nn.Identity()}, ValueError, "backbone: expected an attribute channels"),
        ({"num_classes": 2, "backbone": TinyBackbone(), "weights": "DEFAULT"}, ValueError, "weights: expected None"),
        ({"num_classes": 2, "backbone": TinyBackbone(), "blocks": "fast"}, ValueError, "blocks: expected one of fused"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ak.ANNNet(**arguments)


def test_a_bad_picture_is_named():
    with pytest.raises(ValueError, match="x: expected a feature map of shape"):
        tiny()(torch.randn(3, 65, 49))


def test_an_image_has_three_channels():
    with pytest.raises(ValueError, match="x: expected 3 channels, got 4"):
        ak.ANNNet(2)(torch.zeros(1, 4, 9, 9))
