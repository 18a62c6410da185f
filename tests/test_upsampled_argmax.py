"""The argmax of upsampled logits: choice, ties, NaN, layouts, sizes, export."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS, random_map, surrounded
from upsampled_rule import assert_argmax

import annnet_kernels as ak
from annnet_kernels.runtime import native

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
no_extension = pytest.mark.skipif(native.why_not("cpu") is not None, reason=str(native.why_not("cpu")))
BACKENDS = ("reference", pytest.param("native", marks=no_extension))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_largest_is_chosen_in_every_layout(layout, dtype, backend):
    assert_argmax((2, 19, 9, 10), (72, 77), dtype, backend, layout)
    assert ak.last_backend("upsampled_argmax") == backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("shape", "size"),
    [((2, 7, 4, 6), (4, 6)), ((2, 3, 9, 7), (4, 3)), ((3, 5, 1, 1), (9, 17)), ((1, 300, 2, 3), (33, 20))],
    ids=str,
)
def test_the_largest_is_chosen_at_every_size(shape, size, align_corners, backend):
    assert_argmax(shape, size, torch.float32, backend, align_corners=align_corners)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_class_and_nan_is_largest(backend):
    logits = torch.randn(1, 1, 5, 6).expand(1, 9, 5, 6).contiguous()
    logits[:, 5] += 1
    logits[:, 7] = logits[:, 5]
    logits[0, 2, 3, 3] = torch.nan
    with ak.use_backend(backend):
        chosen = ak.upsampled_argmax(logits, (40, 48))
    expected = F.interpolate(logits, (40, 48), mode="bilinear").argmax(1)
    assert torch.equal(chosen, expected)
    assert set(chosen.unique().tolist()) == {2, 5}


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_around_the_logits_is_not_read(backend):
    for layout in ("nchw", "channels_last", "slice"):
        logits = random_map((2, 19, 3, 5), torch.float32, layout)
        inside, _ = surrounded(logits, torch.inf)
        with ak.use_backend(backend):
            assert torch.equal(ak.upsampled_argmax(inside, (24, 37)), ak.upsampled_argmax(logits, (24, 37)))


def test_empty_batch_vmap_and_gradient_mode():
    assert ak.upsampled_argmax(torch.empty(0, 3, 4, 4), (8, 8)).shape == (0, 8, 8)
    logits = torch.randn(3, 2, 5, 4, 4, requires_grad=True)
    each = torch.func.vmap(lambda x: ak.upsampled_argmax(x, (16, 20)))(logits)
    assert torch.equal(each, torch.stack([ak.upsampled_argmax(x, (16, 20)) for x in logits]))
    assert not each.requires_grad


def test_bad_input_is_named():
    logits = torch.zeros(1, 3, 4, 4)
    for size, error, message in (
        ((0, 8), ValueError, r"size\[0\]: expected a positive integer, got 0"),
        (8, TypeError, r"size: expected a pair \(H, W\), got 8"),
        ((8, 8, 8), ValueError, r"size: expected a pair"),
        ((8, 2.0), TypeError, r"size\[1\]: expected a positive integer"),
    ):
        with pytest.raises(error, match=message):
            ak.upsampled_argmax(logits, size)
    with pytest.raises(ValueError, match="logits: expected a feature map"):
        ak.upsampled_argmax(logits[0], (8, 8))
    with pytest.raises(TypeError, match="align_corners: expected a bool"):
        ak.upsampled_argmax(logits, (8, 8), align_corners=None)


class Segment(torch.nn.Module):
    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return ak.upsampled_argmax(logits, (4 * logits.shape[2], 4 * logits.shape[3]))


def test_compiles_and_exports_with_free_sizes():
    logits, other = torch.randn(2, 5, 4, 6), torch.randn(3, 5, 7, 9)
    assert torch.equal(torch.compile(Segment(), fullgraph=True, backend="aot_eager")(logits), Segment()(logits))
    dim = torch.export.Dim
    program = torch.export.export(
        Segment(), (logits,), dynamic_shapes={"logits": {0: dim.AUTO, 2: dim.AUTO, 3: dim.AUTO}}
    )
    assert torch.equal(program.module()(other), Segment()(other))


@pytest.mark.parametrize("exported_before", [False, True])
def test_onnx_has_standard_operators_only(exported_before):
    onnxruntime = pytest.importorskip("onnxruntime")
    logits = torch.randn(2, 5, 4, 6)
    if exported_before:
        program = torch.export.export(Segment(), (logits,))
        model = torch.onnx.export(program, custom_translation_table=ak.onnx.translation_table(), verbose=False)
    else:
        model = torch.onnx.export(Segment(), (logits,), dynamo=True, verbose=False)
    assert {node.domain for node in model.model.graph} <= {""}
    session = onnxruntime.InferenceSession(model.model_proto.SerializeToString())
    (chosen,) = session.run(None, {session.get_inputs()[0].name: logits.numpy()})
    assert (torch.from_numpy(chosen) == Segment()(logits)).double().mean() >= 0.99
