"""What replace_blocks compares, refuses and names; and whose code it knows."""

import copy

import published
import pytest
import torch
import torch.nn.functional as F
from pasted_blocks import PYRAMID_MAPS, build, call
from replacement_rule import randomise_output
from torch import nn

import annnet_kernels as ak
from annnet_kernels.interop import recognition, replace
from annnet_kernels.reference import PlainAFNB, PlainAPNB


def test_a_pasted_class_with_one_changed_operation_is_refused():
    model = nn.Sequential(published.SharpenedAPNBBlock(10, 7, 8, 5))
    report = ak.replace_blocks(model)
    assert not report.replaced
    assert "computes something else: the output differs by" in report.skipped["0"], str(report)
    assert type(model[0]) is published.SharpenedAPNBBlock
    assert ak.replace_blocks(model, verify=False).replaced == {"0": "SharpenedAPNBBlock (simple, not compared)"}


def test_a_parameter_that_is_zero_at_first_hides_nothing():
    report = ak.replace_blocks(published.ReweightedAPNBBlock(10, 7, 8, 5))
    assert "computes something else" in report.skipped[""], str(report)


def test_a_dropout_inside_is_refused():
    report = ak.replace_blocks(published.DroppingAPNBBlock(10, 7, 8, 5))
    assert "in training mode" in report.skipped[""], str(report)


def drops_nothing(join, norm, drop, context, x):
    return norm(join(torch.cat([context, x], 1)))


def drops_the_context(join, norm, drop, context, x):
    return norm(join(torch.cat([drop(context), x], 1)))


def drops_ahead_of_the_norm(join, norm, drop, context, x):
    return norm(drop(join(torch.cat([context, x], 1))))


def drops_twice(join, norm, drop, context, x):
    return F.dropout2d(drop(norm(join(torch.cat([context, x], 1)))), 0.1, drop.training)


def drops_by_default(join, norm, drop, context, x):
    return F.dropout2d(norm(join(torch.cat([context, x], 1))), training=drop.training)


def drops_pixels(join, norm, drop, context, x):
    return F.dropout(norm(join(torch.cat([context, x], 1))), drop.p, drop.training)


def drops_always(join, norm, drop, context, x):
    return F.dropout2d(norm(join(torch.cat([context, x], 1))), drop.p)


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize(
    "bottleneck",
    [
        drops_nothing,
        drops_the_context,
        drops_ahead_of_the_norm,
        drops_twice,
        drops_by_default,
        drops_pixels,
        drops_always,
    ],
)
@pytest.mark.parametrize("kind", ["AFNB", "APNB"])
def test_a_dropout_that_is_applied_otherwise_is_refused(kind, bottleneck, p):
    class Block(PlainAFNB if kind == "AFNB" else PlainAPNB):
        def forward(self, *maps):
            return bottleneck(*self.conv_bn_dropout, self.stages[0](maps[0], maps[-1]), maps[-1])

    block = Block(6, 10, 12, 8, 5, dropout=p) if kind == "AFNB" else Block(10, 12, 8, 5, dropout=p)
    report = ak.replace_blocks(block)
    assert "computes something else" in report.skipped[""], str(report)


@pytest.mark.parametrize("drop", [nn.Dropout2d(0.1), nn.Dropout(0.1)], ids=repr)
@pytest.mark.parametrize("kind", ["MendelXu AFNB", "MendelXu APNB"])
def test_a_dropout_that_is_applied_as_published_is_replaced_and_draws_the_same(kind, drop):
    model, maps = build(kind)
    model[0].conv_bn_dropout[2] = drop
    twin = copy.deepcopy(model)
    report = ak.replace_blocks(model)
    assert "compared" in report.replaced["0"], str(report)
    assert drop.p == 0.1
    torch.manual_seed(3)
    expected = call(twin, maps)
    torch.manual_seed(3)
    torch.testing.assert_close(call(model, maps), expected)


def test_a_forward_that_raises_is_refused(monkeypatch):
    monkeypatch.setattr(published.APNB, "forward", lambda self, x: 1 / 0)
    report = ak.replace_blocks(published.APNB(10, 7, 8, 5, 0.0))
    assert "could not be compared: ZeroDivisionError" in report.skipped[""]


@pytest.mark.parametrize("sizes", [(2,), (1, 1)], ids=str)
@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
def test_query_scales_other_than_one_are_refused(sizes, verify):
    report = ak.replace_blocks(published.AFNB(6, 10, 12, 8, 5, 0.0, sizes=sizes), verify=verify)
    expected = "stages.0.scale is 2, supported is 1" if sizes == (2,) else "2 stages (query_scales or sizes)"
    assert expected in report.skipped[""], str(report)


def test_another_activation_is_called_as_it_is():
    block = published.APNB(10, 7, 8, 5, 0.0).double()
    block.stages[0].f_key[1][1] = nn.Tanh()
    randomise_output(block)
    twin, x = copy.deepcopy(block), torch.randn(PYRAMID_MAPS[0], dtype=torch.float64)
    assert "compared" in ak.replace_blocks(block).replaced[""]
    torch.testing.assert_close(block(x), twin(x))


