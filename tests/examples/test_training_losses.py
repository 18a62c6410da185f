"""Losses against a loop over pixels, the parameter groups, and the schedule."""

import math
from itertools import chain

import pytest
import torch
from segmentation.data import IGNORE
from segmentation.distributed import Processes
from segmentation.losses import cross_entropy, hard_cross_entropy, training_loss
from segmentation.network import build
from segmentation.recipe import make_optimizer, set_learning_rate

ALONE = Processes(torch.device("cpu"))


def draw(batch=3, size=(5, 7), classes=4):
    logits = 3 * torch.randn(batch, classes, *size, dtype=torch.float64)
    labels = torch.randint(0, classes, (batch, *size))
    labels[torch.rand(labels.shape) < 0.3] = IGNORE
    return logits, labels


def pixel_losses(logits, labels):
    """One list per picture."""
    result = []
    for scores, truth in zip(logits.log_softmax(1), labels, strict=True):
        pixels = [(y, x) for y in range(truth.shape[0]) for x in range(truth.shape[1]) if truth[y, x] != IGNORE]
        result.append([-float(scores[truth[y, x], y, x]) for y, x in pixels])
    return result


def test_cross_entropy_counts_the_pixels_that_are_not_void():
    logits, labels = draw()
    total = cross_entropy(logits, labels)
    losses = list(chain.from_iterable(pixel_losses(logits, labels)))
    assert float(total.loss) == pytest.approx(math.fsum(losses))
    assert int(total.pixels) == len(losses)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_hard_pixels_are_the_improbable_and_the_hardest_of_each_picture(fraction):
    logits, labels = draw()
    labels[1] = IGNORE  # a picture without truth
    total = hard_cross_entropy(logits, labels, 0.4, fraction)
    kept = []
    for losses in pixel_losses(logits, labels):
        ranked = sorted(losses, reverse=True)
        least = max(1, math.ceil(fraction * len(ranked)))
        kept += [loss for rank, loss in enumerate(ranked) if rank < least or math.exp(-loss) < 0.4]
    assert int(total.pixels) == len(kept)
    assert float(total.loss) == pytest.approx(math.fsum(kept))


def test_hard_pixels_do_not_depend_on_the_batch():
    logits, labels = draw()
    together = hard_cross_entropy(logits, labels, 0.5, 0.2)
    parts = [hard_cross_entropy(logits[i : i + 1], labels[i : i + 1], 0.5, 0.2) for i in range(3)]
    assert float(together.pixels) == sum(float(part.pixels) for part in parts)
    assert float(together.loss) == pytest.approx(sum(float(part.loss) for part in parts))


def test_the_loss_of_a_step_is_main_plus_auxiliary(tiny):
    logits, labels = draw()
    aux = torch.randn_like(logits)
    share, whole = training_loss((logits, aux), labels, tiny(aux_weight=0.4), ALONE)
    means = [torch.nn.functional.cross_entropy(x, labels, ignore_index=IGNORE) for x in (logits, aux)]
    assert float(whole) == pytest.approx(float(means[0] + 0.4 * means[1]))
    assert float(share) == pytest.approx(float(whole))


def test_a_batch_of_void_costs_nothing(tiny):
    logits, labels = draw()
    share, whole = training_loss(logits.requires_grad_(), torch.full_like(labels, IGNORE), tiny(ohem=True), ALONE)
    share.backward()
    assert float(whole) == 0
    assert not logits.grad.any()


def test_norms_and_biases_do_not_decay(tiny):
    network = build(tiny(weight_decay=0.1), 3)
    decays = {
        id(p): group["weight_decay"]
        for group in make_optimizer(network, tiny(weight_decay=0.1)).param_groups
        for p in group["params"]
    }
    names = {id(p): name for name, p in network.named_parameters()}
    assert decays.keys() == names.keys()
    norms = {
        id(p) for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d) for p in module.parameters()
    }
    for key, name in names.items():
        assert decays[key] == (0.0 if key in norms or name.endswith("bias") else 0.1), name
    assert len(norms) > 10


def test_poly_schedule(tiny):
    options = tiny(lr=0.2, power=0.9, steps=40)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    rates = [set_learning_rate(optimizer, step, options) for step in (0, 10, 39)]
    assert rates == pytest.approx([0.2, 0.2 * 0.75**0.9, 0.2 * (1 / 40) ** 0.9])
    assert optimizer.param_groups[0]["lr"] == rates[-1]
