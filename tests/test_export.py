"""torch.export of the blocks and operators with free batch, height and width: saved, loaded, run at other sizes."""

import copy
import io

import block_rule
import fresh
import pytest
import torch
from torch import nn
from torch.export import Dim

import annnet_kernels as ak

pytestmark = pytest.mark.usefixtures("one_thread")


class Context(nn.Module):
    def forward(self, x):
        tokens = ak.pyramid_pool(x)
        return ak.asymmetric_attention(x, tokens, tokens)


def build_block(kind, **options):
    block, _ = block_rule.build(kind, **options)
    return block.float().eval(), [shape[1] for shape in block_rule.MAPS[kind]]


CASES = {
    "operators": lambda: (Context(), [6]),
    "AFNB": lambda: build_block("AFNB"),
    "APNB": lambda: build_block("APNB"),
    "APNB, context": lambda: build_block("APNB", bottleneck=False),
}
OTHER_SIZES = ((3, 33, 41), (1, 5, 3))
EXPORTED = [*((case, False) for case in CASES), ("operators", True), ("APNB", True)]
"""In which mode of gradients: they choose operators or Functions in operators and block alike, whichever block."""


def draw(channels, size):
    batch, height, width = size
    return tuple(torch.randn(batch, c, height + i, width) for i, c in enumerate(channels))


def export(module, channels):
    batch = Dim("batch", max=64)
    sizes = tuple({0: batch, 2: Dim(f"height{i}"), 3: Dim(f"width{i}")} for i in range(len(channels)))
    return torch.export.export(module, draw(channels, (2, 20, 18)), dynamic_shapes=sizes)


@pytest.mark.tool("torch.export of a block in evaluation", "works", "collapsed, free sizes, forward only")
@pytest.mark.parametrize("kind", block_rule.CLASSES)
def test_a_replaced_block_is_exported_collapsed_under_its_own_names(kind):
    _, plain = block_rule.build(kind)
    replaced = copy.deepcopy(plain).eval()
    ak.replace_blocks(replaced)
    channels = [shape[1] for shape in block_rule.MAPS[kind]]
    program = export(replaced.float(), channels)
    assert "annnet" in str(program.graph)
    maps = draw(channels, (3, 33, 41))
    torch.testing.assert_close(program.module()(*maps), replaced(*maps))


@pytest.mark.tool(
    "PT2E quantisation (torchao)",
    "works",
    "left unquantised: the program holds this package's operators",
    package="torchao",
)
@pytest.mark.parametrize("kind", block_rule.CLASSES)
def test_a_quantizer_leaves_the_collapsed_block_as_it_is(kind):
    quantize = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", reason="torchao is not installed")
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    block, channels = build_block(kind)
    maps = draw(channels, (2, 13, 11))
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = quantize.prepare_pt2e(torch.export.export(block, maps).module(), quantizer)
    prepared(*maps)
    torch.testing.assert_close(quantize.convert_pt2e(prepared)(*maps), block(*maps))


@pytest.mark.tool("torch.export of a block in training", "runs plain", "saves, loads and trains")
@pytest.mark.filterwarnings("ignore:annnet_kernels. .* torch.export in training mode:UserWarning")
@pytest.mark.parametrize(("kind", "way"), [("AFNB", "own"), ("APNB", "replaced")])
def test_a_program_of_a_training_block_is_saved_loaded_and_trained(kind, way):
    fused, plain = block_rule.build(kind)
    if way == "replaced":
        fused = copy.deepcopy(plain)
        ak.replace_blocks(fused)
    channels = [shape[1] for shape in block_rule.MAPS[kind]]
    file = io.BytesIO()
    torch.export.save(export(fused.float(), channels), file)
    file.seek(0)
    program = torch.export.load(file).module()
    maps = draw(channels, (3, 33, 41))
    for model in (program, plain.float()):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            out = model(*maps)
            out.square().mean().backward()
            optimizer.step()
    state = program.state_dict()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


LOAD = """
import sys, torch
folder, *names = sys.argv[1:]
try:
    torch.export.load(f"{folder}/{names[0]}.pt2")
except RuntimeError as error:
    print("refused:", error)
import annnet_kernels
for name in names:
    program = torch.export.load(f"{folder}/{name}.pt2").module()
    torch.save([program(*maps) for maps in torch.load(f"{folder}/{name} maps.pt")], f"{folder}/{name} results.pt")
"""


@pytest.fixture(scope="module")
def new_process(tmp_path_factory):
    """By name what modules give, what their programs give in a new process, and what that said before importing."""
    folder = tmp_path_factory.mktemp("programs")
    expected = {}
    for case, gradients in EXPORTED:
        module, channels = CASES[case]()
        with torch.set_grad_enabled(gradients):
            program = export(module, channels)
        name = f"{case} {gradients}"
        torch.export.save(program, folder / f"{name}.pt2")
        maps = [draw(channels, size) for size in OTHER_SIZES]
        torch.save(maps, folder / f"{name} maps.pt")
        expected[name] = [module(*each).detach() for each in maps]
    process = fresh.python(f"import sys; sys.argv = {['', str(folder), *expected]!r}\n{LOAD}")
    assert process.returncode == 0, process.stderr
    found = {name: [out.detach() for out in torch.load(folder / f"{name} results.pt")] for name in expected}
    return expected, found, process.stdout, process.stderr


@pytest.mark.parametrize(("case", "gradients"), EXPORTED)
def test_a_new_process_runs_it_at_other_sizes(case, gradients, new_process):
    expected, found, _, _ = new_process
    torch.testing.assert_close(found[f"{case} {gradients}"], expected[f"{case} {gradients}"])


def test_without_the_import_loading_fails(new_process):
    _, _, said, warned = new_process
    assert said.startswith("refused:")
    assert "torch.ops.annnet." in warned, warned


@pytest.mark.parametrize("kind", block_rule.CLASSES)
def test_a_program_holds_operators_that_write_nothing_in_place(kind):
    """Converters and AOTInductor's proxies then see plain functions; the operators are there, in whatever subgraph."""
    with torch.no_grad():
        program = export(*build_block(kind))
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    operators = {node.target for graph in graphs for node in graph.nodes if "annnet" in str(node.target)}
    assert torch.ops.annnet.batch_norm_table.default in operators
    assert not any(operator._schema.is_mutable for operator in operators)


def test_a_block_of_a_program_runs_forward_only_and_operators_differentiate():
    program = export(Context(), [6]).module()
    x = torch.randn(1, 6, 9, 9, requires_grad=True)
    (gradient,) = torch.autograd.grad(program(x).square().sum(), x)
    (expected,) = torch.autograd.grad(Context()(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected)
    block, channels = build_block("APNB")
    out = export(block, channels).module()(torch.randn(1, *channels, 9, 9, requires_grad=True))
    with pytest.raises(NotImplementedError, match="has no derivative of its own"):
        out.sum().backward()
