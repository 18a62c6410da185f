"""The fused network learns what the plain one learns, to within what the order of sums changes."""

import compare_blocks
import torch
from compare_blocks import RUNS, distances, run
from segmentation.distributed import Processes
from segmentation.training import Training

ALONE = Processes(torch.device("cpu"))


def test_fused_and_plain_runs_learn_alike(tiny):
    """In float64 and at a gentle rate. In float32 rounding pushes values over the kinks of ReLU, and from there two
    plain runs of so small a batch part by 0.1 within 40 steps, which would hide anything."""
    options = tiny(precision="fp64", steps=40, lr=0.002, log_every=40)
    runs = {name: run(options, name, ALONE, score=False) for name in RUNS}
    noise, fused = distances(runs)
    losses = runs["fused"].losses
    assert losses[-5:].mean() < 0.9 * losses[0]
    assert 0 < noise[-1] < 1e-12
    assert fused[-1] <= 3 * noise[-1] + 4e-15


def test_reordered_channels_are_the_same_function(tiny):
    outputs = {}
    for name in RUNS[:2]:
        training = Training(compare_blocks.variant(tiny(precision="fp64"), name), ALONE)
        for block in (training.network.fusion, training.network.context[2]):  # else W is zero and hides the attention
            torch.nn.init.normal_(block.stages[0].W.weight, generator=torch.Generator().manual_seed(1))
        compare_blocks.reorder(training, name)
        with torch.no_grad():
            x = torch.linspace(-1, 1, 3 * 40 * 40, dtype=torch.float64).sin().view(1, 3, 40, 40)
            outputs[name] = training.network.eval()(x)
    plain, other = outputs.values()
    torch.testing.assert_close(plain, other)
    assert not torch.equal(plain, other)
