"""The Triton kernels of upsampled logits: error, sizes, options, layouts, labels out of range, argmax."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import random_map
from upsampled_rule import IGNORED, assert_accurate, assert_argmax, random_labels, with_gradient

import annnet_kernels as ak
from annnet_kernels.kernels.upsampled_cross_entropy import gradient_tile
from annnet_kernels.runtime.backends import interpreting

DEVICE = "cpu" if interpreting() else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OF_TRAINING = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SEEDS = 1 if interpreting() else 5
OPERATORS = ("upsampled_cross_entropy", "upsampled_cross_entropy_bwd")
SIZES = [
    ((1, 3, 3, 3), (9, 10), False),  # fractional
    ((1, 2, 2, 3), (2, 3), True),  # ×1
    ((1, 3, 5, 4), (2, 3), False),  # smaller
    ((2, 2, 1, 1), (4, 5), True),  # one cell
    ((1, 2, 2, 17), (5, 30), False),  # several blocks of cells
]
if not interpreting():
    SIZES += [((2, 19, 65, 65), (513, 513), False), ((2, 150, 64, 64), (512, 512), False)]


@pytest.fixture(autouse=True)
def _triton_backend():
    with ak.use_backend("triton"):
        yield


@pytest.mark.parametrize(("reduction", "dtype"), [("mean", torch.float32), ("none", torch.bfloat16)], ids=str)
@pytest.mark.parametrize(("shape", "size", "align_corners"), SIZES, ids=str)
def test_accuracy_of_sizes(shape, size, align_corners, reduction, dtype):
    options = {"reduction": reduction, "align_corners": align_corners, "device": DEVICE, "seeds": SEEDS}
    assert_accurate(shape, size, dtype, "triton", **options)
    assert ak.last_backend(OPERATORS[reduction == "none"]) == "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "slice"])
def test_accuracy_of_layouts(layout, dtype):
    options = {"label_dtype": torch.uint8, "device": DEVICE, "seeds": SEEDS}
    assert_accurate((1, 5, 2, 3), (7, 12), dtype, "triton", layout, **options)


@OF_TRAINING
@pytest.mark.parametrize(("weighted", "smoothing"), [(True, 0.0), (False, 0.2), (True, 1.0)])
def test_accuracy_of_options(weighted, smoothing, dtype):
    options = {"weighted": weighted, "label_smoothing": smoothing, "reduction": "none", "device": DEVICE}
    assert_accurate((1, 5, 2, 3), (7, 12), dtype, "triton", seeds=SEEDS, **options)


@OF_TRAINING
def test_a_lane_of_several_classes(dtype):
    """More classes than lanes: each lane has several, and the last group not all."""
    classes = 43
    tile = gradient_tile(classes, 2)
    assert tile.lane_classes > 1
    assert classes % (tile.lane_classes * tile.classes) != 0
    assert_accurate((1, classes, 2, 2), (4, 3), dtype, "triton", device=DEVICE, seeds=SEEDS)


@OF_TRAINING
def test_a_label_that_names_no_class_makes_its_pixel_nan(dtype):
    logits, target = random_map((1, 3, 5, 5), dtype, device=DEVICE), random_labels(3, 1, (15, 15), device=DEVICE)
    target[0, 7, 7] = 77
    ones = torch.ones(1, 15, 15, device=DEVICE)
    ours = with_gradient(ak.upsampled_cross_entropy, logits, target, None, ones, reduction="none", ignore_index=IGNORED)
    wrong = torch.zeros(15, 15, dtype=torch.bool, device=DEVICE)
    wrong[7, 7] = True
    assert torch.equal(ours["loss"][0].isnan(), wrong)
    reached = torch.zeros(5, 5, dtype=torch.bool, device=DEVICE)
    reached[2, 2] = True  # the centre of this cell, whose neighbours have no share in it
    spoilt = ours["dlogits"][0].isnan()
    assert spoilt[:, reached].all()
    reached[2:4, 2:4] = True
    assert not spoilt[:, ~reached].any()
    assert ak.upsampled_cross_entropy(logits, target, ignore_index=IGNORED).isnan()


@OF_TRAINING
def test_two_runs_are_bitwise_the_same(dtype):
    logits, target = random_map((1, 4, 2, 3), dtype, device=DEVICE), random_labels(4, 1, (6, 9), device=DEVICE)
    runs = [
        with_gradient(ak.upsampled_cross_entropy, logits, target, None, torch.ones((), device=DEVICE), ignore_index=255)
        for _ in range(2)
    ]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@OF_TRAINING
@pytest.mark.parametrize(("shape", "size", "align_corners"), SIZES, ids=str)
def test_argmax(shape, size, align_corners, dtype):
    assert_argmax(shape, size, dtype, "triton", align_corners=align_corners, device=DEVICE)
    assert ak.last_backend("upsampled_argmax") == "triton"


@OF_TRAINING
def test_argmax_of_ties_and_nan(dtype):
    logits = torch.zeros(1, 4, 3, 3, dtype=dtype, device=DEVICE)
    logits[:, 2:] = 1
    logits[0, 3, 0, 0] = torch.nan
    expected = F.interpolate(logits, (6, 6), mode="bilinear").argmax(1)
    assert torch.equal(ak.upsampled_argmax(logits, (6, 6)), expected)
    assert set(expected.unique().tolist()) == {2, 3}
