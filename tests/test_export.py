"""torch.export of the blocks and operators with free batch, height and width: saved, loaded, run at other sizes."""

import io

import pytest
import torch
from torch import nn
from torch.export import Dim

import annnet_kernels as ak

BLOCKS = {"AFNB": (ak.AFNB, (5, 8, 6, 4, 4)), "APNB": (ak.APNB, (8, 6, 4, 4))}


def free_sizes(index):
    """Of one map, all its own but the batch."""
    return {0: Dim("batch", max=64), 2: Dim(f"height{index}", min=2, max=512), 3: Dim(f"width{index}", min=2, max=512)}


def reloaded(module, maps):
    program = torch.export.export(module, maps, dynamic_shapes=(tuple(free_sizes(i) for i in range(len(maps))),))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


class Starred(nn.Module):
    """Takes maps as ``*maps``, so that one description of free sizes serves every block."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *maps):
        return self.module(*maps)


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks(kind):
    cls, channels = BLOCKS[kind]
    block = cls(*channels).eval()
    for name, parameter in block.named_parameters():
        if parameter.dim() == 1 or ".W." in name:
            nn.init.normal_(parameter)
    inputs = channels[: 1 if kind == "APNB" else 2]
    program = reloaded(Starred(block), tuple(torch.randn(2, c, 20 + c, 18) for c in inputs))
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    operators = {str(node.target) for graph in graphs for node in graph.nodes}
    assert any("asymmetric_attention" in name for name in operators), operators
    maps = [torch.randn(3, c, 33 + c, 41) for c in inputs]
    torch.testing.assert_close(program.module()(*maps), block(*maps))


def test_operators():
    class Context(nn.Module):
        def forward(self, x):
            tokens = ak.pyramid_pool(x)
            return ak.asymmetric_attention(x, tokens, tokens)

    program = reloaded(Starred(Context()), (torch.randn(2, 6, 20, 18),))
    x = torch.randn(5, 6, 7, 50)
    torch.testing.assert_close(program.module()(x), Context()(x))
