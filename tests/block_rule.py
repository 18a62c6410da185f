"""Small random blocks, plain and fused with the same parameters, and what one call of them leaves behind."""

import torch
from torch import nn

import annnet_kernels as ak
from annnet_kernels.reference import PlainAFNB, PlainAPNB

LOW, HIGH, OUT, KEY, VALUE = 12, 20, 16, 10, 6
MAPS = {"AFNB": [(2, LOW, 13, 9), (2, HIGH, 9, 17)], "APNB": [(2, HIGH, 9, 17)]}
CLASSES = {"AFNB": (ak.AFNB, PlainAFNB, (LOW, HIGH, OUT)), "APNB": (ak.APNB, PlainAPNB, (HIGH, OUT))}


def build(kind, dropout=0.0, **options):
    """A plain block with random values wherever a fresh one has zeros or ones, and its fused twin, in float64."""
    fused_class, plain_class, channels = CLASSES[kind]
    plain = plain_class(*channels, KEY, VALUE, dropout=dropout, **options).double()
    randomise(plain)
    fused = fused_class(*channels, KEY, VALUE, dropout=dropout, **options).double()
    fused.load_state_dict(plain.state_dict())
    return fused, plain


def randomise(block):
    """A published block starts with W = 0, which multiplies the attention away: nothing would be tested."""
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.5 + (1.0 if name.endswith("weight") else 0.0))
        for stage in block.stages:
            nn.init.normal_(stage.W.weight, std=VALUE**-0.5)
        for name, buffer in block.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)


def draw_maps(kind, layout=torch.contiguous_format, enlarge=1):
    shapes = [(b, c, enlarge * h, enlarge * w) for b, c, h, w in MAPS[kind]]
    return [torch.randn(shape, dtype=torch.float64).to(memory_format=layout) for shape in shapes]


def results(block, maps, weights):
    """Output, every gradient and every buffer of one call with a fixed weighting of the output."""
    inputs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in maps]
    block.zero_grad()
    out = block(*inputs)
    (out * weights.to(out.dtype)).sum().backward()
    found = {"out": out.detach()}
    found |= {f"grad input {i}": x.grad for i, x in enumerate(inputs)}
    found |= {f"grad {name}": p.grad for name, p in block.named_parameters() if p.grad is not None}
    found |= {name: b for name, b in block.named_buffers()}
    return found


def assert_same(got, want, tolerance=1e-9):
    assert got.keys() == want.keys()
    for name, expected in want.items():
        scale = max(float(expected.double().norm()), 1e-2)  # gradients that cancel to zero compare absolutely
        difference = float((got[name].double() - expected.double()).norm())
        assert difference <= tolerance * scale, f"{name}: differs by {difference:.2e}, norm {scale:.2e}"


def output_weights(kind, layout=torch.contiguous_format, enlarge=1):
    height, width = MAPS[kind][-1][2:]
    return torch.randn(2, OUT, enlarge * height, enlarge * width, dtype=torch.float64).to(memory_format=layout)
