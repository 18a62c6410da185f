"""Export to ONNX by both exporters and from an exported program, run by onnxruntime at sizes that were not traced."""

import copy
import sys

import block_rule
import fresh
import published
import pytest
import torch
from helpers import assert_as_accurate_as_plain
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.export import Dim

import annnet_kernels as ak
from annnet_kernels import onnx as standard
from annnet_kernels.reference import operators as reference

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning"),
]


EXPORTERS = ("dynamo", "torchscript", "program")
SIZES = [(3, 33, 40), (1, 1, 50), (1, 50, 1), (2, 5, 3), (1, 1, 1)]
LARGE = [(2, 20, 18), (1, 97, 97), (2, 65, 129)]
"""For one exporter: they show no more than others where a bin's ends are made."""
POOL_SIZES = (1, (2, 3), 7)
MOST_NODES = 400


class Operators(nn.Module):
    """Both operators, plain or not; the attention map, too, where one is asked for."""

    def __init__(self, pool, attend):
        super().__init__()
        self.pool, self.attend = pool, attend

    def forward(self, query, x):
        tokens = self.pool(x)
        return self.attend(query, tokens[:, :5], tokens, 0.3)


def ours(query, key, value, scale):
    return ak.asymmetric_attention(query, key, value, scale, return_attention=True)


def plain(query, key, value, scale):
    out, logsumexp, _ = reference.asymmetric_attention(query, key, value, scale)
    logits = query.flatten(2).transpose(1, 2) @ key * scale
    return out, (logits - logsumexp[:, :, None]).exp()


def build_operators():
    levels = [1, 2, 7], [1, 3, 7]
    return (
        Operators(lambda x: ak.pyramid_pool(x, POOL_SIZES), ours).eval(),
        Operators(lambda x: reference.pyramid_pool(x, *levels), plain).eval(),
        (5, 6),
    )


def build_block(kind, **options):
    fused, twin = block_rule.build(kind, **options)
    return fused.eval(), twin.eval(), tuple(shape[1] for shape in block_rule.MAPS[kind])


CASES = {
    "operators": build_operators,
    "AFNB": lambda: build_block("AFNB"),
    "APNB": lambda: build_block("APNB"),
    "APNB, context": lambda: build_block("APNB", bottleneck=False),
}


