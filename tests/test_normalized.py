"""The blocks' own Functions: what they keep, what they refuse, what they leave in the buffers."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import annnet_kernels as ak
from annnet_kernels.blocks import normalization as normalization_module
from annnet_kernels.blocks.normalization import FeatureMap, apply_tail, channel_scale, norm_of
from annnet_kernels.reference import PlainAFNB, PlainAPNB
from benchmarks import measure
from benchmarks.counting import count


def kept_for_backward(kind, channels):
    """Bytes of distinct storages packed by saved-tensor hooks, without parameters and the block's inputs; batch 4.

    Nothing is computed: fake tensors have sizes but no memory.
    """
    kept = {}
    with FakeTensorMode():
        block = kind(*channels, dropout=0.05)
        maps = [torch.empty(4, c, 97, 97, requires_grad=True) for c in channels[: 1 if len(channels) == 4 else 2]]
        own = {t.untyped_storage()._cdata for t in (*block.parameters(), *block.buffers(), *maps)}

        def pack(tensor):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            block(*maps)
    return sum(storage.nbytes() for identity, storage in kept.items() if identity not in own)


APNB_CHANNELS, AFNB_CHANNELS = (512, 512, 256, 256), (1024, 2048, 2048, 256, 256)


@pytest.mark.parametrize(
    ("fused", "plain", "channels", "share"),
    [(ak.APNB, PlainAPNB, APNB_CHANNELS, 0.23), (ak.AFNB, PlainAFNB, AFNB_CHANNELS, 0.35)],
)
def test_a_fraction_of_the_published_memory_is_kept(fused, plain, channels, share):
    mine, theirs = kept_for_backward(fused, channels), kept_for_backward(plain, channels)
    assert mine <= share * theirs, f"keeps {mine / theirs:.3f} of the published block's memory"


@pytest.mark.parametrize(("kind", "channels"), [(ak.APNB, (32, 48, 8, 8)), (ak.AFNB, (16, 32, 48, 8, 8))])
def test_recomputing_keeps_a_map_less(kind, channels):
    live = {}
    for recompute in (False, True):
        block = kind(*channels, recompute=recompute)
        maps = [torch.randn(1, c, 97, 97, requires_grad=True) for c in channels[: 1 if kind is ak.APNB else 2]]
        outputs = []
        live[recompute] = measure.memory_of(lambda: outputs.append(block(*maps)), torch.device("cpu")).live  # noqa: B023
    assert live[False] - live[True] >= 0.99 * 48 * 97 * 97 * 4  # a vector or two more are kept instead


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, lambda channels: nn.GroupNorm(2, channels)])
@pytest.mark.parametrize("autocast", [False, True])
def test_recomputing_changes_no_bit_of_a_training_step(autocast, norm_layer):
    block = ak.APNB(8, 6, 4, 4, dropout=0.5, norm_layer=norm_layer)
    nn.init.normal_(block.stages[0].W.weight)
    twin = ak.APNB(8, 6, 4, 4, dropout=0.5, norm_layer=norm_layer, recompute=True)
    twin.load_state_dict(block.state_dict())
    x, weights = torch.randn(2, 8, 9, 7, requires_grad=True), torch.randn(2, 6, 9, 7)
    results = []
    for module in (block, twin):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = module(x)
        gradients = torch.autograd.grad((out * weights).sum(), (x, *module.parameters()))
        results.append([out, *gradients, *module.buffers()])
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "channels"), [(ak.AFNB, AFNB_CHANNELS), (ak.APNB, (2048, 2048, 256, 256))])
def test_without_gradients_nothing_of_the_size_of_the_output_lives_beside_it(kind, channels, training):
    """Counted on tensors without memory, at a size that would need gigabytes; what operators hold inside is unseen."""
    inputs = channels[: 1 if kind is ak.APNB else 2]

    def build():
        block = kind(*channels).train(training)
        maps = [torch.empty(1, c, 128, 256) for c in inputs]
        return torch.no_grad()(lambda: block(*maps))

    pixel = 128 * 256 * 4
    beyond = count(build).peak - channels[len(inputs)] * pixel
    assert beyond <= 0.25 * sum(inputs) * pixel, f"{beyond / (sum(inputs) * pixel):.3f} of the input"


@pytest.mark.parametrize("relu", [True, False])
def test_the_tail_equals_batch_norm_relu_dropout(relu):
    norm = nn.BatchNorm2d(6).double()
    twin = nn.Sequential(nn.BatchNorm2d(6).double(), nn.ReLU() if relu else nn.Identity(), nn.Dropout2d(0.4))
    for module in (norm, twin[0]):
        torch.manual_seed(0)
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
    x, weights = torch.randn(2, 3, 6, 5, 4, dtype=torch.float64)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(1)
    scale = channel_scale(twin[2], mine, 6)
    out = apply_tail(FeatureMap(mine, norm_of(norm, mine)), relu, scale)
    torch.manual_seed(1)
    expected = twin(theirs)
    torch.testing.assert_close(out, expected)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(norm.weight.grad, twin[0].weight.grad)
    torch.testing.assert_close(norm.bias.grad, twin[0].bias.grad)
    torch.testing.assert_close(dict(norm.named_buffers()), dict(twin[0].named_buffers()))


def test_a_convolution_bias_ahead_of_batch_statistics_gets_a_zero_gradient():
    block = ak.AFNB(4, 6, 6, 4, 4)
    block(torch.randn(2, 4, 5, 5), torch.randn(2, 6, 5, 5)).sum().backward()
    for projection in (block.stages[0].f_key, block.stages[0].f_query):
        assert projection[0].bias.grad is not None
        assert projection[0].bias.grad.abs().sum() == 0


def test_one_value_per_channel_has_no_statistics():
    with pytest.raises(ValueError, match=r"more than one value per channel .* got shape \(1, 4, 1, 1\)"):
        ak.APNB(4, 4, 4, 4)(torch.randn(1, 4, 1, 1))


@pytest.mark.parametrize(("fused", "plain"), [(ak.APNB, PlainAPNB), (ak.AFNB, PlainAFNB)])
def test_a_batch_of_nothing_trains_as_published(fused, plain):
    found = []
    for kind in (fused, plain):
        block = kind(*[4] * (4 if kind in (ak.APNB, PlainAPNB) else 5))
        maps = [torch.randn(0, 4, 5, 5, requires_grad=True) for _ in range(1 if kind in (ak.APNB, PlainAPNB) else 2)]
        out = block(*maps)
        out.sum().backward()
        found.append((out, dict(block.named_buffers()), [p.grad for p in block.parameters()]))
    torch.testing.assert_close(*found)


def test_a_synchronised_norm_in_evaluation_keeps_to_its_own_process(monkeypatch):
    norm = nn.SyncBatchNorm(4, track_running_stats=False, process_group=object())
    monkeypatch.setattr(normalization_module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(normalization_module.dist, "get_world_size", lambda group: 2)
    assert normalization_module.shared_by(norm.train()) is norm.process_group
    assert normalization_module.shared_by(norm.eval()) is None


def test_second_derivatives_of_a_block_are_refused():
    block = ak.APNB(4, 4, 4, 4, dropout=0.0).double()
    nn.init.normal_(block.stages[0].W.weight)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("frozen", [("f_value",), ("f_key",), ("W", "f_value", "conv_bn_dropout")])
def test_frozen_parts_get_no_gradient_and_the_rest_does(frozen):
    block = ak.APNB(4, 4, 4, 4)
    nn.init.normal_(block.stages[0].W.weight)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    block(torch.randn(2, 4, 5, 5)).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert (parameter.grad is None) == any(part in name for part in frozen), name
