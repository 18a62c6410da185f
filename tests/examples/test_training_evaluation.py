"""Scores against counting by hand; windows, scales and mirroring against predictors whose answer is known."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from rectangles import VOID
from segmentation.data import Pictures, open_source
from segmentation.distributed import Processes
from segmentation.evaluation import evaluate, labeller, predictor
from segmentation.inference import multi_scale, sliding_window
from segmentation.transforms import MEAN, STD, evaluation_transform

CPU = torch.device("cpu")


def by_colour(image):
    """Pixel by pixel, whatever surrounds it: the strongest colour's class, never class 2."""
    scores = image * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return scores[:, :2].argmax(1)


def test_scores_equal_a_count_by_hand(tiny, data):
    source = open_source(tiny(), "val")
    pictures = Pictures(source, evaluation_transform())
    scores = evaluate(torch.nn.Identity(), pictures, by_colour, Processes(CPU), torch.float32)
    matrix = np.zeros((4, 3), dtype=int)
    for index in range(len(pictures)):
        predicted = by_colour(pictures[0, index][0][None])[0].numpy()
        truth = np.asarray(Image.open(data / f"val/labels/{index}.png"))
        np.add.at(matrix, (truth, predicted), 1)
    assert matrix[VOID].sum() > 0
    matrix = matrix[:VOID]
    expected = matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())
    assert list(scores.classes.values()) == pytest.approx(list(expected))
    assert scores.classes["0"] > 0.8  # the predictor is right where it can be
    assert scores.mean == pytest.approx(expected.mean())


def test_a_class_that_does_not_occur_is_left_out_of_the_mean(tiny, data):
    for path in (data / "val/labels").iterdir():
        labels = np.asarray(Image.open(path)).copy()
        labels[labels == 2] = VOID
        Image.fromarray(labels).save(path)
    pictures = Pictures(open_source(tiny(), "val"), evaluation_transform())
    scores = evaluate(torch.nn.Identity(), pictures, by_colour, Processes(CPU), torch.float32)
    assert math.isnan(scores.classes["2"])
    assert scores.mean == pytest.approx((scores.classes["0"] + scores.classes["1"]) / 2)


def test_the_shares_of_two_processes_are_all_pictures(tiny):
    pictures = Pictures(open_source(tiny(), "val"), evaluation_transform())
    for rank, expected in ((0, 2), (1, 1)):
        seen = []
        processes = Processes(CPU, rank, 2)
        evaluate(torch.nn.Identity(), pictures, by_colour, processes, torch.float32, lambda seen=seen: seen.append(1))
        assert len(seen) == expected


@pytest.mark.parametrize("size", [(40, 56), (16, 90), (17, 17), (5, 33)])
def test_windows_cover_the_picture_and_average(size):
    image = torch.randn(2, 3, *size)
    calls = []

    def pixelwise(part):
        calls.append(part.shape[2:])
        return part.softmax(1)

    torch.testing.assert_close(sliding_window(pixelwise, 16)(image), image.softmax(1))
    assert all(shape == (min(16, size[0]), min(16, size[1])) for shape in calls)
    count = iter(range(1000))
    numbered = sliding_window(lambda part: torch.full_like(part, next(count)), 16)(torch.zeros(1, 3, 16, 20))
    assert float(numbered[0, 0, 0, 0]) == 0  # the first window alone
    assert float(numbered[0, 0, 0, 8]) == 0.5  # the mean of both
    assert float(numbered[0, 0, 0, 19]) == 1


def test_mirrored_predictions_are_mirrored_back():
    image = torch.rand(1, 3, 6, 8)
    torch.testing.assert_close(multi_scale(lambda x: x, [1.0], flip=True)(image), image)
    left = torch.zeros(1, 3, 6, 8)
    left[..., 0] = 1
    found = multi_scale(lambda x: left, [1.0], flip=True)(image)
    assert float(found[..., 0].mean()) == float(found[..., -1].mean()) == 0.5


def test_every_scale_is_seen_and_returned_at_the_picture_s_size():
    seen = []

    def predict(x):
        seen.append(tuple(x.shape[2:]))
        return torch.full_like(x, float(len(seen)))

    found = multi_scale(predict, [0.5, 1.0, 1.5], flip=False)(torch.rand(1, 3, 10, 14))
    assert seen == [(5, 7), (10, 14), (15, 21)]
    torch.testing.assert_close(found, torch.full((1, 3, 10, 14), 2.0))


class Halved(torch.nn.Module):
    """Logits of half the size of a picture, upsampled on request; it counts how often it was asked for small ones."""

    small = 0

    def forward(self, x, upsample=True):
        logits = torch.nn.functional.avg_pool2d(x, 2)
        self.small += not upsample
        return torch.nn.functional.interpolate(logits, x.shape[2:], mode="bilinear") if upsample else logits


@pytest.mark.parametrize(
    ("changes", "averages"),
    [
        ({}, False),
        ({"window": 40}, False),
        ({"window": 16}, True),
        ({"flip": True}, True),
        ({"eval_scales": (0.5,)}, True),
    ],
)
def test_classes_are_chosen_without_probabilities_where_none_are_averaged(tiny, changes, averages):
    network, image, options = Halved(), torch.randn(1, 3, 40, 24), tiny(**changes)
    context = lambda: torch.autocast("cpu", enabled=False)  # noqa: E731
    found = labeller(network, options, context)(image)
    assert network.small == (not averages)
    assert torch.equal(found, predictor(network, options, context)(image).argmax(1))