def test_a_block_with_a_hook_inside_is_left_alone_and_named():
    model = nn.Sequential(PlainAPNB(10, 10, 8, 5))
    model[0].stages[0].W.register_forward_hook(lambda *_: None)
    report = ak.replace_blocks(model)
    assert "Conv2d carries forward hooks" in report.skipped["0"]
    assert "skipped 0" in str(report)


def test_a_block_whose_forward_was_patched_is_left_alone():
    block = PlainAPNB(10, 10, 8, 5)
    block.forward = lambda x: x
    assert "has a forward of its own" in ak.replace_blocks(block).skipped[""]


def test_a_block_with_a_recompute_of_its_own_is_left_alone():
    block = published.APNB(10, 7, 8, 5, 0.0)
    block.recompute = "its own setting"
    assert "has a recompute of its own" in ak.replace_blocks(block).skipped[""]
    ak.restore_blocks(block)
    assert block.recompute == "its own setting"


def test_an_odd_structure_is_left_alone_and_named():
    block = published.APNBBlock(10, 7, 8, 5)
    block.Conv_Key = block.Conv_Query = nn.Sequential(nn.Conv2d(10, 8, 1), nn.Conv2d(8, 8, 1), nn.ReLU())
    expected = "not built as expected: Conv_Key holds Conv2d, Conv2d, ReLU; expected a convolution, then at most a norm"
    assert expected in ak.replace_blocks(block).skipped[""]


PASTED = """
import torch
import torch.nn.functional as F

def helper(x):
    return x

class Block(torch.nn.Module):
    def forward(self, x):
        parts = [F.relu(part) for part in x]
        return torch.cat(parts, 1)
"""


def fingerprint_of(source, tmp_path, edited=None):
    path = tmp_path / "pasted.py"
    path.write_text(source)
    namespace = {"__name__": "pasted"}
    exec(compile(source, str(path), "exec"), namespace)
    path.write_text(source if edited is None else edited)
    function = namespace["Block"].forward
    return recognition.fingerprint(function)


def test_a_fingerprint_sees_code_and_nothing_else(tmp_path):
    known = fingerprint_of(PASTED, tmp_path / "")
    assert known is not None
    layout = PASTED.replace("(self, x):", '(self, x: "Tensor") -> "Tensor":\n        """Words."""  # more words')
    assert fingerprint_of(layout, tmp_path) == known
    changed = PASTED.replace("F.relu", "F.gelu")
    assert fingerprint_of(changed, tmp_path) not in (known, None)
    assert fingerprint_of(PASTED.replace("F.relu(part)", "helper(part)"), tmp_path) is None
    assert fingerprint_of(PASTED.replace("functional as F", "init as F"), tmp_path) is None
    assert fingerprint_of(changed, tmp_path, edited=PASTED) is None
    assert fingerprint_of(PASTED.replace("    def", "    @torch.no_grad()\n    def"), tmp_path) is None
    assert recognition.fingerprint(torch.relu) is None


@pytest.fixture
def known_pasted_code(monkeypatch):
    """The pasted classes of these tests count as published; ``attend``, their helper, as PyTorch's."""
    monkeypatch.setattr(recognition, "_HARMLESS", (*recognition._HARMLESS, published.attend))
    forwards = {cls.forward for cls in (published.AFNPBlock, published.APNBBlock, published.PPMModule)}
    known = {recognition.fingerprint(forward) for forward in forwards}
    assert None not in known
    monkeypatch.setitem(recognition.PUBLISHED_CODE, "simple", known)

    def never(*_, **__):
        raise AssertionError("known code was compared")

    monkeypatch.setattr(replace, "difference", never)


def test_known_code_is_replaced_without_comparison(known_pasted_code):
    for block in (published.AFNPBlock(12, 8, 5), published.APNBBlock(10, 7, 8, 5)):
        block.key_channels = 8
        assert "known code" in ak.replace_blocks(block).replaced[""]


def other_scale(block):
    block.key_channels = 4


def other_activation(block):
    block.Conv_Key[2] = nn.LeakyReLU()


def stranger_inside(block):
    block.ppm.__class__ = type("PPM", (published.PPMModule,), {"forward": lambda self, x: 2 * x.flatten(2)})


def stranger_called(block):
    block.__class__ = type("Block", (published.APNBBlock,), {"__call__": lambda self, x: x})


def test_a_longer_projection_is_left_alone():
    block = published.APNBBlock(10, 7, 8, 5)
    block.Conv_Key.append(nn.Tanh())
    expected = (
        "Conv_Key holds Conv2d, BatchNorm2d, ReLU, Tanh; expected a convolution, then at most a norm and an activ"
    )
    assert expected in str(ak.replace_blocks(block))


@pytest.mark.parametrize("change", [other_scale, other_activation, stranger_inside, stranger_called])
def test_known_code_around_something_unknown_is_compared(known_pasted_code, change):
    block = published.APNBBlock(10, 7, 8, 5)
    block.key_channels = 8
    change(block)
    with pytest.raises(AssertionError, match="known code was compared"):
        ak.replace_blocks(block)
