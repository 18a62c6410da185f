"""The upsampled cross-entropy: error, layouts, sizes, labels, options, determinism, memory, autograd, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS, random_map, surrounded
from upsampled_rule import IGNORED, assert_accurate, plain_cross_entropy, random_labels, with_gradient

import annnet_kernels as ak
from annnet_kernels.runtime import native
from annnet_kernels.upsampling import lines

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
no_extension = pytest.mark.skipif(native.why_not("cpu") is not None, reason=str(native.why_not("cpu")))
BACKENDS = ("reference", pytest.param("native", marks=no_extension))
OPERATORS = ("upsampled_cross_entropy", "upsampled_cross_entropy_bwd")


@pytest.mark.parametrize("align_corners", [False, True])
def test_the_weights_of_a_line_are_those_of_interpolate(align_corners):
    for cells, pixels in ((1, 1), (1, 5), (5, 1), (3, 3), (4, 9), (9, 4), (8, 64), (65, 513)):
        cell_numbers = torch.arange(cells, dtype=torch.float64)[None, None].square()
        expected = F.interpolate(cell_numbers, pixels, mode="linear", align_corners=align_corners)[0, 0]
        got = [a * a * (1 - w) + b * b * w for a, b, w in lines(cells, pixels, align_corners)]
        torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_of_layouts(layout, dtype, backend):
    for reduction in ("mean", "none"):
        assert_accurate((2, 11, 3, 4), (24, 29), dtype, backend, layout, reduction=reduction)
    assert [ak.last_backend(name) for name in OPERATORS] == [backend] * 2


SIZES = [
    ((2, 7, 4, 6), (4, 6)),  # ×1
    ((2, 3, 9, 7), (4, 3)),  # smaller
    ((1, 40, 7, 5), (26, 33)),  # fractional
    ((3, 5, 1, 1), (9, 17)),  # one cell
    ((2, 4, 5, 1), (1, 9)),
    ((1, 9, 3, 20), (40, 20)),  # more rows between two rows of cells than are made together
    ((1, 2, 70, 3), (71, 6)),  # several rows of cells in a unit
    ((1, 1000, 2, 3), (9, 10)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("shape", "size"), SIZES, ids=str)
def test_accuracy_of_sizes(shape, size, align_corners, backend):
    for reduction in ("none",) if backend == "reference" else ("sum", "none"):
        assert_accurate(shape, size, torch.float32, backend, reduction=reduction, align_corners=align_corners)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize(("weighted", "smoothing"), [(True, 0.0), (False, 0.2), (True, 1.0)])
def test_accuracy_of_options(weighted, smoothing, reduction, dtype, backend):
    options = {"weighted": weighted, "label_smoothing": smoothing, "reduction": reduction}
    assert_accurate((2, 11, 5, 6), (37, 45), dtype, backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label_dtype", [torch.int32, torch.uint8], ids=str)
def test_accuracy_of_label_dtypes(label_dtype, backend):
    for reduction in ("mean", "none"):
        assert_accurate((2, 19, 5, 6), (40, 41), torch.float32, backend, label_dtype=label_dtype, reduction=reduction)


@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy_of_confident_logits(backend):
    """A likely label, whose gradient is a small difference, and logits beyond what exp can take."""
    for magnitude in (20.0, 2000.0):
        assert_accurate((2, 19, 5, 6), (40, 41), torch.float32, backend, magnitude=magnitude)


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_of_any_strides(backend):
    logits = random_map((2, 5, 4, 6), torch.float32)
    labels = random_labels(5, 2, (30, 42))
    for target in (labels.transpose(1, 2).contiguous().transpose(1, 2), labels.repeat(1, 1, 2)[:, :, ::2]):
        with ak.use_backend(backend):
            got = ak.upsampled_cross_entropy(logits, target[:, :, :42], ignore_index=IGNORED)
        expected = plain_cross_entropy(logits, target[:, :, :42], ignore_index=IGNORED)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("one_class", [1, 3])
def test_one_class_and_no_pixel(one_class, backend):
    """One class costs nothing. Where no pixel counts, the mean is NaN and its gradient zero, as in PyTorch."""
    logits = random_map((2, one_class, 4, 6), torch.float32)
    target = torch.full((2, 9, 11), IGNORED) if one_class > 1 else torch.zeros(2, 9, 11, dtype=torch.int64)
    for reduction in ("none", "sum", "mean"):
        grad = torch.ones((2, 9, 11) if reduction == "none" else ())
        options = {"ignore_index": IGNORED, "reduction": reduction}
        with ak.use_backend(backend):
            ours = with_gradient(ak.upsampled_cross_entropy, logits, target, None, grad, **options)
        plain = with_gradient(plain_cross_entropy, logits, target, None, grad, **options)
        torch.testing.assert_close(ours["loss"], plain["loss"], equal_nan=True, atol=1e-6, rtol=0)
        assert float(ours["dlogits"].abs().max()) <= 1e-6
        assert float(plain["dlogits"].abs().max()) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_of_none(backend):
    logits, target = torch.empty(0, 3, 5, 7, requires_grad=True), torch.empty(0, 9, 9, dtype=torch.int64)
    with ak.use_backend(backend):
        assert ak.upsampled_cross_entropy(logits, target, reduction="none").shape == (0, 9, 9)
        assert ak.upsampled_cross_entropy(logits, target).isnan()
        total = ak.upsampled_cross_entropy(logits, target, reduction="sum")
        total.backward()
    assert float(total) == 0
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_a_label_that_names_no_class_is_named(dtype, backend):
    logits, target = torch.randn(2, 5, 4, 4, requires_grad=True), torch.zeros(2, 9, 9, dtype=dtype)
    target[1, 8, 3] = 77
    with ak.use_backend(backend):
        with pytest.raises(IndexError, match=r"target: expected labels from 0 to 4 or ignore_index, -100, got 77"):
            ak.upsampled_cross_entropy(logits, target)
        if dtype != torch.uint8:
            target[1, 8, 3] = -3
            with pytest.raises(IndexError, match="got -3"):
                ak.upsampled_cross_entropy(logits, target, reduction="none")
        target[1, 8, 3] = 5
        with pytest.raises(IndexError, match="got 5"):
            ak.upsampled_cross_entropy(logits, target, ignore_index=7)
        ak.upsampled_cross_entropy(logits, target, ignore_index=5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_logits_spoil_what_is_made_of_them(backend):
    logits, target = torch.randn(1, 3, 6, 6), random_labels(3, 1, (24, 24))
    logits[0, 1, 2, 2] = torch.nan
    with ak.use_backend(backend):
        ours = with_gradient(
            ak.upsampled_cross_entropy, logits, target, None, torch.ones(1, 24, 24), reduction="none", ignore_index=255
        )
    upsampled = F.interpolate(logits, (24, 24), mode="bilinear")[0, 1]
    expected = upsampled.isnan() & (target[0] != IGNORED)
    assert torch.equal(ours["loss"][0].isnan(), expected)
    reached = torch.zeros(6, 6, dtype=torch.bool)
    reached[1:4, 1:4] = True
    assert torch.equal(ours["dlogits"].isnan().any(1)[0], reached)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_around_the_operands_is_not_read(dtype, backend):
    for classes, size in ((3, (5, 9)), (19, (33, 31))):
        for layout in ("nchw", "channels_last", "slice"):
            logits = random_map((2, classes, 3, 5), dtype, layout)
            target = random_labels(classes, 2, size)
            inside, _ = surrounded(logits, torch.nan)
            labels, _ = surrounded(target, -7)
            with ak.use_backend(backend):
                near = with_gradient(ak.upsampled_cross_entropy, logits, target, None, torch.ones(()), ignore_index=255)
                far = with_gradient(ak.upsampled_cross_entropy, inside, labels, None, torch.ones(()), ignore_index=255)
            assert all(torch.equal(near[name], far[name]) for name in near)


@no_extension
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("shape", "size"), [((2, 19, 33, 33), (129, 129)), ((1, 150, 8, 8), (64, 64))], ids=str)
def test_threads_and_runs_do_not_change_a_bit(shape, size, reduction):
    logits, target = random_map(shape, torch.float32), random_labels(shape[1], shape[0], size)
    grad = torch.randn(target.shape) if reduction == "none" else torch.ones(())
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5, 2):
            torch.set_num_threads(count)
            options = {"ignore_index": IGNORED, "reduction": reduction}
            results.append(with_gradient(ak.upsampled_cross_entropy, logits, target, None, grad, **options))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], value) for name, value in other.items())


def test_gradcheck_and_second_derivatives():
    logits = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    target, weight = random_labels(3, 2, (7, 9)), torch.rand(3, dtype=torch.float64)
    for reduction in ("none", "sum", "mean"):

        def loss(x, reduction=reduction):
            return ak.upsampled_cross_entropy(
                x, target, weight, ignore_index=IGNORED, reduction=reduction, label_smoothing=0.1
            )

        torch.autograd.gradcheck(loss, logits)
        total = loss(logits).sum()
        (first,) = torch.autograd.grad(total, logits, create_graph=True)
        with pytest.raises(NotImplementedError, match="upsampled_cross_entropy: second derivatives"):
            first.square().sum().backward()


def test_class_weights_get_no_gradient():
    logits, target = torch.randn(1, 3, 4, 4, requires_grad=True), random_labels(3, 1, (8, 8))
    weight = torch.rand(3, requires_grad=True)
    ak.upsampled_cross_entropy(logits, target, weight, ignore_index=IGNORED).backward()
    assert weight.grad is None
    assert logits.grad is not None
    assert not ak.upsampled_cross_entropy(logits.detach(), target, weight, ignore_index=IGNORED).requires_grad


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_vmap_and_grad_of_torch_func(reduction):
    logits, target = torch.randn(3, 2, 4, 3, 5), torch.stack([random_labels(4, 2, (9, 11)) for _ in range(3)])

    def loss(function):
        def one(x, labels):
            return function(x, labels, ignore_index=IGNORED, reduction=reduction).sum()

        return one

    for transform in (torch.func.vmap, lambda f: torch.func.vmap(torch.func.grad(f))):
        ours, plain = (transform(loss(f))(logits, target) for f in (ak.upsampled_cross_entropy, plain_cross_entropy))
        torch.testing.assert_close(ours, plain)
    through = torch.func.grad(lambda x: torch.func.vmap(loss(ak.upsampled_cross_entropy))(x, target).sum())
    plain = torch.func.grad(lambda x: torch.func.vmap(loss(plain_cross_entropy))(x, target).sum())
    torch.testing.assert_close(through(logits), plain(logits))
    with pytest.raises(NotImplementedError, match="weight: vmap over class weights is not implemented"):
        torch.func.vmap(lambda w: ak.upsampled_cross_entropy(logits[0], target[0], w, ignore_index=IGNORED))(
            torch.rand(3, 4)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_16_bits_and_returns_float32(dtype):
    logits, target = random_map((2, 5, 4, 6), dtype), random_labels(5, 2, (32, 48))
    wide = plain_cross_entropy(logits.double(), target, ignore_index=IGNORED)
    with torch.autocast("cpu", dtype):
        loss = ak.upsampled_cross_entropy(logits.requires_grad_(), target, ignore_index=IGNORED)
        each = ak.upsampled_cross_entropy(logits, target, ignore_index=IGNORED, reduction="none")
    assert loss.dtype == each.dtype == torch.float32
    torch.testing.assert_close(loss.double(), wide, rtol=1e-6, atol=0)
    loss.backward()
    assert logits.grad.dtype == dtype


def test_training_with_a_scaler_equals_plain():
    """GradScaler multiplies the loss: float16 gradients that would vanish do not."""
    torch.manual_seed(5)
    x, target = torch.randn(2, 3, 6, 8), random_labels(4, 2, (48, 64))
    weights = []
    for loss in (ak.upsampled_cross_entropy, plain_cross_entropy):
        torch.manual_seed(6)
        model = torch.nn.Conv2d(3, 4, 1)
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
        for _ in range(3):
            with torch.autocast("cpu", torch.float16):
                value = loss(model(x), target, ignore_index=IGNORED)
            optimizer.zero_grad()
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append(model.weight.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=2e-3)
    assert not torch.equal(weights[0], torch.nn.Conv2d(3, 4, 1).weight)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiles_as_one_graph(reduction):
    logits, target = torch.randn(2, 5, 4, 6, requires_grad=True), random_labels(5, 2, (16, 24))

    def step(x, labels):
        return ak.upsampled_cross_entropy(x, labels, ignore_index=IGNORED, reduction=reduction).sum()

    expected = torch.autograd.grad(step(logits, target), logits)[0]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(logits, target), logits)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    logits, target = torch.randn(2, 5, 4, 6, requires_grad=True), random_labels(5, 2, (16, 24))
    values = 2 * 5 * 16 * 24
    for reduction, factor in (("mean", 2), ("none", 3)):
        with FlopCounterMode(display=False) as counter:
            ak.upsampled_cross_entropy(logits, target, ignore_index=IGNORED, reduction=reduction).sum().backward()
        assert counter.get_total_flops() == 8 * factor * values


LOGITS, LABELS = torch.zeros(2, 3, 4, 5), torch.zeros(2, 8, 9, dtype=torch.int64)
BAD = [
    ((LOGITS.long(), LABELS), {}, TypeError, "logits: expected dtype float32"),
    ((LOGITS[0], LABELS), {}, ValueError, r"logits: expected a feature map of shape \(B, C, H, W\)"),
    ((LOGITS, LABELS.tolist()), {}, TypeError, "target: expected a torch.Tensor, got list"),
    (
        (LOGITS, torch.zeros(2, 3, 8, 9)),
        {},
        TypeError,
        "target: expected class indices.*class probabilities are refused",
    ),
    ((LOGITS, LABELS.short()), {}, TypeError, "target: expected dtype int64, int32 or uint8, got torch.int16"),
    ((LOGITS, LABELS[0]), {}, ValueError, r"target: expected class indices of shape \(B, H, W\), got shape \(8, 9\)"),
    ((LOGITS, LABELS[:1]), {}, ValueError, "target: expected the batch of logits, 2"),
    ((LOGITS, LABELS[:, :0]), {}, ValueError, "target: expected at least one row and column"),
    ((LOGITS, LABELS.to("meta")), {}, ValueError, "target: expected the device of logits, cpu, got meta"),
    (
        (LOGITS, LABELS, torch.ones(4)),
        {},
        ValueError,
        r"weight: expected one weight per class, \(3,\), got shape \(4,\)",
    ),
    ((LOGITS, LABELS, torch.ones(3).double()), {}, TypeError, "weight: expected dtype torch.float32"),
    ((LOGITS, LABELS, torch.ones(3, device="meta")), {}, ValueError, "weight: expected the device of logits"),
    ((LOGITS, LABELS), {"reduction": "median"}, ValueError, "reduction: expected one of none, mean, sum, got 'median'"),
    ((LOGITS, LABELS), {"reduction": None}, TypeError, "reduction: expected one of"),
    ((LOGITS, LABELS), {"label_smoothing": 1.5}, ValueError, "label_smoothing: expected a number from 0 to 1, got 1.5"),
    ((LOGITS, LABELS), {"label_smoothing": "a"}, TypeError, "label_smoothing: expected a number"),
    ((LOGITS, LABELS), {"ignore_index": 1.0}, TypeError, "ignore_index: expected an integer, got 1.0"),
    ((LOGITS, LABELS), {"align_corners": 1}, TypeError, "align_corners: expected a bool, got 1"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD, ids=[case[3][:30] for case in BAD])
def test_bad_input_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ak.upsampled_cross_entropy(*arguments, **options)


@no_extension
def test_wrong_arguments_of_the_native_operator_are_named():
    losses, sums, gradient = torch.empty(0), torch.empty(2, 2), torch.empty(0)
    call = torch.ops.annnet_native.upsampled_cross_entropy
    with pytest.raises(TypeError, match="target: expected dtype Long, Int or Byte, got Short"):
        call(LOGITS, LABELS.short(), None, 0, 0.0, False, False, False, losses, sums, gradient)
    with pytest.raises(ValueError, match=r"sums: expected shape \[2, 2\]"):
        call(LOGITS, LABELS, None, 0, 0.0, False, False, False, losses, torch.empty(2), gradient)
    with pytest.raises(ValueError, match=r"weight: expected shape \[3\]|\*weight: expected shape \[3\]"):
        call(LOGITS, LABELS, torch.ones(2), 0, 0.0, False, False, False, losses, sums, gradient)


@no_extension
def test_memory_beyond_the_operands():
    """At most one float32 per pixel and two float32 copies of the logits beyond logits, target and gradient.

    The peak is that of the CPU allocator, which sees what the kernels allocate, too.
    """
    from torch.profiler import ProfilerActivity, profile

    logits = torch.randn(2, 40, 32, 32, requires_grad=True)
    target = random_labels(40, 2, (256, 256))
    cells, pixels = logits.numel() * 4, target.numel() * 4
    upsampled = 40 * pixels
    for reduction, allowed in (("mean", 2 * cells), ("none", 2 * cells + pixels)):
        grad = torch.ones(target.shape if reduction == "none" else ())

        def step(reduction=reduction, grad=grad):
            loss = ak.upsampled_cross_entropy(logits, target, ignore_index=IGNORED, reduction=reduction)
            return torch.autograd.grad(loss, logits, grad)

        step()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            step()
        live = peak = 0
        events = recorded.profiler.kineto_results.events()
        for event in sorted(events, key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        threads_scratch = 1 << 20  # one thread's: a few rows of cells and a block of pixels
        assert cells < peak <= cells + allowed + threads_scratch < upsampled, (reduction, peak, cells, pixels)