def export(module, maps, exporter, path, **arguments):
    """The graph, with batch, height and width of every map free, and a session that runs it."""
    names = ["first", "second"][: len(maps)]
    free = tuple({0: "batch", 2: f"height{i}", 3: f"width{i}"} for i in range(len(maps)))
    if exporter == "torchscript":
        arguments |= {"dynamo": False, "dynamic_axes": dict(zip(names, free, strict=True))}
        torch.onnx.export(module, maps, path, input_names=names, **arguments)
    elif exporter == "dynamo":
        torch.onnx.export(module, maps, path, dynamo=True, dynamic_shapes=free, input_names=names, verbose=False)
    else:
        sizes = {name: Dim(name) for axes in free for name in axes.values()}
        shapes = tuple({axis: sizes[name] for axis, name in axes.items()} for axes in free)
        program = torch.export.export(module, maps, dynamic_shapes=shapes)
        table = ak.onnx.translation_table()
        torch.onnx.export(program, f=path, custom_translation_table=table, input_names=names, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # onnxruntime 1.23, the last for Python 3.10, fuses products in float64 to one that it has in float32 only.
    without = ["MatmulTransposeFusion"] if maps[0].dtype == torch.float64 else None
    return onnx.load(path).graph, onnxruntime.InferenceSession(path, options, disabled_optimizers=without)


def run(session, maps):
    names = [argument.name for argument in session.get_inputs()]
    outputs = session.run(None, {name: x.numpy() for name, x in zip(names, maps, strict=True)})
    return [torch.from_numpy(out) for out in outputs]


def named(outputs):
    outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    return {f"output {i}": out.detach() for i, out in enumerate(outputs)}


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("case", CASES)
def test_every_size_runs_from_one_graph(case, exporter, tmp_path):
    fused, twin, channels = CASES[case]()
    fused.float()
    example = tuple(torch.randn(2, c, 19 + c % 4, 18) for c in channels)
    graph, session = export(fused, example, exporter, tmp_path / "graph.onnx")
    assert len(graph.node) < MOST_NODES
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    truth = copy.deepcopy(twin).double()
    twin.float()
    for batch, height, width in SIZES + (LARGE if exporter == "dynamo" else []):

        def results(seed, size=(batch, height, width)):
            maps = [torch.randn(size[0], c, size[1] + i, size[2], dtype=torch.float64) for i, c in enumerate(channels)]
            single = [x.float() for x in maps]
            with torch.no_grad():
                return named(run(session, single)), named(twin(*single)), named(truth(*maps))

        assert_as_accurate_as_plain(results, torch.float32)


def test_a_constant_does_not_pass_the_attention_of_a_graph(tmp_path):
    """It would take on what the runtime's sums of the rows lack: 2.4 times plain's error on a map of one column."""
    fused, twin, channels = build_block("APNB", bottleneck=False)
    with torch.no_grad():
        for block in (fused, twin):
            block.stages[0].f_value.bias.copy_(torch.linspace(20, 30, block.stages[0].f_value.out_channels))
    _, session = export(fused.float(), (torch.randn(2, *channels, 9, 8),), "torchscript", tmp_path / "graph.onnx")
    truth = copy.deepcopy(twin).double()
    twin.float()

    def results(seed):
        x = torch.randn(1, *channels, 50, 1, dtype=torch.float64)
        with torch.no_grad():
            return named(run(session, [x.float()])), named(twin(x.float())), named(truth(x))

    assert_as_accurate_as_plain(results, torch.float32, factor=1.0)


def test_a_program_in_float64_is_written_with_its_scale_in_float64(tmp_path):
    """The exporter itself rounds the Python numbers of standard operators to float32: those of the attention map."""
    operators, _, channels = build_operators()
    maps = tuple(torch.randn(2, c, 19, 18, dtype=torch.float64) for c in channels)
    _, session = export(operators, maps, "program", tmp_path / "graph.onnx")
    torch.testing.assert_close(run(session, maps)[0], operators(*maps)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("exporter", EXPORTERS[:2])
def test_a_folded_network_is_exported_unfolded(exporter, tmp_path):
    """A fold loops over the images of a batch; the runtime multiplies constant weights by itself."""

    class Backbone(nn.Module):
        channels = (8, 12)

        def __init__(self):
            super().__init__()
            self.low, self.high = nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.Conv2d(8, 12, 3, padding=1)

        def forward(self, x):
            low = self.low(x).relu()
            return low, self.high(low).relu()

    net = ak.ANNNet(5, Backbone(), channels=12, key_channels=4, value_channels=4).eval()
    for name, parameter in net.named_parameters():
        if parameter.dim() == 1 or ".W." in name:
            nn.init.normal_(parameter)
    ak.fold_for_inference(net)
    with torch.no_grad():
        _, session = export(net, (torch.randn(2, 3, 64, 72),), exporter, tmp_path / "net.onnx")
        for size in ((2, 64, 72), (3, 97, 130)):
            x = torch.randn(size[0], 3, *size[1:])
            torch.testing.assert_close(run(session, [x])[0], net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_replaced_block_is_exported_collapsed(exporter, tmp_path):
    model = nn.Sequential(published.APNBBlock(6, 6, 4, 4)).eval()
    nn.init.normal_(model[0].Conv_Out.weight)
    ak.replace_blocks(model)
    graph, session = export(model, (torch.randn(2, 6, 20, 18),), exporter, tmp_path / "block.onnx")
    assert len(graph.node) < MOST_NODES
    x = torch.randn(3, 6, 33, 41)
    torch.testing.assert_close(run(session, [x])[0], model(x), rtol=1e-4, atol=1e-5)


def computed_weights(graph):
    """Convolutions and products whose weight is no initializer, though neither operand follows from the input."""
    initializers = {tensor.name for tensor in graph.initializer}
    constant, computed = set(initializers), []
    for node in graph.node:
        if node.input and set(node.input) <= constant:
            constant |= set(node.output)
        if node.op_type in ("Conv", "MatMul", "Gemm"):
            computed += [name for name in node.input[:2] if name in constant - initializers]
    return computed


@pytest.mark.tool(
    "torch.onnx.export", "works", "both exporters; free sizes, constant weights, onnxruntime", package="onnx"
)
@pytest.mark.tool("onnxruntime quantize_dynamic", "works", "every weight is an initializer", package="onnxruntime")
@pytest.mark.parametrize("exporter", EXPORTERS[:2])
@pytest.mark.parametrize("kind", block_rule.CLASSES)
def test_every_weight_is_an_initializer_and_can_be_quantised(kind, exporter, tmp_path):
    """At a width where exporters no longer fold what is computed from weights."""
    from onnxruntime.quantization import quantize_dynamic

    cls, _, channels = block_rule.CLASSES[kind]
    width = 8
    widths = [width * c for c in (*channels, block_rule.KEY, block_rule.VALUE)]
    block = cls(*widths, dropout=0.0).eval()
    block_rule.randomise(block)
    maps = tuple(torch.randn(2, width * shape[1], 13, 9) for shape in block_rule.MAPS[kind])
    graph, _ = export(block, maps, exporter, tmp_path / "block.onnx")
    assert not computed_weights(graph)
    assert len([node for node in graph.node if node.op_type == "Conv"]) == (5 if kind == "AFNB" else 4)
    quantize_dynamic(tmp_path / "block.onnx", tmp_path / "quantised.onnx")
    got, expected = run(onnxruntime.InferenceSession(tmp_path / "quantised.onnx"), maps)[0], block(*maps)
    assert float((got - expected).norm() / expected.norm()) < 0.3


@pytest.mark.parametrize(("kind", "dtype"), [("AFNB", torch.float16), ("APNB", torch.bfloat16)], ids=str)
def test_export_under_autocast(kind, dtype, tmp_path):
    """What PyTorch's exporters make of a plain convolution there, onnxruntime may refuse: the graph is looked at."""
    block, _, channels = build_block(kind)
    maps = tuple(torch.randn(1, c, 9, 9) for c in channels)
    with torch.autocast("cpu", dtype):
        torch.onnx.export(block.float(), maps, tmp_path / "block.onnx", dynamo=True, verbose=False)
    kinds = [node.op_type for node in onnx.load(tmp_path / "block.onnx").graph.node]
    assert kinds.count("Conv") == (5 if kind == "AFNB" else 4)


@given(
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_pooling_in_standard_operators_is_the_operator(shape, levels):
    x = torch.randn(shape, dtype=torch.float64)
    pooled = standard.pyramid_pool(x, *zip(*levels, strict=True))
    torch.testing.assert_close(pooled, ak.pyramid_pool(x, levels), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_standard_operators_round_once(dtype):
    query, x = torch.randn(2, 6, 33, 40).to(dtype), torch.randn(2, 6, 33, 40).to(dtype)
    sizes = [1, 3, 6, 8]
    levels = x.double(), sizes, sizes

    def results(seed):
        pooled = standard.pyramid_pool(x, sizes, sizes)
        out, _ = standard.asymmetric_attention(query, pooled, pooled, 0.4)
        assert pooled.dtype == out.dtype == dtype
        expected = reference.pyramid_pool(*levels)
        truth, _, _ = reference.asymmetric_attention(query.double(), pooled.double(), pooled.double(), 0.4)
        own = reference.pyramid_pool(x, sizes, sizes), reference.asymmetric_attention(query, pooled, pooled, 0.4)[0]
        return named([pooled, out]), named(own), named([expected, truth])

    assert_as_accurate_as_plain(results, dtype)


@pytest.mark.tool("torch.onnx.export in training mode", "refused", "the message says to call .eval()", package="onnx")
@pytest.mark.parametrize("exporter", EXPORTERS[:2])
def test_training_mode_is_refused(exporter, tmp_path):
    mode = {"training": torch.onnx.TrainingMode.PRESERVE} if exporter == "torchscript" else {}
    block = ak.APNB(6, 6, 4, 4)
    message = r"evaluation mode for an export to ONNX, got training mode: call \.eval\(\)"
    with pytest.raises((ValueError, torch.onnx.errors.OnnxExporterError), match=message):
        export(block, (torch.randn(2, 6, 9, 9),), exporter, tmp_path / "block.onnx", **mode)


def test_a_block_that_runs_its_published_forward_says_that_the_size_is_fixed(tmp_path):
    block = ak.APNB(6, 6, 4, 4, psp_size=(1, 2)).eval()
    block.stages[0].f_value.register_forward_hook(lambda module, args, out: None)
    path = tmp_path / "block.onnx"
    with pytest.warns(UserWarning, match="published forward, because of Conv2d carries forward hooks; .* this size"):
        torch.onnx.export(block, (torch.randn(1, 6, 8, 8),), path, dynamo=False)


def test_importing_the_package_imports_no_exporter():
    code = (
        "import sys, annnet_kernels, torch; annnet_kernels.pyramid_pool(torch.zeros(1, 1, 2, 2));"
        "names = ('onnx', 'onnxscript', 'torch.onnx._internal.exporter');"
        "print([name for name in names if name in sys.modules])"
    )
    output = fresh.python(code)
    assert output.stdout.strip() == "[]", output.stdout + output.stderr


def test_a_missing_exporter_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "annnet_kernels.onnx.translation", raising=False)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match="translation_table: needs onnxscript"):
        ak.onnx.translation_table()
